"""vLLM's CPU attention with shared prefixes read once: plan in the metadata builder, run in the layers.

Every step, `RelayCPUMetadataBuilder` plans from the batch's block tables which requests read which cached keys
together. Layers whose features relay covers run that plan; every other layer, and every step that shares nothing, runs
vLLM's own kernel through `super()`. What a layer or a model cannot relay is decided once, counted by reason, and
named once in the log.

The cache is vLLM's own, in vLLM's layout. Only `--relay-cpu-kernel triton` (the Triton kernels under the interpreter,
for tests) writes an unpacked one, which vLLM's kernel could not read: there, relay runs every step.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.config import VllmConfig, get_current_vllm_config, get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.torch_utils import is_quantized_kv_cache
from vllm.v1.attention.backend import AttentionLayer, AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from relay_kernels.relay_attention import cpu_build
from relay_kernels.relay_attention.api import CacheLayout, Implementation, relay_attention
from relay_kernels.relay_attention.cpu import CpuRun, supports
from relay_kernels.relay_attention.plan import CostModel, RelayPlan, can_share, make_plan
from relay_kernels.relay_attention.work_list import make_work_list
from relay_serving.settings import CpuKernel, RelaySettings
from relay_serving.vllm_plugin.counters import CounterFile
from relay_serving.vllm_plugin.engine_counters import counters_of
from relay_serving.vllm_plugin.refusals import common_refusal, log_refusal, spec_refusal

logger = init_logger("vllm.relay")

MOST_SCRATCH_BYTES = 256 << 20  # of partial results in one step; a step that needs more is vLLM's
SUPPORTED_LAYOUTS = ("amx", "vec", "vec16")


class RelayCPUBackend(CPUAttentionBackend):
    """CPU_ATTN with RelayAttention. Requests influence each other's rounding, so it is not batch invariant."""

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return False

    @staticmethod
    def get_impl_cls() -> type[RelayCPUImpl]:
        return RelayCPUImpl

    @staticmethod
    def get_builder_cls() -> type[RelayCPUMetadataBuilder]:
        return RelayCPUMetadataBuilder


class RelayStep:
    """One step's plan for one KV-cache group, lowered once and run by each layer.

    Refers to the step's block table, which vLLM overwrites for the next step; nothing of it is kept beyond that.
    """

    def __init__(
        self,
        plan: RelayPlan,
        block_table: torch.Tensor,
        query_start: npt.NDArray[np.int32],
        kernel: str,
        counters: CounterFile,
    ) -> None:
        self.plan = plan
        self.counters = counters
        self._block_table = block_table
        self._kernel = kernel
        self._work_list = make_work_list(plan, query_start, max_keys_per_segment=_max_keys_per_segment())
        self._cpu_runs: dict[tuple[int, ...], CpuRun] = {}

    @property
    def num_tokens(self) -> int:
        return self._work_list.num_tokens

    def scratch_bytes(self, num_heads: int, head_size: int) -> int:
        """What the partial results of one layer take, in float32."""
        return 4 * self._work_list.num_slots * num_heads * (head_size + 1)

    def run(
        self,
        query_TND: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        out_TND: torch.Tensor,
        scale: float,
        layout: str,
    ) -> None:
        """Attention of one layer. Caches are [blocks, K, B, D] as `split_cache` gives them."""
        if self._kernel == "cpp":
            run = self._cpu_run(query_TND, key_cache, layout)
            run(query_TND, key_cache, value_cache, scale=scale, out_TND=out_TND)
        elif self._kernel == "torch":
            relay_attention(
                query_TND, key_cache, value_cache, self._block_table, self._work_list,
                scale=scale, out=out_TND, implementation=Implementation.CPU_TORCH, layout=CacheLayout(layout),
            )  # fmt: skip
        else:
            relay_attention(
                query_TND, key_cache.permute(0, 2, 1, 3), value_cache.permute(0, 2, 1, 3), self._block_table,
                self._work_list, scale=scale, out=out_TND, implementation=Implementation.TRITON,
            )  # fmt: skip
        if self.plan.is_shared:
            self.counters.add("layer_calls")
            token_bytes = 2 * key_cache.shape[1] * key_cache.shape[3] * key_cache.element_size()
            self.counters.add("bytes_saved", self.plan.kv_tokens_saved * token_bytes)

    def _cpu_run(self, query_TND: torch.Tensor, key_cache: torch.Tensor, layout: str) -> CpuRun:
        _, num_heads, head_size = query_TND.shape
        _, num_kv_heads, block_size, _ = key_cache.shape
        assert block_size == self.plan.block_size, "the plan and the cache disagree on the block size"
        shape = (num_heads, num_kv_heads, head_size, block_size)
        if shape not in self._cpu_runs:
            self._cpu_runs[shape] = CpuRun(
                self._work_list,
                self._block_table,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_size=head_size,
                block_size=block_size,
                dtype=query_TND.dtype,
                layout=layout,
            )
        return self._cpu_runs[shape]


