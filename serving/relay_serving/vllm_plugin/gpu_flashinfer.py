"""FLASHINFER with RelayAttention; imports flashinfer, which vLLM brings for CUDA."""

from __future__ import annotations

from vllm.v1.attention.backends.flashinfer import FlashInferBackend, FlashInferImpl, FlashInferMetadataBuilder

from relay_serving.vllm_plugin.gpu_backend import RelayGpuBuilder, RelayGpuImpl


class RelayFlashInferBuilder(RelayGpuBuilder, FlashInferMetadataBuilder):
    """FLASHINFER's."""


class RelayFlashInferImpl(RelayGpuImpl, FlashInferImpl):
    """FLASHINFER's."""


class RelayFlashInferBackend(FlashInferBackend):
    """Requests influence each other's rounding, so it is not batch invariant."""

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return False

    @staticmethod
    def get_impl_cls() -> type[RelayFlashInferImpl]:
        return RelayFlashInferImpl

    @staticmethod
    def get_builder_cls() -> type[RelayFlashInferBuilder]:
        return RelayFlashInferBuilder
