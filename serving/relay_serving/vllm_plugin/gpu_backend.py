"""vLLM's GPU attention backends with shared prefixes read once: plan on the GPU in the builder, run in the layers.

A step is planned from the block tables where they are (`triton_plan`), into buffers that stay where they are, so that
one captured CUDA graph serves whatever the requests share: a graph that holds our kernels finds the plan of its step in
them. Whether a step is ours must therefore not depend on what it shares. It depends on what a graph is chosen by, its
number of rows and of tokens, and on nothing else; steps that are too large for the buffers, or of one row, are vLLM's.

Layers that relay cannot compute, and steps that are not ours, run vLLM's own kernel through `super()`.

One class for each of vLLM's backends, which all keep keys and values of a token side by side, [blocks, K, B, 2 * H].
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.torch_utils import is_quantized_kv_cache
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from relay_kernels.relay_attention.plan import CostModel
from relay_serving.settings import RelaySettings
from relay_serving.vllm_plugin.counters import CounterFile
from relay_serving.vllm_plugin.engine_counters import counters_of
from relay_serving.vllm_plugin.refusals import common_refusal, log_refusal, spec_refusal

if TYPE_CHECKING:
    from relay_kernels.relay_attention.triton_plan import DevicePlanner
    from relay_kernels.relay_attention.triton_relay import LayerFeatures

logger = init_logger("vllm.relay")

MOST_SCRATCH_BYTES = 256 << 20  # of the partial results of one step, for each KV-cache group
KEYS_PER_PIECE = 1024  # so that one long prefix keeps every multiprocessor busy
STEPS_BETWEEN_READINGS = 8
MIN_HEAD_SIZE, MAX_HEAD_SIZE = 16, 256  # as `triton_relay` has them, which imports Triton
SPARE_SEGMENTS = 4096  # of a step beside one for each row
# In keys read for one request, times 128, as the planner counts in whole numbers: tensor cores take 128 rows of queries
# in the time that a key takes to arrive. Not tuned on a GPU.
COSTS = CostModel(key_read=128, row_key=1, segment=64 * 128, merge=4 * 128)


@dataclass(frozen=True)
class GroupShape:
    """What the layers of a KV-cache group have in common.

    Attributes:
        max_rows, max_tokens: of a step, at most.
        num_heads, num_kv_heads, head_size, dtype: of queries and of the keys they meet.
        block_size: keys of a cache block.
    """

    max_rows: int
    max_tokens: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype
    block_size: int


class GpuPlans:
    """The plan of the step at hand, of one KV-cache group: always in the same place.

    What was shared is known on the GPU alone; it is read every `STEPS_BETWEEN_READINGS` steps, without waiting.
    """

    def __init__(self, shape: GroupShape, device: torch.device, counters: CounterFile, *, min_keys: int = 0) -> None:
        from relay_kernels.relay_attention.triton_plan import MAX_ROWS, DevicePlanner
        from relay_kernels.relay_attention.triton_relay import Capacity, TritonWorkspace

        slots = max(1, MOST_SCRATCH_BYTES // (4 * shape.num_heads * (shape.head_size + 1)))
        self.max_tokens = min(shape.max_tokens, max(1, slots // 2))
        self.max_rows = min(shape.max_rows, MAX_ROWS, self.max_tokens)
        workspace = TritonWorkspace(
            Capacity(segments=self.max_rows + SPARE_SEGMENTS, slots=slots, tokens=self.max_tokens),
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_size=shape.head_size,
            dtype=shape.dtype,
            device=device,
        )
        costs = CostModel(COSTS.key_read, COSTS.row_key, COSTS.segment, COSTS.merge, min_keys)
        self.planner: DevicePlanner = DevicePlanner(
            workspace,
            max_rows=self.max_rows,
            block_size=shape.block_size,
            cost_model=costs,
            max_keys_per_segment=KEYS_PER_PIECE,
        )
        self._counters = counters
        self._totals = torch.zeros_like(self.planner.totals, device="cpu", pin_memory=device.type == "cuda")
        self._counted = [0] * len(self._totals)
        self._reading = torch.cuda.Event() if device.type == "cuda" else None
        self._steps = 0

    def fits(self, num_rows: int, num_tokens: int) -> bool:
        """Whether a step is ours: the same for every step that the same graph serves."""
        return 2 <= num_rows <= self.max_rows and num_tokens <= self.max_tokens

    def plan(self, common: CommonAttentionMetadata) -> GpuStep:
        rows = common.num_reqs
        self.planner.plan(
            common.block_table_tensor[:rows], common.query_start_loc[: rows + 1], common.seq_lens[:rows], rows
        )
        self._steps += 1
        if self._steps % STEPS_BETWEEN_READINGS == 0:
            self._read_totals()
        return GpuStep(self, common.block_table_tensor, common.num_actual_tokens)

    def _read_totals(self) -> None:
        """Count what the reading before this one found, if it has arrived, and begin another."""
        if self._reading is None:
            self._totals.copy_(self.planner.totals)
            self._count()
        elif self._reading.query():
            self._count()
            self._totals.copy_(self.planner.totals, non_blocking=True)
            self._reading.record()

    def _count(self) -> None:
        from relay_kernels.relay_attention.triton_plan import TOTALS

        found = self._totals.tolist()
        for name, now, before in zip(TOTALS, found, self._counted, strict=True):
            self._counters.add(name, now - before)
        self._counted = found


@dataclass(frozen=True)
class GpuStep:
    """A step that is planned, and what its layers need beside their own tensors."""

    plans: GpuPlans
    block_table: torch.Tensor
    num_tokens: int

    def run(
        self,
        query_TNH: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        out_TNH: torch.Tensor,
        scale: float,
        features: LayerFeatures,
    ) -> None:
        """Attention of one layer; caches are [blocks, B, K, H] of any strides."""
        from relay_kernels.relay_attention.triton_relay import relay_attention_triton

        relay_attention_triton(
            query_TNH[: self.num_tokens], key_cache, value_cache, self.block_table, self.plans.planner.workspace,
            scale=scale, features=features, out=out_TNH[: self.num_tokens],
        )  # fmt: skip


class RelayGpuBuilder:
    """Plans each step for one KV-cache group; to be put before the builder of a backend of vLLM's."""

    # A plan belongs to the tables of its own group: it must be built for each.
    supports_update_block_table = False

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # type: ignore[call-arg]
        # Steps of a drafter that are not built would run from the plan of another step.
        self.supports_draft_decode_metadata_update = False
        self.plans: GpuPlans | None = None
        self.counters = counters_of(vllm_config)
        layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase, layer_names)
        refusal = group_refusal(kv_cache_spec, vllm_config) or common_refusal(layers.values())
        if refusal:
            log_refusal(refusal)
            return
        shape = _group_shape(kv_cache_spec, list(layers.values()), vllm_config)
        if shape is None:
            log_refusal("kv_cache_spec")
            return
        settings = RelaySettings.from_additional_config(vllm_config.additional_config)
        self.plans = GpuPlans(shape, device, self.counters, min_keys=settings.min_shared_tokens)
        logger.info_once(
            "RelayAttention engaged: steps of 2 to %d requests, up to %d tokens (kernel: triton, planned on the GPU).",
            self.plans.max_rows,
            self.plans.max_tokens,
        )

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Any:
        """vLLM's metadata, with this step's plan as its attribute ``relay`` where the step is ours."""
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)  # type: ignore[misc]
        self.counters.add("steps")
        begin = time.perf_counter_ns()
        metadata.relay = self._plan(common_attn_metadata)
        self.counters.add("planning_ns", time.perf_counter_ns() - begin)
        return metadata

    def _plan(self, common: CommonAttentionMetadata) -> GpuStep | None:
        if self.plans is None or not self.plans.fits(common.num_reqs, common.num_actual_tokens):
            return None
        if common.causal is not True:  # too late to leave it to vLLM: a graph may hold our kernel already
            raise ValueError(
                f"a step has causal {common.causal!r}, which relay's GPU kernels cannot serve: start with "
                "--relay-gpu-kernel off"
            )
        return self.plans.plan(common)


