"""A Hugging Face multimodal model with LoRA on its language model, as it is trained here.

    picture, squashed → processor → vision tower (frozen) → features, cached
    features → projector ┐
    tokens → embeddings  ┴→ language model with LoRA → loss on the answers

The vision tower never changes, so what it makes of a picture is computed once, up to the projector, which may be
trained. The layers are PEFT's, and so are the adapter's files.

Promises: features times projector are the model's own `get_image_features`, their order included; a forward pass is
that of the model's class, with embeddings and masks made here.

Legend: T image tokens or patches, C channels, S tokens of a sequence, A of them predicted, V tokens of the vocabulary.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from relay_models.errors import CheckpointError, RelayModelsError
from relay_models.recipes.text4seg.lora_sequences import PackedQuestions, Speaker
from relay_models.text4seg.checkpoint_files import read_json
from relay_models.text4seg.families import internvl2, internvl_hf, llava15, qwen2_vl
from relay_models.text4seg.families.family import Family, has_architecture
from relay_models.text4seg.families.registry import require_family
from relay_models.text4seg.profiles import CONFIG_KEY, Style, training_of

PEFT_HINT = "training adapters needs the library peft: pip install 'vllm-relay[train]'"

# Where the projector of each class is, by the names of transformers.
PROJECTORS: Mapping[str, str] = MappingProxyType(
    {
        llava15.ARCHITECTURE: "model.multi_modal_projector",
        internvl_hf.ARCHITECTURE: "model.multi_modal_projector",
        **dict.fromkeys(qwen2_vl.ARCHITECTURES, "model.visual.merger"),
    }
)
# The language model's linear layers, and none of the vision tower's that are called alike.
TARGETS = r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"

# Features are kept in float16, divided by this: vision towers have single values beyond its range, none near this one.
FEATURE_SCALE = 16.0

# Of files of weights, to tell one model from another: their beginning, which names tensors, and a piece every so often.
_BEGINNING_BYTES, _PIECE_BYTES, _PIECE_DISTANCE = 1 << 20, 1 << 12, 1 << 20


@dataclass(frozen=True)
class LoraSizes:
    """Attributes:
    rank, alpha, dropout: of the LoRA (arXiv 2106.09685); a change counts alpha / rank times.
    trains_projector: in full, beside the LoRA.
    """

    rank: int = 64
    alpha: int = 128
    dropout: float = 0.05
    trains_projector: bool = True

    def __post_init__(self) -> None:
        for name in ("rank", "alpha"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise RelayModelsError(f"{name} must be a whole number of at least 1, got {value!r}")
        if not 0 <= self.dropout < 1:
            raise RelayModelsError(f"dropout must be at least 0 and below 1, got {self.dropout}")


def check_peft() -> None:
    """Raises RelayModelsError, with what to do, where the library is absent."""
    if importlib.util.find_spec("peft") is None:
        raise RelayModelsError(PEFT_HINT)


def fetched(name: str) -> Path:
    """The folder of that name, or of the model of that id, fetched from the hub. Raises CheckpointError."""
    if Path(name).is_dir():
        return Path(name).resolve()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.jinja", "*.model", "*.txt", "*.safetensors"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"model {name!r} is no folder, and the hub did not give it: {reason}") from error


def trained_config(folder: Path, model_id: str, grid: int | None, style: Style | None) -> dict[str, Any]:
    """The config of the model in ``folder`` with the ``text4seg`` object that it has after a training.

    Raises:
        CheckpointError: the model is of no family that is trained here, or the grid or style is impossible.
    """
    config = read_json(folder / "config.json")
    if has_architecture(config, internvl2.ARCHITECTURE):
        raise CheckpointError(
            f"{model_id} is in InternVL's own layout, which transformers does not load: name its twin ending in -hf"
        )
    family = require_family(config, model_id)
    if family.architecture not in PROJECTORS:
        raise CheckpointError(
            f"{model_id} is a {family.name}, which this recipe does not train: use one of {', '.join(PROJECTORS)}"
        )
    known = training_of(config, model_id, default_grid=family.grid)
    style = known.style if style is None else style
    if style is not Style.PLAIN and family.architecture != llava15.ARCHITECTURE:
        raise CheckpointError(f"style must be 'plain' for {family.name}, got {style.value!r}")
    written = {**config, CONFIG_KEY: {"grid": known.grid if grid is None else grid, "style": style.value}}
    require_family(written, model_id)  # checks the grid
    return written


class Student:
    """Model, processor and LoRA. Made by `load`."""

    def __init__(self, model: Any, processor: Any, family: Family, sizes: LoraSizes, device: torch.device) -> None:
        self.model = model  # PEFT's, around transformers'
        self.family = family
        self.device = device
        self.processor = processor
        self.speaker = Speaker(family, processor)
        self._whole = model.get_base_model()
        self._projector_name = PROJECTORS[family.architecture]
        self._dtype = self._whole.get_input_embeddings().weight.dtype
        self._projector_dtype = torch.float32 if sizes.trains_projector else self._dtype
        self._projector.register_forward_pre_hook(lambda _, given: (given[0].to(self._projector_dtype), *given[1:]))
        self._grid_THW: Tensor | None = None  # of a picture's patches, where the class counts positions by it
        self._order_T = self._order_of_features()

    @classmethod
    def load(
        cls,
        folder: Path,
        config: Mapping[str, Any],
        sizes: LoraSizes,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> Student:
        """The model in ``folder`` with fresh LoRA layers.

        Args:
            folder: of a Hugging Face model, see `fetched`.
            config: see `trained_config`.
            sizes: of the LoRA.
            dtype: of what is frozen. What is trained is float32.
            device: where it is computed.
            seed: of the LoRA's first weights.

        Raises:
            CheckpointError: the model cannot be loaded, or its processor is not as its family says.
            RelayModelsError: peft is absent.
        """
        check_peft()
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForImageTextToText, AutoProcessor

        family = require_family(config, str(folder))
        try:
            whole = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
            processor = AutoProcessor.from_pretrained(folder)
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            raise CheckpointError(f"the model in {folder} cannot be loaded: {error}") from error
        projector = PROJECTORS[family.architecture].rsplit(".", 1)[-1]
        lora = LoraConfig(
            r=sizes.rank,
            lora_alpha=sizes.alpha,
            lora_dropout=sizes.dropout,
            target_modules=TARGETS,
            modules_to_save=[projector] if sizes.trains_projector else None,
            bias="none",
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = get_peft_model(whole, lora)
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data = weight.data.float()
        return cls(model.to(device), processor, family, sizes, torch.device(device))

    @property
    def _projector(self) -> nn.Module:
        projector: nn.Module = self._whole.get_submodule(self._projector_name)
        return projector

    # ------------------------------------------------------------ pictures

    @torch.no_grad()
    def features(self, image: Image.Image) -> npt.NDArray[np.float32]:
        """What the projector is given for a picture, upright and RGB: [T, C], as the processor and the tower make it.

        Raises:
            RelayModelsError: a value is not finite, or could not be kept in the cache.
        """
        seen: list[Tensor] = []
        hook = self._projector.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        try:
            self._image_features(image)
        finally:
            hook.remove()
        features_TC = seen[0].float().cpu().reshape(-1, seen[0].shape[-1]).numpy()
        most = float(np.finfo(np.float16).max) * FEATURE_SCALE
        if not np.abs(features_TC).max() < most:
            raise RelayModelsError(
                f"the vision tower of {self.family.name} makes values of a picture that are not below {most:.0f}: "
                "compute them with precision float32"
            )
        return features_TC

    def stored_features(self, image: Image.Image) -> npt.NDArray[np.float16]:
        """`features` as they are cached."""
        return (self.features(image) / np.float32(FEATURE_SCALE)).astype(np.float16)

    def projected(self, stored_TC: npt.NDArray[np.float16]) -> Tensor:
        """The embeddings of a picture's tokens, [T, D], from its cached features."""
        # the array may be a mapped file, which must not be written to
        given_TC = torch.from_numpy(np.array(stored_TC, dtype=np.float32)) * FEATURE_SCALE
        projected = self._projector(given_TC.to(self.device))
        return projected.reshape(-1, projected.shape[-1])[self._order_T]

    def _image_features(self, image: Image.Image) -> Any:
        square = self.family.squash(image)
        kwargs = self.speaker.image_kwargs.get("images_kwargs", {})
        pixels = self.processor.image_processor(images=[square], return_tensors="pt", **kwargs)
        taken = {"pixel_values": pixels["pixel_values"].to(self.device, self._dtype)}
        if "image_grid_thw" in pixels:
            taken["image_grid_thw"] = self._grid_THW = pixels["image_grid_thw"]
        return self._whole.get_image_features(**taken, return_dict=True).pooler_output

    @torch.no_grad()
    def _order_of_features(self) -> Tensor:
        """Which of the projector's outputs is which image token: a tower may put them in an order of its own.

        Found by having the projector say the number of each of its outputs.
        """

        def number(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            count = output.numel() // output.shape[-1]
            numbers = torch.arange(count, dtype=torch.float32, device=output.device)
            return numbers.reshape(*output.shape[:-1], 1).expand(output.shape)

        hook = self._projector.register_forward_hook(number)
        try:
            made = self._image_features(Image.new("RGB", (2, 2)))
        finally:
            hook.remove()
        order_T = torch.cat([*made]).reshape(-1, made[0].shape[-1])[:, 0].long()
        if sorted(order_T.tolist()) != list(range(self.family.num_image_tokens)):
            raise CheckpointError(
                f"the vision tower of {self.family.name} makes {len(order_T)} tokens of a picture, expected each of "
                f"{self.family.num_image_tokens} once"
            )
        return order_T

    # ------------------------------------------------------------ questions

    def positions(self, ids_S: Tensor) -> Tensor:
        """Of the tokens of one question, as the model's class counts them: [S], or [3, S] with M-RoPE."""
        inner = self._whole.model
        if not hasattr(inner, "get_rope_index"):
            return torch.arange(len(ids_S))
        is_image_S = (ids_S == self.speaker.image_token_id).int()
        positions_31S, _ = inner.get_rope_index(ids_S[None], is_image_S[None], image_grid_thw=self._grid_THW)
        return positions_31S[:, 0]

    def logits(self, sequence: PackedQuestions, image_TD: Tensor) -> Tensor:
        """[A, V]: the logits of the tokens that are predicted."""
        ids_1S = sequence.ids_S[None].to(self.device)
        embedded_1SD = self._whole.get_input_embeddings()(ids_1S)
        at_S = torch.nonzero(ids_1S[0] == self.speaker.image_token_id)[:, 0]
        embedded_1SD = embedded_1SD.index_copy(1, at_S, image_TD[None].to(embedded_1SD.dtype))
        positions = sequence.positions.to(self.device)
        made = self.model(
            inputs_embeds=embedded_1SD,
            attention_mask=sequence.mask().to(self.device),
            position_ids=positions[:, None] if positions.ndim == 2 else positions[None],
            logits_to_keep=sequence.source_A.to(self.device),
            use_cache=False,
        )
        logits_AV: Tensor = made.logits[0]
        return logits_AV

    def loss(self, sequence: PackedQuestions, image_TD: Tensor) -> Tensor:
        """The sum over the predicted tokens of minus the logarithm of their probability."""
        logits_AV = self.logits(sequence, image_TD).float()
        return F.cross_entropy(logits_AV, sequence.target_A.to(self.device), reduction="sum")

    # ------------------------------------------------------------ what is trained

    def trained(self) -> dict[str, nn.Parameter]:
        """By name, LoRA and projector."""
        return {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}

    def is_of_projector(self, name: str) -> bool:
        return ".modules_to_save." in name


def fingerprint(folder: Path) -> str:
    """Changes with the config and the weights of the model in ``folder``.

    Of the weights one byte in 256 is read, of every tensor of at least 1 MiB and 4 KiB: gigabytes take seconds, and a
    model that was trained differs in more than that.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb", buffering=0) as weights:
            digest.update(weights.read(_BEGINNING_BYTES))
            for place in range(_BEGINNING_BYTES, size, _PIECE_DISTANCE):
                weights.seek(place)
                digest.update(weights.read(_PIECE_BYTES))
            weights.seek(max(0, size - _PIECE_BYTES))
            digest.update(weights.read(_PIECE_BYTES))
    return digest.hexdigest()[:16]
