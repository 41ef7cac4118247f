"""FLASH_ATTN with RelayAttention; imports what vLLM brings for CUDA."""

from __future__ import annotations

from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from relay_serving.vllm_plugin.gpu_backend import RelayGpuBuilder, RelayGpuImpl


class RelayFlashBuilder(RelayGpuBuilder, FlashAttentionMetadataBuilder):
    """FLASH_ATTN's."""


class RelayFlashImpl(RelayGpuImpl, FlashAttentionImpl):
    """FLASH_ATTN's."""


class RelayFlashBackend(FlashAttentionBackend):
    """Requests influence each other's rounding, so it is not batch invariant."""

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return False

    @staticmethod
    def get_impl_cls() -> type[RelayFlashImpl]:
        return RelayFlashImpl

    @staticmethod
    def get_builder_cls() -> type[RelayFlashBuilder]:
        return RelayFlashBuilder
