"""A converted checkpoint says what the original says, has all of it, and is there whole or not at all."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration
from upstream_llava import (
    IMAGE_SIDE,
    PATCH,
    TEXT,
    TOWER,
    VISION,
    UpstreamLlava,
    copy_tokenizer,
    make_sentencepiece,
    write_config,
    write_tower,
    write_weights,
)

from relay_models.errors import CheckpointError
from relay_models.text4seg import convert as convert_module
from relay_models.text4seg.convert import Conversion, convert
from relay_models.text4seg.families.registry import require_family
from relay_models.text4seg.llava_layout import KNOWN_TOWERS, expected_shapes
from relay_models.text4seg.profiles import PROFILES, Style

BEFORE, AFTER = [1, 40, 41, 300], [13, 270, 5, 320, 111]
PICTURE_TOKENS = (IMAGE_SIDE // PATCH) ** 2
TOLERANCE = 1e-4
NOISE = 1e-5  # of float32, in these logits


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Models this small spend their time waiting for threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    make_sentencepiece(folder)
    return folder


@pytest.fixture(scope="module")
def upstream() -> UpstreamLlava:
    return UpstreamLlava(vocab_size=400)


@pytest.fixture(scope="module")
def tower(tmp_path_factory, upstream) -> Path:
    return write_tower(tmp_path_factory.mktemp("tower") / "clip", upstream)


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randn(3, IMAGE_SIDE, IMAGE_SIDE, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def source(tmp_path, upstream, tower, words) -> Path:
    """An upstream checkpoint with its tower, in one safetensors file."""
    return write_source(tmp_path / "source", upstream, tower, words)


def write_source(folder: Path, model: UpstreamLlava, tower: Path, words: Path, **changes: object) -> Path:
    write_config(folder, model.config(mm_vision_tower=str(tower), **changes))
    copy_tokenizer(words, folder)
    write_weights(folder, model.tensors())
    return folder


def logits_of(folder: Path, pixels: torch.Tensor) -> torch.Tensor:
    """Of the converted model, as transformers runs it."""
    model, loading = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert not loading["mismatched_keys"]
    ids = [*BEFORE, *[model.config.image_token_index] * PICTURE_TOKENS, *AFTER]
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([ids]), pixel_values=pixels[None]).logits[0]


def assert_same_logits(folder: Path, reference: torch.Tensor, pixels: torch.Tensor) -> None:
    logits = logits_of(folder, pixels)
    old = reference.shape[1]
    assert torch.allclose(logits[:, :old], reference, atol=TOLERANCE, rtol=0)
    assert reference.std() > 0.3, "logits this flat would agree by themselves"
    assert (logits[:, old:] < logits[:, :old].max(dim=1, keepdim=True).values).all(), "a new token would be said"


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


# ------------------------------------------------------------------------------------------------ full checkpoints


@pytest.mark.parametrize("layout", ["safetensors", "bin", "old bin", "sharded safetensors", "sharded bin"])
def test_logits_are_those_of_the_original(layout, tmp_path, upstream, tower, words, pixels):
    source = tmp_path / "source"
    write_config(source, upstream.config(mm_vision_tower=str(tower)))
    copy_tokenizer(words, source)
    write_weights(source, upstream.tensors(), layout)
    done = convert(source, tmp_path / "converted")
    assert_same_logits(tmp_path / "converted", upstream(BEFORE, AFTER, pixels), pixels)
    assert done.num_tensors == len(upstream.tensors())
    assert done.vocab_size == 448
    assert done.num_merged == 0
    assert leftovers(tmp_path) == []


def test_the_tower_is_taken_from_where_it_is_if_the_weights_lack_it(tmp_path, upstream, tower, words, pixels):
    source = tmp_path / "source"
    write_config(source, upstream.config())
    copy_tokenizer(words, source)
    write_weights(source, {n: t for n, t in upstream.tensors().items() if not n.startswith("model.vision_tower.")})
    convert(source, tmp_path / "converted", vision_tower=tower)
    assert_same_logits(tmp_path / "converted", upstream(BEFORE, AFTER, pixels), pixels)


def test_a_tower_among_the_weights_is_preferred(tmp_path, source, upstream, pixels):
    other = write_tower(tmp_path / "other", UpstreamLlava(vocab_size=400, seed=9))
    convert(source, tmp_path / "converted", vision_tower=other)
    assert_same_logits(tmp_path / "converted", upstream(BEFORE, AFTER, pixels), pixels)


def test_half_precision_stays_bit_for_bit(tmp_path, source, upstream):
    half = {name: weight.half() for name, weight in upstream.tensors().items()}
    write_weights(source, half)
    convert(source, tmp_path / "converted")
    converted = load_file(tmp_path / "converted" / "model.safetensors")
    for name, weight in half.items():
        (kept,) = [t for n, t in converted.items() if n == target_of(name)]
        assert torch.equal(kept[: len(weight)], weight), name
    assert json.loads((tmp_path / "converted" / "config.json").read_text())["dtype"] == "float16"


def target_of(name: str) -> str:
    for old, new in (
        ("model.mm_projector.0", "multi_modal_projector.linear_1"),
        ("model.mm_projector.2", "multi_modal_projector.linear_2"),
        (TOWER, "vision_tower.vision_model."),
        ("model.", "language_model.model."),
        ("lm_head", "language_model.lm_head"),
    ):
        if name.startswith(old):
            return new + name.removeprefix(old)
    raise AssertionError(name)


def test_changing_any_tensor_changes_the_logits_as_it_changes_the_originals(tmp_path, upstream, tower, words, pixels):
    """No tensor is lost, swapped or replaced. What cannot change the original's logits is carried over all the same."""
    folder = write_source(tmp_path / "source", upstream, tower, words)
    changed = UpstreamLlava(vocab_size=400)
    plain = changed(BEFORE, AFTER, pixels)
    without_effect = set()
    for name, weight in changed.tensors().items():
        kept = weight.clone()
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name)))
        weight.add_(noise)
        write_weights(folder, changed.tensors())
        reference = changed(BEFORE, AFTER, pixels)
        weight.copy_(kept)

        target = tmp_path / "converted"
        convert(folder, target)
        logits = logits_of(target, pixels)[:, :400]
        stored = load_file(target / "model.safetensors")[target_of(name)]
        shutil.rmtree(target)
        assert torch.equal(stored[: len(kept)], kept + noise), name
        effect = (reference - plain).abs().max()
        if effect < NOISE:
            without_effect.add(name)
        else:
            assert (logits - reference).abs().max() < min(TOLERANCE, effect / 4), name
    layers = [f"{TOWER}encoder.layers.{i}." for i in range(VISION["num_hidden_layers"])]
    # features are taken before the last layer; a bias of all keys shifts all scores of a query alike
    expected = {
        name
        for name in changed.tensors()
        if name.startswith((layers[-1], f"{TOWER}post_layernorm.")) or name.endswith("k_proj.bias")
    }
    assert without_effect == expected


