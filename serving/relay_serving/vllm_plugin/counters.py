"""Relay's counters: written by the worker that runs the layers, read by the process that serves /metrics.

The two are different processes, so the counters live in a small file that both map into memory: one file for each
engine, written only by its first rank. A run id, made by the first process of a server and inherited by the others,
ties them together (vLLM's instance id does not: with several API servers each has its own). The writer holds a lock on
its file for as long as it lives, which is how readers tell a live file from one left behind. A file gets its name when
it is whole and locked, so that nobody meets one that is empty, or takes a new one for abandoned.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import secrets
import stat
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

SUFFIX = ".relay-counters"
_UNFINISHED = ".new"
_UNFINISHED_SECONDS = 60.0  # an unfinished file this old has no writer any more; making one takes microseconds
RUN_ID_VARIABLE = "RELAY_RUN_ID"  # vLLM warns of variables that begin with its name, and may refuse to start

# Why a step, or a layer of it, was served by vLLM's own kernel although requests shared a prefix.
FALLBACK_REASONS = (
    *("cost_model", "non_causal", "sliding_window", "chunked_local", "alibi", "soft_cap", "sinks", "attention_type"),
    *("kv_cache_dtype", "scale", "kv_connector", "context_parallel", "batch_invariance", "kv_cache_spec"),
    *("cpu_architecture", "no_compiler", "scratch_memory", "no_prefix_caching", "head_size"),
)
_FIELDS = (
    *("steps", "eligible_steps", "relay_steps", "grouped_requests", "groups", "kv_tokens_saved", "bytes_saved"),
    *("layer_calls", "planning_ns"),
)
_NAMES = (*_FIELDS, *(f"fallback_{reason}" for reason in FALLBACK_REASONS))


@dataclass(frozen=True)
class CounterValues:
    """One reading.

    Attributes:
        steps: builds of attention metadata: one for each KV-cache group in each model step.
        eligible_steps: steps in which two or more requests shared a computed full block.
        relay_steps: steps in which at least one prefix was read once for several requests.
        grouped_requests, groups: summed over relay steps.
        kv_tokens_saved: cached tokens read once instead of once for each request, summed over relay steps.
        bytes_saved: the same in bytes of keys and values, over all relayed layers.
        layer_calls: layer executions that ran relay.
        planning_ns: time spent planning, in nanoseconds.
        fallbacks: layer executions (or, for reasons that hold for a whole step, steps) served by vLLM's own kernel
            although a prefix was shared, by reason.
    """

    steps: int
    eligible_steps: int
    relay_steps: int
    grouped_requests: int
    groups: int
    kv_tokens_saved: int
    bytes_saved: int
    layer_calls: int
    planning_ns: int
    fallbacks: dict[str, int]


class CounterFile:
    """A mapped row of 64-bit integers with a single writer."""

    def __init__(self, memory: mmap.mmap, file: IO[bytes] | None = None) -> None:
        self._values = memoryview(memory).cast("q")
        self._index = {name: i for i, name in enumerate(_NAMES)}
        self._file = file  # the writer's, whose lock says that it lives

    @classmethod
    def private(cls) -> CounterFile:
        """Counters that nobody else sees, for ranks that must not count twice."""
        return cls(mmap.mmap(-1, 8 * len(_NAMES)))

    @classmethod
    def create(cls, instance_id: str, engine: int) -> CounterFile:
        """Counters of this run's engine that other processes can `find`."""
        path = counter_folder() / f"{run_id()}-{instance_id}-{engine}{SUFFIX}"
        unfinished = path.with_name(f"{path.name}{_UNFINISHED}")
        file = unfinished.open("w+b")
        file.write(bytes(8 * len(_NAMES)))
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        counters = cls(mmap.mmap(file.fileno(), 0), file)
        unfinished.rename(path)
        return counters

    def add(self, name: str, amount: int = 1) -> None:
        self._values[self._index[name]] += amount

    def read(self) -> CounterValues:
        values = dict(zip(_NAMES, self._values, strict=True))
        fallbacks = {reason: values.pop(f"fallback_{reason}") for reason in FALLBACK_REASONS}
        return CounterValues(**values, fallbacks=fallbacks)


def run_id() -> str:
    """This server's id: inherited, or made here and left to the processes started from here."""
    return os.environ.setdefault(RUN_ID_VARIABLE, secrets.token_hex(8))


def counter_folder() -> Path:
    """This user's folder for counter files; created on demand, closed to others."""
    folder = Path(tempfile.gettempdir()) / f"vllm-relay-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise PermissionError(f"{folder} must be a folder of your own, closed to others; set TMPDIR to another place")
    return folder


def find(instance_id: str | None = None) -> Iterator[tuple[int, CounterFile]]:
    """(engine, counters) of every engine of this run, or of one vLLM instance in it, whose writer is alive.

    Raises OSError if the folder cannot be used; a single file that cannot be read, or is none of ours, is left out.
    """
    for path in sorted(counter_folder().glob(f"{run_id()}-{instance_id or '*'}-*{SUFFIX}")):
        counters = _read_if_alive(path)
        if counters is not None:
            yield int(path.name.removesuffix(SUFFIX).rsplit("-", 1)[1]), counters


def sweep() -> None:
    """Remove the files of writers that are gone, where that can be done; whoever needs the folder will say why not."""
    try:
        folder = counter_folder()
    except OSError:
        return
    for path in [*folder.glob(f"*{SUFFIX}"), *folder.glob(f"*{SUFFIX}{_UNFINISHED}")]:
        with contextlib.suppress(OSError), path.open("r+b") as file:  # a file may go while we look
            is_young = time.time() - os.fstat(file.fileno()).st_mtime < _UNFINISHED_SECONDS
            if _is_abandoned(file) and not (is_young and path.name.endswith(_UNFINISHED)):
                path.unlink(missing_ok=True)


def _read_if_alive(path: Path) -> CounterFile | None:
    try:
        with path.open("r+b") as file:
            if _is_abandoned(file) or os.fstat(file.fileno()).st_size != 8 * len(_NAMES):
                return None
            return CounterFile(mmap.mmap(file.fileno(), 0))
    except (OSError, ValueError):  # gone since it was listed, or emptied
        return None


def _is_abandoned(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    fcntl.flock(file, fcntl.LOCK_UN)
    return True
