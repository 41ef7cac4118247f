"""A tiny model in the layout of the original LLaVA code, with a forward pass of its own to compare against.

Llama, CLIP's features of the second-to-last layer without the class token, two linear layers with a GELU between them:
what section 3 of the LLaVA-1.5 paper (arXiv 2310.03744) describes, put together from transformers' parts.
"""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

IMAGE_SIDE = 28
PATCH = 14
HIDDEN = 32

TEXT = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": IMAGE_SIDE,
    "patch_size": PATCH,
    "projection_dim": 16,
}
TOWER = "model.vision_tower.vision_tower.vision_model."


def make_sentencepiece(folder: Path) -> int:
    """Train a SentencePiece model of Vicuna's kind into ``folder``, with its config; returns the number of tokens."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    colours, things = ("red", "dark blue", "striped", "left", "tall"), ("dog", "zebra", "umbrella", "street", "grass")
    text = [
        f"please segment only the {c} {t} in the image. others *16 {t} *{n}"
        for c in colours
        for t in things
        for n in range(1, 17)
    ]
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=trained,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",  # as Llama's: a line break stays one
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(trained.getvalue())
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "legacy": True,
        "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue()).vocab_size()


class UpstreamLlava(torch.nn.Module):
    """The reference: random weights, upstream's names, float32."""

    def __init__(self, vocab_size: int, seed: int = 0, text: dict[str, Any] | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.llama = LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **{**TEXT, **(text or {})}))
            self.clip = CLIPVisionModel(CLIPVisionConfig(**VISION))
            self.projector = torch.nn.Sequential(
                torch.nn.Linear(VISION["hidden_size"], HIDDEN), torch.nn.GELU(), torch.nn.Linear(HIDDEN, HIDDEN)
            )
            with torch.no_grad():
                for weight in self.parameters():  # as initialised, some are zero or one, and would prove nothing
                    weight.normal_(std=0.3)
        self.eval()

    @torch.no_grad()
    def forward(self, before: list[int], after: list[int], pixels_CHW: torch.Tensor) -> torch.Tensor:
        """Logits [tokens, vocabulary] of the text with the picture between its halves."""
        states = self.clip(pixels_CHW[None], output_hidden_states=True).hidden_states
        picture = self.projector(states[-2][0, 1:])
        embed = self.llama.model.embed_tokens
        inputs = torch.cat([embed(torch.tensor(before)), picture, embed(torch.tensor(after))])
        return self.llama(inputs_embeds=inputs[None]).logits[0]

    def modules_by_upstream_name(self) -> dict[str, torch.nn.Linear]:
        """Every linear layer, as an adapter would name it."""
        named = dict(self.llama.named_modules())
        named |= {f"model.mm_projector.{name}": module for name, module in self.projector.named_modules()}
        named |= {TOWER + name.removeprefix("vision_model."): module for name, module in self.clip.named_modules()}
        return {name: module for name, module in named.items() if isinstance(module, torch.nn.Linear)}

    def tensors(self) -> dict[str, torch.Tensor]:
        """The weights by upstream's names; they are the model's own, not copies."""
        named = dict(self.llama.named_parameters())
        named |= {f"model.mm_projector.{name}": weight for name, weight in self.projector.named_parameters()}
        named |= {TOWER + name.removeprefix("vision_model."): weight for name, weight in self.clip.named_parameters()}
        return {name: weight.detach() for name, weight in named.items()}

    def config(self, **changes: Any) -> dict[str, Any]:
        return {
            "architectures": ["LlavaLlamaForCausalLM"],
            "model_type": "llava_llama",
            **TEXT,
            "vocab_size": self.llama.config.vocab_size,
            "torch_dtype": "float16",
            "rope_scaling": None,
            "mm_vision_tower": "openai/clip-vit-tiny",
            "mm_hidden_size": VISION["hidden_size"],
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch",
            "mm_use_im_start_end": False,
            "image_aspect_ratio": "pad",
            "tune_mm_mlp_adapter": False,
            **changes,
        }


def write_config(folder: Path, config: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))


def write_tower(folder: Path, model: UpstreamLlava) -> Path:
    """A CLIP model of its own, text half included, whose tower is the reference's; named as on the hub."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        clip = CLIPModel(
            CLIPConfig(
                text_config={
                    "hidden_size": 16,
                    "num_attention_heads": 2,
                    "intermediate_size": 16,
                    "num_hidden_layers": 1,
                    "vocab_size": 50,
                },
                vision_config=VISION,
            )
        )
    tensors = {name: weight for name, weight in clip.state_dict().items() if not name.startswith("vision_model.")}
    for name, weight in model.tensors().items():
        if name.startswith(TOWER):
            tensors["vision_model." + name.removeprefix(TOWER)] = weight
    folder.mkdir(parents=True)
    save_file({name: weight.contiguous() for name, weight in tensors.items()}, folder / "model.safetensors")
    write_config(folder, clip.config.to_dict())
    return folder


def write_weights(folder: Path, tensors: dict[str, torch.Tensor], layout: str = "safetensors") -> None:
    """One of the layouts checkpoints come in."""
    tensors = {name: weight.clone() for name, weight in tensors.items()}
    suffix = "safetensors" if "safetensors" in layout else "bin"
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names = sorted(tensors)
    halves = [names[::2], names[1::2]] if layout.startswith("sharded") else [names]
    files = [f"{stem}-{i:05}-of-{len(halves):05}.{suffix}" for i in range(1, len(halves) + 1)]
    if len(halves) == 1:
        files = [f"{stem}.{suffix}"]
    for file, half in zip(files, halves, strict=True):
        part = {name: tensors[name] for name in half}
        if suffix == "safetensors":
            save_file(part, folder / file)
        else:
            torch.save(part, folder / file, _use_new_zipfile_serialization=layout != "old bin")
    if len(halves) > 1:
        weight_map = {name: file for file, half in zip(files, halves, strict=True) for name in half}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def copy_tokenizer(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(source / name, target)