@dataclass
class RelayCPUMetadata(CPUAttentionMetadata):
    """vLLM's metadata of a step that relay runs, and that step."""

    relay: RelayStep = field(kw_only=True)


class RelayCPUMetadataBuilder(CPUAttentionMetadataBuilder):
    """Plans each step for one KV-cache group."""

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.settings = RelaySettings.from_additional_config(vllm_config.additional_config)
        self.counters = counters_of(vllm_config)
        self.refusal = group_refusal(kv_cache_spec, vllm_config, self.isa) or common_refusal(
            get_layers_from_vllm_config(vllm_config, AttentionLayerBase, layer_names).values()
        )
        self.kernel = self.settings.cpu_kernel
        if self.kernel in (CpuKernel.AUTO, CpuKernel.CPP):
            self.refusal = self.refusal or _compiled_kernel_refusal(self.isa, self.kernel == CpuKernel.CPP)
            self.kernel = CpuKernel.CPP
        self._cost_model = CostModel(min_keys=self.settings.min_shared_tokens)
        self._has_engaged = False
        if self.refusal:
            log_refusal(self.refusal)
            if self.kernel == "triton":
                raise ValueError(f"relay cpu kernel 'triton' cannot serve layers of this model: {self.refusal}")
        elif not vllm_config.cache_config.enable_prefix_caching:
            logger.info_once("RelayAttention: prefix caching is off, so no two requests share a block.")

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CPUAttentionMetadata:
        """vLLM's metadata, which layers that are not relayed need, and this step's plan where it has one."""
        stock = super().build(common_prefix_len, common_attn_metadata, fast_build)
        begin = time.perf_counter_ns()
        relay = self._plan(common_attn_metadata)
        self.counters.add("planning_ns", time.perf_counter_ns() - begin)
        if relay is None:
            return stock
        return RelayCPUMetadata(**{f.name: getattr(stock, f.name) for f in fields(CPUAttentionMetadata)}, relay=relay)

    def _plan(self, common: CommonAttentionMetadata) -> RelayStep | None:
        self.counters.add("steps")
        runs_anyway = self.kernel == "triton"  # vLLM's kernel could not read the unpacked cache
        if common.num_reqs < 2 and not runs_anyway:
            return None
        # vLLM's "device" tensors live on the host here, and seq_lens is exact, not the optimistic bound.
        block_table = common.block_table_tensor[: common.num_reqs]
        query_start = common.query_start_loc[: common.num_reqs + 1].numpy()
        query_lens = query_start[1:] - query_start[:-1]
        seq_lens = common.seq_lens[: common.num_reqs].numpy()
        is_eligible = can_share(block_table.numpy(), query_lens, seq_lens, block_size=self.block_size)
        if is_eligible:
            self.counters.add("eligible_steps")
        elif not runs_anyway:
            return None
        refusal = self.refusal or step_refusal(common)
        if refusal and runs_anyway:
            raise ValueError(f"relay cpu kernel 'triton' cannot serve a step of this model: {refusal}")
        if refusal:
            self.counters.add(f"fallback_{refusal}")
            return None
        plan = make_plan(
            block_table.numpy(), query_lens, seq_lens, block_size=self.block_size, cost_model=self._cost_model
        )
        if not plan.is_shared and not runs_anyway:
            self.counters.add("fallback_cost_model")
            return None
        step = RelayStep(plan, block_table, query_start, self.kernel, self.counters)
        if step.scratch_bytes(self.num_heads, self.head_dim) > MOST_SCRATCH_BYTES and not runs_anyway:
            self.counters.add("fallback_scratch_memory")
            return None
        if plan.is_shared:
            self._count(plan)
        return step

    def _count(self, plan: RelayPlan) -> None:
        self.counters.add("relay_steps")
        self.counters.add("grouped_requests", plan.grouped_requests)
        self.counters.add("groups", plan.num_groups)
        self.counters.add("kv_tokens_saved", plan.kv_tokens_saved)
        if self.settings.log_plan:
            logger.info("%s", plan)
        if not self._has_engaged:
            self._has_engaged = True
            logger.info_once(
                "RelayAttention engaged: %d requests in %d group(s) share cached keys; %d token reads saved in this "
                "step (kernel: %s).",
                plan.grouped_requests,
                plan.num_groups,
                plan.kv_tokens_saved,
                self.kernel,
            )


