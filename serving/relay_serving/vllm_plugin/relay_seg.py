"""vLLM's class of relay-seg models: the encoder and the projector of `relay_models.relay_seg`, vLLM's own Llama.

Registered by name in `register`, so that only processes that run such a model import this module.

The LoRA acts on pictures and what follows them (`relay_models.relay_seg.activated_lora`). Which tokens these are is
said by their positions, which vLLM asks the model for (M-RoPE), keeps for each request and gives back in each step:
those of a picture and of what follows are counted from `FOLLOWS_PICTURE`, and brought back before they are used.

Promises: a picture is normalised by the function that the model was trained with, and nowhere else; encoder and
projector compute in float32 whatever the language model's type is, because their few parameters cost next to nothing
and half the precision of every image token would; the prompt's one `<image>` becomes as many as the model has cells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import BatchFeature
from vllm.config import VllmConfig
from vllm.config.multimodal import MultiModalDummyOptions
from vllm.exceptions import VLLMValidationError
from vllm.inputs import MultiModalDataDict
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.models.interfaces import MultiModalEmbeddings, SupportsMRoPE, SupportsMultiModal
from vllm.model_executor.models.utils import AutoWeightsLoader, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFeatureSpec, MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import MultiModalDataItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdate,
)
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors
from vllm.utils.torch_utils import set_default_torch_dtype

from relay_models.relay_seg.configuration import RelaySegConfig
from relay_models.relay_seg.encoder import EfficientNetLite0
from relay_models.relay_seg.modeling import projector_sizes
from relay_models.relay_seg.processing import pixel_values_of
from relay_models.relay_seg.projector import Projector
from relay_models.text4seg.families.relay_seg import IMAGE_TOKEN

FOLLOWS_PICTURE = 1 << 30  # vLLM adds to it in 32 bits
# vLLM's matrices that hold several of ours, in their order.
_PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_LORA_A, _LORA_B = ".lora_A.weight", ".lora_B.weight"


class RelaySegProcessingInfo(BaseProcessingInfo):  # type: ignore[misc]
    """What vLLM has to know of a picture before it runs: how many tokens it takes."""

    def get_hf_config(self) -> RelaySegConfig:
        return self.ctx.get_hf_config(RelaySegConfig)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def get_supported_mm_processor_kwargs(self) -> dict[str, set[str]]:
        return {}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {"image": self.get_hf_config().num_image_tokens}


class RelaySegDummyInputs(BaseDummyInputsBuilder[RelaySegProcessingInfo]):  # type: ignore[misc]
    """A picture for the profiling run."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return IMAGE_TOKEN * mm_counts.get("image", 0)

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: MultiModalDummyOptions
    ) -> MultiModalDataDict:
        side = self.info.get_hf_config().image_side
        return {
            "image": self._get_dummy_images(
                width=side, height=side, num_images=mm_counts.get("image", 0), overrides=mm_options.get("image")
            )
        }


class RelaySegProcessor(BaseMultiModalProcessor[RelaySegProcessingInfo]):  # type: ignore[misc]
    """Pictures to pixel values, one placeholder to as many tokens as the grid has cells."""

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        """Raises VLLMValidationError for options: there is one way to see a picture, the one of training."""
        options = self.info.ctx.get_merged_mm_kwargs(hf_kwargs)
        if options:
            raise VLLMValidationError(
                f"this model's pictures have no options, got {dict(options)!r}", parameter="mm_processor_kwargs"
            )
        return BatchFeature({"pixel_values": pixel_values_of(hf_data["images"], self.info.get_hf_config().image_side)})

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {"pixel_values": MultiModalFieldConfig.batched("image")}

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        config = self.info.get_hf_config()
        tokens = [config.image_token_id] * config.num_image_tokens
        return [PromptReplacement(modality="image", target=[config.image_token_id], replacement=tokens)]


