"""relay-seg-tiny as a Hugging Face module: encoder, projector, and a LlamaForCausalLM with LoRA that acts on pictures.

Legend: N pictures or sequences, S tokens of a sequence, D the language model's width, C channels, G cells a side.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.generation import GenerationMixin

from relay_models.relay_seg.activated_lora import Activation, add_lora, follows_picture, keep
from relay_models.relay_seg.configuration import RelaySegConfig
from relay_models.relay_seg.encoder import EfficientNetLite0
from relay_models.relay_seg.projector import Projector, ProjectorSizes


def projector_sizes(config: RelaySegConfig) -> ProjectorSizes:
    """The part of the config that is about the projector."""
    return ProjectorSizes(
        channels=config.feature_channels,
        grid=config.grid,
        width=config.projector_width,
        num_layers=config.projector_layers,
        num_heads=config.projector_heads,
        num_classes=config.projector_classes,
        present_above=config.projector_present_above,
        named_above=config.projector_named_above,
        out_width=config.text_config.hidden_size,
    )


class RelaySegForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Pictures and text in, text out. A picture takes ``config.num_image_tokens`` placeholders in ``input_ids``."""

    config_class = RelaySegConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _tied_weights_keys = {"language_model.lm_head.weight": "language_model.model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: RelaySegConfig) -> None:
        super().__init__(config)
        self.encoder = EfficientNetLite0()
        self.projector = Projector(projector_sizes(config))
        self.language_model = LlamaForCausalLM(config.text_config)
        self._activation: Activation | None = None
        if config.lora_rank:
            self._activation = add_lora(self.language_model.model.layers, config.lora_rank, config.lora_alpha)
        self.post_init()

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.language_model.get_output_embeddings()

    def image_tokens(self, pixel_values: Tensor | None = None, features: Tensor | None = None) -> Tensor:
        """Tokens [N, G * G, D] of normalised pictures [N, 3, side, side], or of their features."""
        if features is None:
            if pixel_values is None:
                raise ValueError("image_tokens needs pixel_values or features, got neither")
            features = self.encoder(pixel_values.to(self.encoder._conv_stem.weight.dtype))
        return self.projector(features.to(self.projector.enter.weight.dtype))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        features: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `LlamaForCausalLM.forward`; pictures as of `image_tokens`, all of them in the order of their placeholders.

        Where pictures are is read from ``input_ids``: the LoRA is at rest in a pass that has ``inputs_embeds`` alone.

        Raises ValueError where ``input_ids`` holds another number of placeholders than the pictures have tokens.
        """
        follows_NS = None
        if self._activation is not None:
            if input_ids is not None:
                shows = pixel_values is not None or features is not None
                is_image_NS = (input_ids == self.config.image_token_id) & shows
                follows_NS = follows_picture(is_image_NS, past_key_values)
            self._activation.follows_NS1 = None if follows_NS is None else follows_NS[..., None].to(self.dtype)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
            if pixel_values is not None or features is not None:
                tokens = self.image_tokens(pixel_values, features)
                is_image = input_ids == self.config.image_token_id
                if int(is_image.sum()) != tokens.shape[0] * tokens.shape[1]:
                    raise ValueError(
                        f"input_ids holds {int(is_image.sum())} placeholders, the pictures make "
                        f"{tokens.shape[0] * tokens.shape[1]} tokens"
                    )
                inputs_embeds = inputs_embeds.masked_scatter(is_image.unsqueeze(-1), tokens.to(inputs_embeds.dtype))
        output = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            **kwargs,
        )
        if follows_NS is not None:
            keep(getattr(output, "past_key_values", None), follows_NS)
        return output

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        features: Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The pictures are read once, with the prompt, or each time where nothing is kept."""
        inputs = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        reads = is_first_iteration or not kwargs.get("use_cache", True)
        inputs.update(pixel_values=pixel_values if reads else None, features=features if reads else None)
        return inputs