class RelayGpuImpl:
    """One layer: relays where the step is planned and the layer's features allow it; before vLLM's own class."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.refusal = layer_refusal(self)
        self._features: LayerFeatures | None = None
        if self.refusal:
            log_refusal(self.refusal)
        else:
            self.supports_quant_query_input = False  # our kernels multiply queries as they are

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See the base class. Shapes: query, output [T, N, H]; kv_cache [blocks, K, B, 2 * H]."""
        step: GpuStep | None = getattr(attn_metadata, "relay", None)
        if step is None or self.refusal or output_scale is not None or output_block_scale is not None:
            result: torch.Tensor = super().forward(  # type: ignore[misc]
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
            return result
        key_cache, value_cache = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)  # type: ignore[attr-defined]
        if is_quantized_kv_cache(self.kv_cache_dtype):  # type: ignore[attr-defined]
            key_cache, value_cache = (cache.view(self.fp8_dtype) for cache in (key_cache, value_cache))  # type: ignore[attr-defined]
        step.run(query, key_cache, value_cache, output, self.scale, self._features_of(layer))  # type: ignore[attr-defined]
        return output

    def _features_of(self, layer: Any) -> LayerFeatures:
        """Read once, in the first step, when weights are loaded."""
        if self._features is None:
            from relay_kernels.relay_attention.triton_relay import LayerFeatures

            window = self.sliding_window[0]  # type: ignore[attr-defined]  # keys before a token's own; -1 for all
            sinks = getattr(self, "sinks", None)
            is_quantized = is_quantized_kv_cache(self.kv_cache_dtype)  # type: ignore[attr-defined]
            self._features = LayerFeatures(
                window=None if window < 0 else window + 1,
                soft_cap=float(self.logits_soft_cap or 0.0),  # type: ignore[attr-defined]
                sinks_N=None if sinks is None else sinks.float().contiguous(),
                key_scale=layer._k_scale_float if is_quantized else 1.0,
                value_scale=layer._v_scale_float if is_quantized else 1.0,
            )
        return self._features


