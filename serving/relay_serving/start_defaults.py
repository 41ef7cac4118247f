"""What `vllm-relay serve` chooses where the user chose nothing; the evidence is docs/decisions/0001-start-defaults.md.

A flag the user gave, on the command line or in a --config file, always wins. To know which were given, each flag with
a default of ours gets a marker as its parser default; what still holds the marker after parsing was not given.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from relay_serving.errors import UsageError

GIB = 1 << 30
HOST = "127.0.0.1"
EMBEDDED_KV_BYTES = 1 * GIB  # 46k tokens of SmolLM2-135M: five requests of its full context
KV_SHARE_OF_AVAILABLE = 0.4
_COMPILE_FLAGS = ("enforce_eager", "optimization_level", "compilation_config")
_MEMORY_FLAGS = ("gpu_memory_utilization", "kv_cache_memory_bytes")
_DESTINATIONS = ("host", "served_model_name", "block_size", "speculative_config", *_COMPILE_FLAGS, *_MEMORY_FLAGS)
SEGMENTATION_BLOCK = 32  # tokens; of vLLM's 128 on CPU, a picture's prefix of 576 tokens and a few more wastes 64
ROW_PROPOSER = "relay_serving.vllm_plugin.row_proposer.RowProposer"


class _NotGiven:
    """Stands for vLLM's default until parsing is over; prints as that default in --help."""

    def __init__(self, default: object) -> None:
        self.default = default

    def __repr__(self) -> str:
        return repr(self.default)

    def __str__(self) -> str:
        return str(self.default)


def mark(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(**{name: _NotGiven(parser.get_default(name)) for name in _DESTINATIONS})


def apply(
    args: argparse.Namespace,
    *,
    embedded_name: str | None,
    on_cpu: bool,
    available_bytes: int,
    segments: bool = False,
    draft_rows: int = 0,
) -> list[str]:
    """Put vLLM's defaults back, or ours, where nothing was given. Returns what to tell the user, one line each."""
    given = {name for name in _DESTINATIONS if not isinstance(getattr(args, name), _NotGiven)}
    for name in _DESTINATIONS:
        if name not in given:
            setattr(args, name, getattr(args, name).default)
    chosen = []
    if "host" not in given:
        args.host = HOST
    if embedded_name is not None and "served_model_name" not in given:
        args.served_model_name = [embedded_name]
    if on_cpu and not given.intersection(_COMPILE_FLAGS) and (missing := missing_for_compiling()) is not None:
        args.enforce_eager = True
        chosen.append(f"eager execution, because {missing} is missing; with it, decoding is about a fifth faster")
    if on_cpu and not given.intersection(_MEMORY_FLAGS) and not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        args.kv_cache_memory_bytes = kv_cache_bytes(embedded_name is not None, available_bytes)
        chosen.append(
            f"{args.kv_cache_memory_bytes / GIB:.1f} GiB of KV cache; --kv-cache-memory-bytes sets another size"
        )
    if on_cpu and segments and "block_size" not in given:
        args.block_size = SEGMENTATION_BLOCK
        chosen.append(f"KV blocks of {SEGMENTATION_BLOCK} tokens, so that questions about one picture share all of it")
    if draft_rows and "speculative_config" in given:
        raise UsageError("--relay-draft-rows and --speculative-config both choose what drafts tokens: give one of them")
    if draft_rows:
        args.speculative_config = {
            "method": "custom_class",
            "model": ROW_PROPOSER,
            "num_speculative_tokens": draft_rows,
        }
    return chosen


def missing_for_compiling() -> str | None:
    """What Inductor needs for CPU code and this machine lacks."""
    compiler = os.environ.get("CXX") or "g++"
    if shutil.which(compiler) is None:
        return f"the C++ compiler {compiler}"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python.h (the package python3-dev)"
    return None


def compile_cache_environment(
    environment: Mapping[str, str], cache: Path, *, loads_artefacts: bool = False
) -> dict[str, str]:
    """Variables that let a second start on CPU reuse what the first compiled; none that the user has set.

    Inductor's cache must outlive /tmp. vLLM's ahead-of-time artefacts are written on CPU too, but load again only where
    relay's plugin is loaded (see PATCHES.md); elsewhere writing them means compiling for 40 s at each start. The
    variables must be set before PyTorch is imported.
    """
    wanted = {"TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor")}
    if not loads_artefacts:
        wanted["VLLM_USE_AOT_COMPILE"] = "0"
    return {name: value for name, value in wanted.items() if not environment.get(name)}


def kv_cache_bytes(embedded: bool, available_bytes: int) -> int:
    """Stock claims 92 % of the machine's memory and refuses to start if other programs use any of it."""
    share = int(available_bytes * KV_SHARE_OF_AVAILABLE)
    return min(EMBEDDED_KV_BYTES, share) if embedded else share


def available_memory() -> int:
    """Bytes this process may still take: the machine's, or its control group's if that is less."""
    import psutil

    available: int = psutil.virtual_memory().available
    limit, used = (_read_number(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit is not None and used is not None:
        available = min(available, max(0, limit - used))
    return available


def _read_number(path: str) -> int | None:
    try:
        with open(path) as file:
            text: Any = file.read().strip()
        return int(text)
    except (OSError, ValueError):
        return None