@MULTIMODAL_REGISTRY.register_processor(
    RelaySegProcessor, info=RelaySegProcessingInfo, dummy_inputs=RelaySegDummyInputs
)
class RelaySegForConditionalGeneration(nn.Module, SupportsMultiModal, SupportsMRoPE):  # type: ignore[misc]
    """The same weights, by the same names, as the Hugging Face module of `relay_models.relay_seg.modeling`."""

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        if modality.startswith("image"):
            return IMAGE_TOKEN
        raise ValueError(f"modality must be image, got {modality!r}")

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: RelaySegConfig = vllm_config.model_config.hf_config
        text_config: Any = config.text_config
        self.config = config
        self.configure_mm_token_handling(vocab_size=text_config.vocab_size, mm_token_ids=[config.image_token_id])
        with self._mark_tower_model(vllm_config, "image"), set_default_torch_dtype(torch.float32):
            self.encoder = EfficientNetLite0()
            self.projector = Projector(projector_sizes(config))
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=text_config,
                prefix=maybe_prefix(prefix, "language_model"),
                architectures=["LlamaForCausalLM"],
            )
        self.follows_T1: torch.Tensor | None = None
        if config.lora_rank:
            if vllm_config.quant_config is not None:
                method = vllm_config.quant_config.get_name()
                raise VLLMValidationError(f"relay-seg cannot be quantised, got {method}", parameter="quantization")
            most_tokens = vllm_config.scheduler_config.max_num_batched_tokens
            # Both are read by compiled and captured code, so they stay where they are.
            self.positions_T = torch.zeros(most_tokens, dtype=torch.long)
            self.follows_T1 = torch.zeros(most_tokens, 1, dtype=vllm_config.model_config.dtype)
            _add_lora(self.language_model.model.layers, config.lora_rank, self.follows_T1)
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def embed_multimodal(self, **kwargs: object) -> MultiModalEmbeddings:
        """[N, 256, D] the image tokens of N pictures, in the language model's type."""
        pixels_N3HW = kwargs.get("pixel_values")
        if pixels_N3HW is None:
            return []
        assert isinstance(pixels_N3HW, torch.Tensor)
        tokens_NTD = self.projector(self.encoder(pixels_N3HW.float()))
        return tokens_NTD.to(self.language_model.model.embed_tokens.weight.dtype)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: object,
    ) -> torch.Tensor | IntermediateTensors:
        if self.follows_T1 is not None:
            follows_T = positions[0] >= FOLLOWS_PICTURE
            self.follows_T1[: len(follows_T), 0] = follows_T
            positions = torch.sub(positions[0], FOLLOWS_PICTURE * follows_T, out=self.positions_T[: len(follows_T)])
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.language_model.compute_logits(hidden_states)

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[MultiModalFeatureSpec]
    ) -> tuple[torch.Tensor, int]:
        """[3, S] three times the positions of a prompt, and what is added to those of its answer, see the module."""
        pictures = [feature.mm_position.offset for feature in mm_features if feature.modality == "image"]
        positions_S = torch.arange(len(input_tokens))
        positions_S[min(pictures, default=len(input_tokens)) :] += FOLLOWS_PICTURE
        return positions_S.expand(3, -1), FOLLOWS_PICTURE * bool(pictures)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        halves: dict[str, torch.Tensor] = {}

        def others() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in weights:
                if name.endswith((_LORA_A, _LORA_B)):
                    halves[name] = tensor
                else:
                    yield name, tensor

        loaded: set[str] = AutoWeightsLoader(self).load_weights(others())
        return loaded | _load_lora(self, halves, self.config.lora_alpha)


class _WithLora(LinearMethodBase):  # type: ignore[misc]
    """What another method computes, and the change of activated LoRA where ``lora_follows_T1`` of the layer is 1."""

    def __init__(self, method: Any) -> None:
        self._method = method

    def create_weights(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("the layer had its weights before")

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self._method.process_weights_after_loading(layer)
        if current_platform.is_cpu():
            for half in (layer.lora_down, layer.lora_up):
                dispatch_cpu_unquantized_gemm(half, remove_weight=True)

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        y = self._method.apply(layer, x, bias)
        return y + layer.lora_up(layer.lora_down(x) * layer.lora_follows_T1[: x.shape[0]])


class _Half(nn.Module):
    """x @ weight.T, by vLLM's own kernel where that is on a CPU: PyTorch's takes several times as long there."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, columns, dtype=dtype), requires_grad=False)
        self.cpu_linear: Callable[..., torch.Tensor] = F.linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.cpu_linear(x, self.weight, None)


def _add_lora(layers: nn.Module, rank: int, follows_T1: torch.Tensor) -> None:
    """Give each linear layer room for its halves: those of a layer that is several matrices stand below one another."""
    for name, layer in list(layers.named_modules()):
        if not isinstance(layer, LinearBase):
            continue
        if layer.tp_size != 1:
            raise VLLMValidationError(f"relay-seg runs on one device, got a tensor parallel size of {layer.tp_size}")
        num_parts = len(_PACKED.get(name.rpartition(".")[2], (name,)))
        dtype = follows_T1.dtype
        layer.lora_down = _Half(num_parts * rank, layer.input_size, dtype)
        layer.lora_up = _Half(layer.output_size, num_parts * rank, dtype)
        layer.register_buffer("lora_follows_T1", follows_T1, persistent=False)
        layer.quant_method = _WithLora(layer.quant_method)


def _load_lora(model: nn.Module, halves: Mapping[str, torch.Tensor], alpha: float) -> set[str]:
    """Copy the halves to where they belong, alpha / rank taken into the second. Returns the names of what is filled."""
    filled: set[str] = set()
    for module, layer in model.language_model.model.layers.named_modules():
        if not hasattr(layer, "lora_down"):
            continue
        parent, _, child = f"language_model.model.layers.{module}".rpartition(".")
        row, column = 0, 0
        for part in _PACKED.get(child, (child,)):
            down, up = halves[f"{parent}.{part}{_LORA_A}"], halves[f"{parent}.{part}{_LORA_B}"]
            layer.lora_down.weight.data[column : column + len(down)] = down
            layer.lora_up.weight.data[row : row + len(up), column : column + len(down)] = alpha / len(down) * up.float()
            row, column = row + len(up), column + len(down)
        filled |= {f"{parent}.{child}.lora_down.weight", f"{parent}.{child}.lora_up.weight"}
    return filled