# ------------------------------------------------------------------------------------------------ adapters

RANK, ALPHA = 3, 6


def make_adapter(model: UpstreamLlava, names: list[str], seed: int = 2) -> dict[str, torch.Tensor]:
    """Halves of a change of each of these modules, by module and half."""
    generator = torch.Generator().manual_seed(seed)
    modules = model.modules_by_upstream_name()
    halves = {}
    for name in names:
        out_features, in_features = modules[name].weight.shape
        halves[f"{name}.lora_A.weight"] = torch.randn(RANK, in_features, generator=generator) * 0.2
        halves[f"{name}.lora_B.weight"] = torch.randn(out_features, RANK, generator=generator) * 0.2
    return halves


def unmerged(model: UpstreamLlava, halves: dict[str, torch.Tensor], scale: float, pixels: torch.Tensor) -> torch.Tensor:
    """Logits of the model with the adapter beside it, as PEFT computes them: W x + scale B A x."""

    def beside(name: str) -> Callable[..., torch.Tensor]:
        down, up = halves[f"{name}.lora_A.weight"], halves[f"{name}.lora_B.weight"]
        return lambda _module, inputs, output: output + scale * (inputs[0] @ down.T @ up.T)

    adapted = {name.removesuffix(".lora_A.weight") for name in halves if name.endswith(".lora_A.weight")}
    hooks = [
        module.register_forward_hook(beside(name))
        for name, module in model.modules_by_upstream_name().items()
        if name in adapted
    ]
    try:
        return model(BEFORE, AFTER, pixels)
    finally:
        for hook in hooks:
            hook.remove()


