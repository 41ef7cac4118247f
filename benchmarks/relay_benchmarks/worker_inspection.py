"""Questions to a vLLM worker, injected into it by `worker_extension_cls`; the same class on both sides.

vLLM calls these methods by name (`collective_rpc`) in the process that runs the layers. Nothing of relay is imported
here before `relay_bench_check_kernel` is called, which happens on the relay side only.
"""

from __future__ import annotations

import sys
from typing import Any

EXTENSION = f"{__name__}.WorkerInspection"
RELAY_MODULE = "relay_serving.vllm_plugin.attention_backend"


class WorkerInspection:
    """Mixed into vLLM's worker: `vllm_config` and `model_runner` are the worker's own."""

    vllm_config: Any
    model_runner: Any

    def relay_bench_describe(self) -> dict[str, Any]:
        """What serves attention here, by class, and what the model and the cache look like."""
        import torch
        import vllm

        layers = self._relay_bench_layers()
        groups = [group for groups in self.model_runner.attn_groups for group in groups]
        model, parallel = self.vllm_config.model_config, self.vllm_config.parallel_config
        return {
            "vllm_version": vllm.__version__,
            "torch_version": str(torch.__version__),  # its own class does not travel between processes
            "dtype": str(model.dtype).removeprefix("torch."),
            "query_heads": model.get_num_attention_heads(parallel),
            "key_heads": model.get_num_kv_heads(parallel),
            "head_size": model.get_head_size(),
            "max_model_len": model.max_model_len,
            "block_size": self.vllm_config.cache_config.block_size,
            "compiled": self.vllm_config.compilation_config.mode.name,
            "model_class": _name(type(self.model_runner.get_model())),
            "layers": len(layers),
            "backends": sorted({_name(layer.get_attn_backend()) for layer in layers}),
            "implementations": sorted({_name(type(layer.impl)) for layer in layers}),
            "builders": sorted({_name(type(builder)) for group in groups for builder in group.metadata_builders}),
            "relay_is_loaded": RELAY_MODULE in sys.modules,
            "cache_groups": len(self.model_runner.kv_cache_config.kv_cache_groups),
            "num_blocks": self.model_runner.kv_cache_config.num_blocks,
            "block_sizes": sorted({group.kv_cache_spec.block_size for group in groups}),
        }

    def relay_bench_check_kernel(self, seed: int) -> dict[str, Any]:
        """Run the kernel that will serve the layers, in its dtype, shape and cache layout, against the reference."""
        import torch

        from relay_benchmarks.kernel_check import Problem, check_kernel, make_problem
        from relay_kernels.relay_attention.api import CacheLayout, Implementation, relay_attention
        from relay_kernels.relay_attention.work_list import make_work_list
        from relay_serving.vllm_plugin.attention_backend import split_cache

        builder = self.model_runner.attn_groups[0][0].metadata_builders[0]
        layer = next((layer for layer in self._relay_bench_layers() if layer.impl.refusal is None), None)
        if layer is None or builder.refusal is not None:
            return {"refusal": builder.refusal or self._relay_bench_layers()[0].impl.refusal}
        if builder.kernel not in ("cpp", "torch"):
            return {"refusal": f"the {builder.kernel} kernel is not meant to be timed on a CPU"}
        impl, block_size = layer.impl, builder.kv_cache_spec.block_size
        implementation = Implementation.CPU if builder.kernel == "cpp" else Implementation.CPU_TORCH

        def attend(problem: Problem) -> torch.Tensor:
            blocks = problem.key_cache.shape[0]
            cache = torch.zeros(blocks, impl.num_kv_heads, block_size, 2 * impl.head_size, dtype=dtype)
            keys, values = problem.key_cache.flatten(0, 1), problem.value_cache.flatten(0, 1)
            impl.do_kv_cache_update(layer, keys, values, cache, problem.slots)
            key_cache, value_cache = split_cache(cache)
            return relay_attention(
                problem.query,
                key_cache,
                value_cache,
                problem.block_table,
                make_work_list(problem.plan, problem.query_start, max_keys_per_segment=None),
                scale=problem.scale,
                out=torch.full_like(problem.query, float("nan")),
                implementation=implementation,
                layout=CacheLayout(layer.isa),
            )

        dtype = self.vllm_config.model_config.dtype
        problem = make_problem(
            query_heads=impl.num_heads,
            key_heads=impl.num_kv_heads,
            head_size=impl.head_size,
            block_size=block_size,
            scale=impl.scale,
            dtype=dtype,
            seed=seed,
        )
        found = check_kernel(attend, problem)
        return {
            "kernel": f"{builder.kernel} ({layer.isa})",
            "passed": found.passed,
            "error": found.error,
            "budget": found.budget,
        }

    def _relay_bench_layers(self) -> list[Any]:
        layers = self.vllm_config.compilation_config.static_forward_context.values()
        return [layer for layer in layers if hasattr(layer, "impl") and hasattr(layer, "get_attn_backend")]


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