class RelayTritonBuilder(RelayGpuBuilder, TritonAttentionMetadataBuilder):
    """TRITON_ATTN's."""


class RelayTritonImpl(RelayGpuImpl, TritonAttentionImpl):
    """TRITON_ATTN's."""


class RelayTritonBackend(TritonAttentionBackend):
    """TRITON_ATTN with RelayAttention. Requests influence each other's rounding, so it is not batch invariant."""

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return False

    @staticmethod
    def get_impl_cls() -> type[RelayTritonImpl]:
        return RelayTritonImpl

    @staticmethod
    def get_builder_cls() -> type[RelayTritonBuilder]:
        return RelayTritonBuilder


def group_refusal(kv_cache_spec: AttentionSpec, vllm_config: VllmConfig) -> str | None:
    """Why no layer of a KV-cache group can be relayed on a GPU, as one of FALLBACK_REASONS; None where they can."""
    model = vllm_config.model_config
    if refusal := spec_refusal(kv_cache_spec, vllm_config, takes_windows=True):
        return refusal
    if model.is_mm_prefix_lm or model.rswa_window is not None:
        return "non_causal"
    if not vllm_config.cache_config.enable_prefix_caching:
        return "no_prefix_caching"  # nothing is ever shared, and our kernel would have to serve every step
    return None


def layer_refusal(impl: Any) -> str | None:
    """Why one layer cannot be relayed on a GPU, as one of FALLBACK_REASONS; None where it can."""
    if impl.alibi_slopes is not None:
        return "alibi"
    if impl.attn_type != AttentionType.DECODER:
        return "attention_type"
    if impl.kv_cache_dtype != "auto" and impl.kv_cache_dtype not in _fp8_names(impl):
        return "kv_cache_dtype"
    if not MIN_HEAD_SIZE <= impl.head_size <= MAX_HEAD_SIZE:
        return "head_size"
    if getattr(impl, "chunk_lookback", -1) != -1:
        return "chunked_local"
    if not impl.scale > 0:
        return "scale"
    return None


def _fp8_names(impl: Any) -> tuple[str, ...]:
    """The 8-bit caches that our kernel reads: those of a backend whose own kernel takes queries that are not 8 bits,
    because layers and steps that are not ours go to it."""
    return ("fp8", "fp8_e4m3") if isinstance(impl, TritonAttentionImpl) else ()


def _group_shape(kv_cache_spec: AttentionSpec, layers: list[Any], vllm_config: VllmConfig) -> GroupShape | None:
    """None where layers of the group differ in it."""
    impls = [layer.impl for layer in layers if not layer.impl.refusal]
    heads = {(impl.num_heads, impl.num_kv_heads, impl.head_size) for impl in impls}
    if len(heads) > 1:
        return None
    num_heads, num_kv_heads, head_size = heads.pop()
    scheduler = vllm_config.scheduler_config
    return GroupShape(
        max_rows=scheduler.max_num_seqs,
        max_tokens=scheduler.max_num_batched_tokens,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        dtype=vllm_config.model_config.dtype,
        block_size=kv_cache_spec.block_size,
    )