def write_adapter(
    folder: Path, tensors: dict[str, torch.Tensor], base: Path | None, rename: Callable[[str], str] = str, **changes
) -> Path:
    folder.mkdir(parents=True)
    named = {f"base_model.model.{rename(name)}": tensor.clone() for name, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", **changes}
    if base is not None:
        config["base_model_name_or_path"] = str(base)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def in_llava_hf_before_4_52(name: str) -> str:
    return target_of(name)


def in_llava_hf_since_4_52(name: str) -> str:
    new = target_of(name)
    if new.startswith("language_model.model."):
        return "model.language_model." + new.removeprefix("language_model.model.")
    return "lm_head" + new.removeprefix("language_model.lm_head") if "lm_head" in new else f"model.{new}"


def every_linear_layer(model: UpstreamLlava) -> list[str]:
    return [name for name in model.modules_by_upstream_name() if name != "lm_head"]


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_merged_adapter_gives_the_logits_of_an_unmerged_one(use_rslora, tmp_path, source, upstream, pixels):
    halves = make_adapter(upstream, every_linear_layer(upstream))
    adapter = write_adapter(tmp_path / "adapter", halves, source, use_rslora=use_rslora)
    done = convert(adapter, tmp_path / "converted")
    reference = unmerged(upstream, halves, ALPHA / (math.sqrt(RANK) if use_rslora else RANK), pixels)
    assert_same_logits(tmp_path / "converted", reference, pixels)
    assert (reference - upstream(BEFORE, AFTER, pixels)).abs().max() > 0.1, "the adapter does something"
    assert done.num_merged == len(every_linear_layer(upstream))


@pytest.mark.parametrize("rename", [in_llava_hf_before_4_52, in_llava_hf_since_4_52])
def test_an_adapter_on_a_llava_hf_model(rename, tmp_path, source, upstream, pixels):
    """As ms-swift trains them. The base's weights come in either of llava-hf's names."""
    base = tmp_path / "base"
    convert(source, base)
    tensors = load_file(base / "model.safetensors")
    back = {target_of(name): name for name in upstream.tensors()}
    save_file({rename(back[name]): tensor for name, tensor in tensors.items()}, base / "model.safetensors")
    halves = make_adapter(upstream, every_linear_layer(upstream))
    adapter = write_adapter(tmp_path / "adapter", halves, None, rename)
    done = convert(adapter, tmp_path / "converted", base=base)
    assert_same_logits(tmp_path / "converted", unmerged(upstream, halves, ALPHA / RANK, pixels), pixels)
    assert done.vocab_size == 448, "the base has the two tokens already"
    assert done.image_token_id == 400


def test_an_adapter_with_a_projector_of_its_own_on_the_plain_language_model(tmp_path, upstream, tower, words, pixels):
    """As upstream's own code saves them: the projector was trained in full, and the tower is CLIP's."""
    base = tmp_path / "vicuna"
    write_config(base, {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 400, **TEXT})
    copy_tokenizer(words, base)
    tensors = upstream.tensors()
    write_weights(
        base, {n: t for n, t in tensors.items() if "mm_projector" not in n and "vision_tower" not in n}, "bin"
    )
    names = [name for name in every_linear_layer(upstream) if ".layers." in name and not name.startswith(TOWER)]
    halves = make_adapter(upstream, names)
    adapter = write_adapter(tmp_path / "adapter", halves, base)
    write_config(adapter, upstream.config(mm_vision_tower=str(tower)))
    projector = {f"base_model.model.{n}": t.clone() for n, t in tensors.items() if "mm_projector" in n}
    assert len(projector) == 4
    torch.save(projector, adapter / "non_lora_trainables.bin")
    done = convert(adapter, tmp_path / "converted")
    assert_same_logits(tmp_path / "converted", unmerged(upstream, halves, ALPHA / RANK, pixels), pixels)
    assert done.style is Style.VICUNA

    torch.save({n: t + 1 for n, t in projector.items()}, adapter / "non_lora_trainables.bin")
    convert(adapter, tmp_path / "other")
    assert not torch.allclose(
        logits_of(tmp_path / "other", pixels), logits_of(tmp_path / "converted", pixels), atol=0.1
    )


def test_a_projector_beside_an_adapter_takes_the_place_of_the_bases(tmp_path, source, upstream, pixels):
    trained = UpstreamLlava(vocab_size=400)
    with torch.no_grad():
        for weight in trained.projector.parameters():
            weight.add_(0.2)
    halves = make_adapter(upstream, ["model.layers.0.mlp.up_proj", "model.mm_projector.2"])
    adapter = write_adapter(tmp_path / "adapter", halves, source)
    beside = {f"base_model.model.{name}": t.clone() for name, t in trained.tensors().items() if "mm_projector" in name}
    torch.save(beside, adapter / "non_lora_trainables.bin")
    convert(adapter, tmp_path / "converted")
    reference = unmerged(trained, halves, ALPHA / RANK, pixels)
    assert_same_logits(tmp_path / "converted", reference, pixels)
    assert (reference - unmerged(upstream, halves, ALPHA / RANK, pixels)).abs().max() > 0.1


def test_changing_any_tensor_of_an_adapter_changes_the_logits(tmp_path, source, upstream, pixels):
    names = [name for name in every_linear_layer(upstream) if ".layers.0." in name or "projector" in name]
    halves = make_adapter(upstream, names)
    plain = unmerged(upstream, halves, ALPHA / RANK, pixels)
    for name in halves:
        changed = {**halves, name: halves[name] + 0.3}
        adapter = write_adapter(tmp_path / "adapter", changed, source)
        convert(adapter, tmp_path / "converted")
        logits = logits_of(tmp_path / "converted", pixels)[:, :400]
        reference = unmerged(upstream, changed, ALPHA / RANK, pixels)
        effect = (reference - plain).abs().max()
        assert effect > 10 * NOISE, name
        assert (logits - reference).abs().max() < min(TOLERANCE, effect / 4), name
        shutil.rmtree(tmp_path / "adapter")
        shutil.rmtree(tmp_path / "converted")


def test_merging_half_precision_loses_no_more_than_storing_it(tmp_path, source, upstream):
    write_weights(source, {name: weight.half() for name, weight in upstream.tensors().items()})
    name = "model.layers.0.mlp.up_proj"
    halves = make_adapter(upstream, [name])
    convert(write_adapter(tmp_path / "adapter", halves, source), tmp_path / "converted")
    merged = load_file(tmp_path / "converted" / "model.safetensors")[target_of(name) + ".weight"]
    exact = upstream.tensors()[f"{name}.weight"].half().double() + (ALPHA / RANK) * (
        halves[f"{name}.lora_B.weight"].double() @ halves[f"{name}.lora_A.weight"].double()
    )
    assert merged.dtype == torch.float16
    assert ((merged.double() - exact).abs() <= exact.abs() * 2**-11 * 1.01 + 1e-7).all()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"peft_type": "LOHA"}, "peft_type must be LORA, got 'LOHA'"),
        ({"r": 0}, "r in adapter_config.json"),
        ({"r": "3"}, "r in adapter_config.json"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"lora_alpha": float("inf")}, "lora_alpha"),
        ({"r": RANK + 1}, r"model\.layers\.0\.mlp\.up_proj\.lora_A\.weight and its other half have shapes"),
    ],
)
def test_adapters_that_are_more_than_a_change_are_refused(change, complaint, tmp_path, source, upstream):
    halves = make_adapter(upstream, ["model.layers.0.mlp.up_proj"])
    adapter = write_adapter(tmp_path / "adapter", halves, source, **change)
    with pytest.raises(CheckpointError, match=complaint):
        convert(adapter, tmp_path / "converted")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "source"]


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda halves: halves.pop("model.layers.0.mlp.up_proj.lora_B.weight"), "up_proj.lora_A.weight .* is half of"),
        (
            lambda halves: halves.update({"model.layers.7.mlp.up_proj.lora_A.weight": torch.ones(RANK, 32)}),
            r"model\.layers\.7\.mlp\.up_proj\.lora_A\.weight .* changes nothing",
        ),
        (lambda halves: halves.update({"model.embed_tokens.lora_embedding_A": torch.ones(RANK, 400)}), "embedding_A"),
        (lambda halves: halves.update({"model.layers.0.mlp.up_proj.bias": torch.ones(48)}), r"up_proj\.bias"),
    ],
)
def test_adapter_tensors_that_fit_nothing_are_named(spoil, complaint, tmp_path, source, upstream):
    halves = make_adapter(upstream, ["model.layers.0.mlp.up_proj"])
    spoil(halves)
    with pytest.raises(CheckpointError, match=complaint):
        convert(write_adapter(tmp_path / "adapter", halves, source), tmp_path / "converted")


