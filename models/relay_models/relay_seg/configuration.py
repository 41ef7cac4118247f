"""The config of relay-seg-tiny, as ``config.json`` holds it."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, LlamaConfig, PreTrainedConfig

IMAGE_TOKEN_ID = 16  # of SmolLM2's special tokens the last, which its training of chats did not use: <empty_output>


class RelaySegConfig(PreTrainedConfig):
    """Sizes of the language model, the projector and the grid.

    Attributes:
        text_config: of the language model, a LlamaConfig.
        image_side: pixels a side a picture is squashed to.
        grid: cells a side; a picture is ``grid ** 2`` tokens.
        image_token_id: the token that stands for each of them.
        lora_rank, lora_alpha: of the change to the language model, see `activated_lora`; a rank of 0 for none.
        projector_width, projector_layers, projector_heads, projector_classes: see `ProjectorSizes`.
        projector_present_above, projector_named_above: see `ProjectorSizes`; the defaults are those of older weights,
            whose files do not say.
        feature_channels: of the encoder's features, a cell.
        text4seg: what serving has to know of the training, see `relay_models.text4seg.profiles`.
    """

    model_type = "relay_seg"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        text_config: LlamaConfig | dict[str, Any] | None = None,
        image_side: int = 512,
        grid: int = 16,
        image_token_id: int = IMAGE_TOKEN_ID,
        feature_channels: int = 1728,
        projector_width: int = 256,
        projector_layers: int = 3,
        projector_heads: int = 4,
        projector_classes: int = 80,
        projector_present_above: float = 0.03,
        projector_named_above: float = 0.1,
        lora_rank: int = 0,
        lora_alpha: float = 0.0,
        text4seg: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        given = LlamaConfig(**text_config) if isinstance(text_config, dict) else text_config
        self.text_config: LlamaConfig = given if given is not None else LlamaConfig()
        self.image_side = image_side
        self.grid = grid
        self.image_token_id = image_token_id
        self.feature_channels = feature_channels
        self.projector_width = projector_width
        self.projector_layers = projector_layers
        self.projector_heads = projector_heads
        self.projector_classes = projector_classes
        self.projector_present_above = projector_present_above
        self.projector_named_above = projector_named_above
        self.lora_rank = lora_rank
        self.lora_alpha = lora_alpha
        self.text4seg = text4seg if text4seg is not None else {"grid": grid}
        kwargs.setdefault("tie_word_embeddings", self.text_config.tie_word_embeddings)
        super().__init__(**kwargs)

    @property
    def num_image_tokens(self) -> int:
        return int(self.grid**2)

    @property
    def mrope_section(self) -> tuple[int, ...] | None:
        """What vLLM knows models by that choose the positions of their tokens, as its class of this one does."""
        return (1, 1, 1) if self.lora_rank else None
