"""The GPU backend in an engine without a GPU: in a worker that loads this extension, it is CPU_ATTN.

Plans and kernels are the product's, under Triton's interpreter. Keys and values are written by PyTorch here: vLLM's own
kernel for that is compiled for GPUs only. Steps that are not ours would need vLLM's kernel too, so they are refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from engine_probe import EngineProbe
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from relay_serving.vllm_plugin import gpu_backend

planned: list[tuple[int, int, int]] = []


class InterpretedImpl(gpu_backend.RelayTritonImpl):
    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        is_real = slot_mapping >= 0
        slots = slot_mapping[is_real]
        block, offset = slots // kv_cache.shape[2], slots % kv_cache.shape[2]
        kv_cache[block, :, offset] = torch.cat((key, value), -1)[: len(is_real)][is_real]


class InterpretedBackend(gpu_backend.RelayTritonBackend):
    supported_kv_cache_layouts = CPUAttentionBackend.supported_kv_cache_layouts

    @staticmethod
    def get_name() -> str:
        return "CPU_ATTN"

    @staticmethod
    def get_impl_cls() -> type[InterpretedImpl]:
        return InterpretedImpl


class Probe(EngineProbe):
    def write_plans(self, file: str) -> None:
        """Rows, tokens and slots of each step that was planned."""
        Path(file).write_text(json.dumps(planned))


_plan = gpu_backend.GpuPlans.plan


def _recorded(self: gpu_backend.GpuPlans, common: Any) -> gpu_backend.GpuStep:
    step = _plan(self, common)
    slots = int(self.planner.workspace.token_slot_start[-1])
    planned.append((common.num_reqs, common.num_actual_tokens, slots))
    return step


gpu_backend.GpuPlans.plan = _recorded  # type: ignore[method-assign]
gpu_backend.GpuPlans.fits = lambda self, rows, tokens: True  # type: ignore[method-assign]  # no other kernel is here
register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.{InterpretedBackend.__name__}")