def test_an_adapter_that_names_no_base_needs_one(tmp_path, upstream, source):
    adapter = write_adapter(tmp_path / "adapter", make_adapter(upstream, ["model.layers.0.mlp.up_proj"]), None)
    with pytest.raises(CheckpointError, match="give it as base"):
        convert(adapter, tmp_path / "converted")
    with pytest.raises(CheckpointError, match="base is for adapters"):
        convert(source, tmp_path / "converted", base=source)


# ------------------------------------------------------------------------------------------------ what is refused


def spoilt(name: str, weight: torch.Tensor | None) -> Callable[[dict[str, torch.Tensor]], None]:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop(name, None)
        if weight is not None:
            tensors[name] = weight

    return spoil


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (spoilt("model.layers.0.mlp.extra.weight", torch.ones(2)), r"holds model\.layers\.0\.mlp\.extra\.weight"),
        (spoilt("something.else", torch.ones(2)), r"holds something\.else"),
        (spoilt("model.layers.1.mlp.up_proj.weight", None), r"lacks language_model\.model\.layers\.1\.mlp\.up_proj"),
        (spoilt("model.mm_projector.2.bias", None), r"lacks multi_modal_projector\.linear_2\.bias"),
        (spoilt("model.mm_projector.4.weight", torch.ones(2)), r"holds model\.mm_projector\.4\.weight"),
        (
            spoilt("lm_head.weight", torch.ones(32, 400)),
            r"lm_head\.weight in .* shape \[32, 400\], expected \[400, 32\]",
        ),
        (spoilt("model.norm.weight", torch.ones(32, dtype=torch.int8)), r"model\.norm\.weight in .* of torch\.int8"),
        (spoilt("language_model.model.norm.weight", torch.ones(32)), "are both language_model.model.norm.weight"),
        (spoilt("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4)), "not what the config determines"),
        (spoilt(f"{TOWER}embeddings.position_ids", torch.tensor([[0, 1, 3, 2, 4]])), "not what the config determines"),
    ],
)
def test_a_tensor_too_many_too_few_or_wrong_is_named(spoil, complaint, tmp_path, source, upstream):
    tensors = upstream.tensors()
    spoil(tensors)
    write_weights(source, tensors)
    with pytest.raises(CheckpointError, match=complaint):
        convert(source, tmp_path / "converted")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_tensors_that_follow_from_the_config_are_checked_and_left_out(tmp_path, source, upstream, pixels):
    tensors = upstream.tensors()
    head_dim = 32 // 4
    frequencies = 1 / 5000 ** (torch.arange(0, head_dim, 2) / head_dim)
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = frequencies.half()
    tensors[f"{TOWER}embeddings.position_ids"] = torch.arange(PICTURE_TOKENS + 1)[None]
    write_weights(source, tensors)
    convert(source, tmp_path / "converted")
    assert_same_logits(tmp_path / "converted", upstream(BEFORE, AFTER, pixels), pixels)
    assert not [name for name in load_file(tmp_path / "converted" / "model.safetensors") if "inv_freq" in name]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"architectures": ["MistralForCausalLM"]}, "architectures must name one of"),
        ({"mm_projector_type": "linear"}, "mm_projector_type must be 'mlp2x_gelu', got 'linear'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end"),
        ({"mm_vision_select_feature": "pooled"}, "mm_vision_select_feature"),
        ({"mm_vision_tower": "openai/other"}, "sizes of the vision tower 'openai/other' are not known"),
        ({"hidden_size": "32"}, "LlamaConfig cannot be made"),
        ({"num_attention_heads": 0}, "LlamaConfig cannot be made"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers of llama must be from 1 to 1000"),
        ({"vocab_size": -1}, "vocab_size of llama must be"),
        ({"intermediate_size": 0}, "intermediate_size of llama must be"),
        ({"attention_bias": True}, "attention_bias"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"vocab_size": 399}, r"lm_head\.weight in .* has shape \[400, 32\], expected \[399, 32\]"),
        ({"text4seg": {"grid": 0}}, "grid must be"),
    ],
)
def test_configs_llava_hf_cannot_say_are_refused(change, complaint, tmp_path, source, upstream, tower):
    write_config(source, upstream.config(**{"mm_vision_tower": str(tower), **change}))
    with pytest.raises(CheckpointError, match=complaint):
        convert(source, tmp_path / "converted")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_tokenizer_with_more_words_than_the_model_is_refused(tmp_path, tower, words):
    source = write_source(tmp_path / "source", UpstreamLlava(vocab_size=390), tower, words)
    with pytest.raises(CheckpointError, match="has 400 tokens, the embeddings 390 rows"):
        convert(source, tmp_path / "converted")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_rows_without_a_word_stay_and_the_new_words_take_them(tmp_path, tower, words, pixels):
    """A model whose embeddings were padded already does not grow."""
    padded = UpstreamLlava(vocab_size=416)
    done = convert(write_source(tmp_path / "source", padded, tower, words), tmp_path / "converted")
    assert (done.image_token_id, done.vocab_size) == (400, 416)
    assert_same_logits(tmp_path / "converted", padded(BEFORE, AFTER, pixels), pixels)