class RelayCPUImpl(CPUAttentionBackendImpl):
    """One layer: relays where the step has a plan and the layer's features allow it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = RelaySettings.from_additional_config(get_current_vllm_config().additional_config)
        self.refusal = layer_refusal(self)
        self._owns_cache = settings.cpu_kernel == "triton"
        if self.refusal:
            log_refusal(self.refusal)
            if self._owns_cache:
                raise ValueError(f"relay cpu kernel 'triton' cannot serve a layer of this model: {self.refusal}")

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See the base class. Shapes: query, output [T, H, D]; kv_cache [blocks, K, B, 2 * D]."""
        step = attn_metadata.relay if isinstance(attn_metadata, RelayCPUMetadata) else None
        if step is not None and self.refusal:
            step.counters.add(f"fallback_{self.refusal}")
        if step is None or self.refusal or output_scale is not None or output_block_scale is not None:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        num_tokens = step.num_tokens
        key_cache, value_cache = split_cache(kv_cache)
        step.run(query[:num_tokens], key_cache, value_cache, output[:num_tokens], self.scale, layer.isa)  # type: ignore[attr-defined]
        return output

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write this step's keys and values [T, K, D]; unpacked where the Triton kernels will read them."""
        if not self._owns_cache:
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
            return
        key_cache, value_cache = split_cache(kv_cache)
        is_real = slot_mapping >= 0
        slots = slot_mapping[is_real]
        block, offset = slots // key_cache.shape[2], slots % key_cache.shape[2]
        key_cache[block, :, offset] = key[: len(is_real)][is_real]
        value_cache[block, :, offset] = value[: len(is_real)][is_real]


def split_cache(kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of vLLM's CPU cache, [blocks, K, B, 2 * D], as two views [blocks, K, B, D] of packed runs."""
    num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
    key_cache, value_cache = kv_cache.view(num_blocks, num_kv_heads, 2 * block_size, -1).chunk(2, dim=2)
    return key_cache, value_cache


def group_refusal(kv_cache_spec: AttentionSpec, vllm_config: VllmConfig, isa: str) -> str | None:
    """Why no layer of a KV-cache group can be relayed, as one of FALLBACK_REASONS; None where they can."""
    if refusal := spec_refusal(kv_cache_spec, vllm_config, takes_windows=False):
        return refusal
    if is_quantized_kv_cache(vllm_config.cache_config.cache_dtype):
        return "kv_cache_dtype"
    if isa not in SUPPORTED_LAYOUTS:
        return "cpu_architecture"
    return None


def layer_refusal(impl: CPUAttentionBackendImpl) -> str | None:
    """Why one layer cannot be relayed, as one of FALLBACK_REASONS; None where it can."""
    if impl.sliding_window != -1:
        return "sliding_window"
    if impl.alibi_slopes is not None:
        return "alibi"
    if impl.logits_soft_cap != 0:
        return "soft_cap"
    if impl.sinks is not None:
        return "sinks"
    if impl.attn_type != AttentionType.DECODER:
        return "attention_type"
    if impl.is_fp8_kv_cache:
        return "kv_cache_dtype"
    if not impl.scale > 0:
        return "scale"
    return None


def step_refusal(common: CommonAttentionMetadata) -> str | None:
    """Why one step cannot be relayed, as one of FALLBACK_REASONS; None where it can."""
    if common.causal is not True or common.mm_req_doc_ranges is not None or common.rswa_prefix_lens is not None:
        return "non_causal"
    return None


@cache
def _compiled_kernel_refusal(isa: str, must_be_had: bool) -> str | None:
    """ "no_compiler" where the compiled kernel cannot be had: vLLM's own beats a plain torch one by far.

    Raises:
        KernelUnavailableError: it cannot be had, and was asked for by name.
    """
    try:
        if not supports(isa):
            raise cpu_build.KernelUnavailableError(f"the compiled kernel does not read the cache layout {isa!r} here")
    except cpu_build.KernelUnavailableError as error:
        if must_be_had:
            raise
        logger.warning_once("RelayAttention will not engage: %s", error)
        return "no_compiler"
    logger.info_once("RelayAttention: compiled C++ kernel ready (%s).", cpu_build.build())
    return None


def _max_keys_per_segment() -> int:
    """Longer segments are cut so that every core has work; with few cores, each cut is one more merge for nothing."""
    return 4096 if torch.get_num_threads() <= 4 else 1024
