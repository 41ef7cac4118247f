"""vLLM's class of relay-seg models: the encoder and the projector of `relay_models.relay_seg`, vLLM's own Llama.

Registered by name in `register`, so that only processes that run such a model import this module.

Promises: a picture is normalised by the function that the model was trained with, and nowhere else; encoder and
projector compute in float32 whatever the language model's type is, because their few parameters cost next to nothing
and half the precision of every image token would; the prompt's one `<image>` becomes as many as the model has cells.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import BatchFeature
from vllm.config import VllmConfig
from vllm.config.multimodal import MultiModalDummyOptions
from vllm.exceptions import VLLMValidationError
from vllm.inputs import MultiModalDataDict
from vllm.model_executor.models.interfaces import MultiModalEmbeddings, SupportsMultiModal
from vllm.model_executor.models.utils import AutoWeightsLoader, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import MultiModalDataItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdate,
)
from vllm.sequence import IntermediateTensors
from vllm.utils.torch_utils import set_default_torch_dtype

from relay_models.relay_seg.configuration import RelaySegConfig
from relay_models.relay_seg.encoder import EfficientNetLite0
from relay_models.relay_seg.modeling import projector_sizes
from relay_models.relay_seg.processing import pixel_values_of
from relay_models.relay_seg.projector import Projector
from relay_models.text4seg.families.relay_seg import IMAGE_TOKEN


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
    """Pictures to pixel values, one placeholder to one token for each cell."""

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
class RelaySegForConditionalGeneration(nn.Module, SupportsMultiModal):  # type: ignore[misc]
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
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights)