def test_weights_that_run_code_are_not_run(tmp_path, source):
    class Runs:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "was run"),)

    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(pickle.dumps({"lm_head.weight": Runs()}, protocol=2))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin cannot be read as PyTorch weights"):
        convert(source, tmp_path / "converted")
    assert not (tmp_path / "was run").exists()


@pytest.mark.parametrize(
    ("file", "content", "complaint"),
    [
        ("model.safetensors", b"", r"model\.safetensors cannot be read"),
        ("model.safetensors", b"\xff" * 100, r"model\.safetensors cannot be read"),
        ("config.json", b"[]", r"config\.json must hold a JSON object"),
        ("config.json", b"{", r"config\.json is not JSON"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "../../x.safetensors"}}', "is not in the folder"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "sub/x.safetensors"}}', "is not in the folder"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "/etc/passwd"}}', "is not in the folder"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "x.safetensors"}}', "is missing: fetch it again"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "model.safetensors"}}', "is in the index only"),
        ("model.safetensors.index.json", b'{"weight_map": []}', "weight_map in .* must map"),
        ("tokenizer.model", b"nonsense", "tokenizer of .* cannot be read"),
    ],
)
def test_files_that_are_not_what_they_are_called_are_named(file, content, complaint, tmp_path, source):
    (source / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=complaint):
        convert(source, tmp_path / "converted")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_truncated_file_is_named(tmp_path, source):
    whole = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        convert(source, tmp_path / "converted")


