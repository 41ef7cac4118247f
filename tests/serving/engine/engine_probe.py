"""Worker extensions for tests: what a vLLM worker really runs, and what its attention builder was really given."""

from __future__ import annotations

import json
import os
from collections import Counter
from itertools import pairwise
from typing import Any

import vllm.v1.attention.backends.cpu_attn as cpu_attn


class EngineProbe:
    """Mixed into the worker through ``worker_extension_cls``."""

    def probe_layers(self) -> dict[str, int]:
        """How many attention layers run each implementation class."""
        context = self.model_runner.compilation_config.static_forward_context  # type: ignore[attr-defined]
        impls = [layer.impl for layer in context.values() if hasattr(layer, "impl")]
        return dict(Counter(f"{type(impl).__module__}.{type(impl).__name__}" for impl in impls))


def _record(builder: Any, common: Any) -> None:
    path = os.environ.get("RELAY_TEST_RECORD")
    if not path:
        return
    rows = common.num_reqs
    starts = common.query_start_loc[: rows + 1].tolist()
    step = {
        "spec": type(builder.kv_cache_spec).__name__,
        "block_size": builder.block_size,
        "block_table": common.block_table_tensor[:rows].tolist(),
        "query_lens": [end - start for start, end in pairwise(starts)],
        "seq_lens": common.seq_lens[:rows].tolist(),
    }
    with open(path, "a") as file:
        file.write(json.dumps(step) + "\n")


class StepRecorder(EngineProbe):
    """Also writes what every attention step was given to the file named by RELAY_TEST_RECORD, one JSON line a step."""

    def dummy_step(self, num_rows: int, seq_len: int) -> None:
        """The batch of null blocks that vLLM makes up to warm up, to profile and to capture CUDA graphs."""
        runner = self.model_runner  # type: ignore[attr-defined]
        runner._dummy_run(num_rows, force_attention=True, profile_seq_lens=seq_len)


if os.environ.get("RELAY_TEST_RECORD"):
    _build = cpu_attn.CPUAttentionMetadataBuilder.build

    def _recording_build(self: Any, common_prefix_len: int, common: Any, fast_build: bool = False) -> Any:
        _record(self, common)
        return _build(self, common_prefix_len, common, fast_build)

    cpu_attn.CPUAttentionMetadataBuilder.build = _recording_build  # type: ignore[method-assign]