@pytest.mark.parametrize(
    ("missing", "complaint"), [("model.safetensors", "no weights"), ("tokenizer.model", "tokenizer")]
)
def test_a_missing_file_is_named(missing, complaint, tmp_path, source):
    (source / missing).unlink()
    with pytest.raises(CheckpointError, match=complaint):
        convert(source, tmp_path / "converted")


# ------------------------------------------------------------------------------------------------ writing


def test_shards_are_bounded_and_say_the_same(tmp_path, source, upstream, pixels):
    seen: list[tuple[int, int]] = []
    limit = 60_000
    convert(
        source, tmp_path / "sharded", max_shard_bytes=limit, progress=lambda done, total: seen.append((done, total))
    )
    shards = sorted((tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 3
    assert all(shard.stat().st_size < limit + 8000 for shard in shards)  # a header each
    assert_same_logits(tmp_path / "sharded", upstream(BEFORE, AFTER, pixels), pixels)
    assert len(seen) == len(shards)
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] == sum(t.nbytes for shard in shards for t in load_file(shard).values())


def test_being_stopped_leaves_nothing(tmp_path, source):
    def stop(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "converted", max_shard_bytes=10_000, progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_is_there_already_stays(tmp_path, source):
    target = tmp_path / "converted"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        convert(source, target)
    with pytest.raises(CheckpointError, match="exists already"):
        convert(source, target / "notes.txt")
    assert [path.read_text() for path in target.iterdir()] == ["mine"]
    (target / "notes.txt").unlink()
    convert(source, target)
    assert (target / "config.json").exists()


def test_a_disk_too_small_is_told_before_anything_is_written(tmp_path, source, monkeypatch):
    monkeypatch.setattr(convert_module, "SPARE_BYTES", 1 << 60)
    with pytest.raises(CheckpointError, match="MiB free, and the weights take"):
        convert(source, tmp_path / "converted")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_everybody_may_read_what_was_written(tmp_path, source):
    convert(source, tmp_path / "deep" / "er" / "converted")
    folder = tmp_path / "deep" / "er" / "converted"
    assert folder.stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}


# ---------------------------------------------------------------- the rest of the folder


@pytest.fixture(scope="module")
def converted(tmp_path_factory, upstream, tower, words) -> tuple[Path, Conversion]:
    folder = tmp_path_factory.mktemp("converted")
    source = write_source(folder / "text4seg-p24", upstream, tower, words)
    return folder / "target", convert(source, folder / "target")


def test_the_tokenizer_splits_as_sentencepiece_does(converted, words):
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(words / "tokenizer.model"))
    tokenizer = AutoProcessor.from_pretrained(converted[0]).tokenizer
    for text in ("others *16\n zebra *2| grass *14\n", "please segment  the  dog", "ünï¢ode 犬", "USER: a\nASSISTANT:"):
        assert tokenizer(text).input_ids == [1, *pieces.encode(text)], text
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_the_two_new_tokens_follow_the_old_ones(converted):
    folder, done = converted
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    assert tokenizer.convert_tokens_to_ids(["<image>", "<pad>"]) == [400, 401]
    assert (done.image_token_id, done.vocab_size, done.vocab_size % 64) == (400, 448, 0)
    assert tokenizer.pad_token_id == 401
    config = json.loads((folder / "config.json").read_text())
    assert config["image_token_index"] == 400
    assert config["text_config"]["vocab_size"] == 448
    assert config["text_config"]["rope_parameters"]["rope_theta"] == 5000.0


def test_a_vocabulary_of_llamas_size_grows_as_llava_hfs_did():
    """32,000 words, <image> 32000, <pad> 32001, 32,064 rows: the numbers of every published llava-hf model."""
    assert math.ceil((32_000 + 2) / convert_module.VOCABULARY_MULTIPLE) * convert_module.VOCABULARY_MULTIPLE == 32_064


def test_the_family_of_the_converted_model(converted):
    folder, done = converted
    family = require_family(json.loads((folder / "config.json").read_text()), str(folder))
    assert (family.name, family.grid, family.image_side) == ("llava-1.5", 24, IMAGE_SIDE)
    assert family.num_image_tokens == PICTURE_TOKENS
    assert (done.grid, done.style) == (24, Style.VICUNA)
    processor = AutoProcessor.from_pretrained(folder)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where?"}]}]
    assert processor.apply_chat_template(chat, add_generation_prompt=True) == "<s>" + family.prompt("Where?")
    assert family.prompt("Where?").startswith("A chat between")


def test_a_tokenizer_that_begins_no_text_gets_a_template_that_does_not(tmp_path, source):
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**settings, "add_bos_token": False}))
    convert(source, tmp_path / "converted")
    processor = AutoProcessor.from_pretrained(tmp_path / "converted")
    chat = [{"role": "user", "content": "please"}, {"role": "assistant", "content": "the dog"}]
    said = processor.apply_chat_template(chat)
    assert said.startswith("A chat between")
    assert said.endswith(" USER: please ASSISTANT: the dog</s>")
    assert processor.tokenizer(said).input_ids[0] != processor.tokenizer.bos_token_id


def test_the_caller_knows_better(tmp_path, source):
    done = convert(source, tmp_path / "converted", grid=32, style=Style.PLAIN)
    family = require_family(json.loads((tmp_path / "converted" / "config.json").read_text()))
    assert (done.grid, done.style, family.grid) == (32, Style.PLAIN, 32)
    assert family.prompt("x").startswith("USER: ")


def test_the_processor_squashes_and_counts(converted):
    processor = AutoProcessor.from_pretrained(converted[0])
    wide = Image.new("RGB", (80, 20))
    wide.paste((255, 255, 255), (0, 0, 20, 20))  # the left quarter
    inputs = processor(images=wide, text="USER: <image>\nx", return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, IMAGE_SIDE, IMAGE_SIDE)
    row = inputs["pixel_values"][0, 0, IMAGE_SIDE // 2]
    assert np.flatnonzero((row > row.mean()).numpy()).tolist() == list(range(IMAGE_SIDE // 4))
    assert (inputs["input_ids"] == 400).sum() == PICTURE_TOKENS


def test_the_names_and_shapes_expected_are_those_of_transformers():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    text, vision = {**TEXT, "vocab_size": 400}, VISION
    config = LlavaConfig(text_config=LlamaConfig(**text), vision_config=CLIPVisionConfig(**vision))
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    shapes = {}
    for name, weight in model.state_dict().items():
        name = name.removeprefix("model.").replace("lm_head", "language_model.lm_head")
        if name.startswith("language_model.") and "lm_head" not in name:
            name = name.replace("language_model.", "language_model.model.", 1)
        if name.startswith("vision_tower.") and not name.startswith("vision_tower.vision_model."):
            name = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
        shapes[name] = tuple(weight.shape)
    assert expected_shapes(text, vision) == shapes


def test_the_published_sizes_make_a_model_of_seven_billion():
    """Of lmc22/text4seg-llava-7b-p24, as far as it can be told without its weights."""
    profile = PROFILES["lmc22/text4seg-llava-7b-p24"]
    text = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    shapes = expected_shapes(text, KNOWN_TOWERS[profile.vision_tower])
    assert sum(math.prod(shape) for shape in shapes.values()) == 7_062_902_784
    assert shapes["vision_tower.vision_model.embeddings.position_embedding.weight"] == (577, 1024)
    assert shapes["multi_modal_projector.linear_1.weight"] == (4096, 1024)


# ------------------------------------------------------------------------------------------------ the hub


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of the hub's library, which may not reach the network."""
    cache = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return cache


def publish(cache: Path, model_id: str, folder: Path) -> None:
    kept = cache / f"models--{model_id.replace('/', '--')}"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, kept / "snapshots" / ("0" * 40))


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_a_published_id_is_found_where_the_hub_library_keeps_it(layout, tmp_path, hub_cache, upstream, tower, words):
    """And its profile gives the grid and the tower, which is published apart."""
    source = tmp_path / "source"
    write_config(source, upstream.config(mm_vision_tower="openai/clip-vit-large-patch14-336"))
    copy_tokenizer(words, source)
    write_weights(source, {n: t for n, t in upstream.tensors().items() if not n.startswith(TOWER)}, layout)
    publish(hub_cache, "lmc22/text4seg-llava-7b-p24", source)
    publish(hub_cache, "openai/clip-vit-large-patch14-336", tower)
    assert convert("lmc22/text4seg-llava-7b-p24", tmp_path / "converted").grid == 24
    assert convert(source, tmp_path / "directly", vision_tower=tower).grid == 16
    fetched, direct = (load_file(tmp_path / name / "model.safetensors") for name in ("converted", "directly"))
    assert fetched.keys() == direct.keys()
    assert all(torch.equal(fetched[name], direct[name]) for name in direct)


@pytest.mark.parametrize("name", ["nobody/nothing", "not an id", "/no/such/folder"])
def test_an_id_the_hub_does_not_give_is_named(name, tmp_path, hub_cache):
    with pytest.raises(CheckpointError, match=f"source '{name}' is no folder, and the hub did not give it"):
        convert(name, tmp_path / "converted")


# ------------------------------------------------------------------------------------------------ vLLM


SAY = """
import json, sys
from PIL import Image
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folder, prompt, *photos = sys.argv[1:]
    llm = LLM(folder, enforce_eager=True, max_model_len=512, dtype="float32", max_num_seqs=2)
    sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=1)
    for photo in photos:
        ask = {"prompt": prompt, "multi_modal_data": {"image": Image.open(photo)}}
        (said,) = llm.generate(ask, sampling)
        ids = list(said.outputs[0].token_ids)
        likely = [step[token].logprob for step, token in zip(said.outputs[0].logprobs, ids)]
        print("SAID", json.dumps([said.prompt_token_ids, ids, likely]))
"""


@pytest.mark.slow
def test_vllm_loads_what_was_converted_and_says_the_same(tmp_path, words):
    """On a model with heads of 32, the smallest vLLM's attention takes."""
    model = UpstreamLlava(vocab_size=400, text={"head_dim": 32})
    source = write_source(tmp_path / "source", model, write_tower(tmp_path / "clip", model), words, head_dim=32)
    folder = tmp_path / "converted"
    convert(source, folder)
    family = require_family(json.loads((folder / "config.json").read_text()))
    prompt = family.prompt("please segment only the dog in the image.")
    photos = [tmp_path / "black.png", tmp_path / "noise.png"]
    Image.new("RGB", (IMAGE_SIDE, IMAGE_SIDE)).save(photos[0])
    noise = np.random.default_rng(0).integers(0, 256, (IMAGE_SIDE, IMAGE_SIDE, 3), dtype=np.uint8)
    Image.fromarray(noise).save(photos[1])

    (tmp_path / "say.py").write_text(SAY)
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_PLUGINS": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(tmp_path / "say.py"), str(folder), prompt, *map(str, photos)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    answers = [json.loads(line.split("SAID ", 1)[1]) for line in result.stdout.splitlines() if "SAID " in line]
    assert len(answers) == 2, result.stderr[-3000:]

    processor = AutoProcessor.from_pretrained(folder)
    hf = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    for photo, (asked, said, likely) in zip(photos, answers, strict=True):
        inputs = processor(images=Image.open(photo), text=prompt, return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == asked
        whole = torch.cat([inputs["input_ids"], torch.tensor([said])], dim=1)
        with torch.no_grad():
            logits = hf(input_ids=whole, pixel_values=inputs["pixel_values"]).logits[0, len(asked) - 1 : -1]
        assert logits.argmax(dim=-1).tolist() == said
        expected = logits.log_softmax(dim=-1).max(dim=-1).values
        assert torch.allclose(torch.tensor(likely), expected, atol=2e-4, rtol=0)
    assert abs(answers[0][2][0] - answers[1][2][0]) > 2e-3, "the picture is seen"
