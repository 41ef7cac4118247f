"""Our own settings: their defaults, their sources and their way to the workers.

A setting is a field of `RelaySettings`. Its default is written here once, `--relay-<name>` and `VLLM_RELAY_<NAME>` set
it, and `additional_config["relay"]` carries it into every vLLM process. What our environment variables mean is written
here and nowhere else. It imports nothing but the standard library, because plugins read it in every vLLM process.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from relay_serving.errors import SettingError

ADDITIONAL_CONFIG_KEY = "relay"
ENVIRONMENT_PREFIX = "VLLM_RELAY_"
KILL_SWITCH = "VLLM_RELAY"
# Which backends are overridden is decided before `additional_config` is known, in processes that vLLM starts.
GPU_KERNEL_CARRIER = "RELAY_GPU_KERNEL"
SEGMENTATION_AUTO, SEGMENTATION_OFF = "auto", "off"
REFINER_NONE, REFINER_MOBILE_SAM = "none", "mobile-sam"
LARGEST_GRID = 64


class CpuKernel(StrEnum):
    """Which implementation runs the shared part and the suffix on CPU."""

    AUTO = "auto"  # C++; where there is no compiler, relay does not engage and vLLM's own kernel serves, logged once
    CPP = "cpp"  # C++, and no start without a compiler
    TORCH = "torch"  # only where asked for: it needs no compiler, but is slower than vLLM's own kernel may be
    TRITON = "triton"  # under Triton's interpreter: for tests, minutes per answer


class GpuKernel(StrEnum):
    """Which implementation runs the shared part and the suffix on an NVIDIA GPU."""

    OFF = "off"  # vLLM's own kernels serve every layer
    TRITON = "triton"  # Triton, with plans made on the GPU


@dataclass(frozen=True)
class RelaySettings:
    """What a person can choose about relay.

    Attributes:
        enabled: the kill switch; when false nothing of ours is loaded and stock vLLM serves.
        cpu_kernel: see CpuKernel.
        gpu_kernel: see GpuKernel. Off: tested under Triton's interpreter alone, no GPU has served with it yet.
        min_shared_tokens: share a prefix only from this many tokens; 0 leaves the decision to the cost model.
        log_plan: log the plan of each step, for debugging.
        segmentation: `auto`, `off`, or the cells a side of the descriptors that the served model writes.
        segmentation_queries: queries that /v1/segmentations answers at one time; more are refused with 429.
        draft_rows: draft descriptor rows with speculative decoding; 0 is off, else the most tokens of a draft.
        refiner: what sharpens masks: `none`, `mobile-sam` (38 MB are fetched once), or hub id or folder of a SAM.
        refiner_timeout: seconds that refining the masks of one query may take; then the coarse masks are returned.
    """

    enabled: bool = True
    cpu_kernel: CpuKernel = CpuKernel.AUTO
    gpu_kernel: GpuKernel = GpuKernel.OFF
    min_shared_tokens: int = 0
    log_plan: bool = False
    segmentation: str = SEGMENTATION_AUTO
    segmentation_queries: int = 64
    draft_rows: int = 0
    refiner: str = REFINER_NONE
    refiner_timeout: int = 60

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> RelaySettings:
        """Raises SettingError naming the variable and its value."""
        source = os.environ if environment is None else environment
        found = {name: source[variable] for name, variable in VARIABLES.items() if source.get(variable, "") != ""}
        return cls().updated(found, lambda name: f"the environment variable {VARIABLES[name]}")

    @classmethod
    def from_additional_config(
        cls, additional_config: object, environment: Mapping[str, str] | None = None
    ) -> RelaySettings:
        """What vLLM carried to this process, over the environment, which is all there is in a vLLM we did not start.

        Raises SettingError.
        """
        inherited = cls.from_environment(environment)
        carried = additional_config.get(ADDITIONAL_CONFIG_KEY) if isinstance(additional_config, Mapping) else None
        if carried is None:
            return inherited
        label = f'--additional-config["{ADDITIONAL_CONFIG_KEY}"]'
        if not isinstance(carried, Mapping):
            raise SettingError(label, carried, "an object of relay settings")
        return inherited.updated(carried, lambda name: f'{label}["{name}"]')

    def updated(self, values: Mapping[str, object], source_of: Any = "--relay-{}".format) -> RelaySettings:
        """A copy with `values` validated and put in; `source_of(name)` says in an error where a value came from."""
        unknown = [name for name in values if name not in _PARSERS]
        if unknown:
            raise SettingError(source_of(unknown[0]), values[unknown[0]], f"one of {', '.join(_PARSERS)}")
        read: dict[str, Any] = {name: _PARSERS[name](source_of(name), value) for name, value in values.items()}
        return replace(self, **read)

    def to_additional_config(self, users: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """`users` with our key added. What the user wrote is never dropped, and wins inside our key too."""
        merged = dict(users or {})
        theirs = merged.get(ADDITIONAL_CONFIG_KEY, {})
        if not isinstance(theirs, Mapping):
            raise SettingError(f'--additional-config["{ADDITIONAL_CONFIG_KEY}"]', theirs, "an object of relay settings")
        ours = {name: str(value) if isinstance(value, StrEnum) else value for name, value in asdict(self).items()}
        merged[ADDITIONAL_CONFIG_KEY] = {**ours, **theirs}
        return merged


def cache_folder(environment: Mapping[str, str] | None = None) -> Path:
    """Where the embedded model and the logs of a start live: VLLM_RELAY_CACHE, else the user's cache folder."""
    source = os.environ if environment is None else environment
    chosen = source.get(f"{ENVIRONMENT_PREFIX}CACHE", "")
    if chosen:
        return Path(chosen).expanduser().absolute()
    base = source.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "vllm-relay"


def _boolean(source: str, value: object) -> bool:
    if isinstance(value, bool):
        return value
    word = str(value).strip().lower()
    if word in ("1", "true", "yes", "on"):
        return True
    if word in ("0", "false", "no", "off"):
        return False
    raise SettingError(source, value, "1 or 0")


def _count(source: str, value: object) -> int:
    text = str(value).strip()
    if isinstance(value, bool) or not text.isascii() or not text.isdigit():
        raise SettingError(source, value, "a whole number, 0 or more")
    return int(text)


def _grid(source: str, value: object) -> str:
    word = str(value).strip().lower()
    if word in (SEGMENTATION_AUTO, SEGMENTATION_OFF) or (
        word.isascii() and word.isdigit() and 1 <= int(word) <= LARGEST_GRID
    ):
        return word
    raise SettingError(source, value, f"auto, off, or a number of cells a side from 1 to {LARGEST_GRID}")


def _positive(source: str, value: object) -> int:
    number = _count(source, value)
    if number < 1:
        raise SettingError(source, value, "1 or more")
    return number


def _refiner(source: str, value: object) -> str:
    word = str(value).strip()
    if word.lower() in (REFINER_NONE, REFINER_MOBILE_SAM):
        return word.lower()
    if word.startswith((".", "/", "~")):
        return os.path.abspath(os.path.expanduser(word))
    if re.fullmatch(r"[\w.-]+/[\w.-]+", word, re.ASCII):
        return word
    raise SettingError(source, value, "none, mobile-sam, a hub id (owner/name), or the path of a folder (./name)")


def _cpu_kernel(source: str, value: object) -> CpuKernel:
    return CpuKernel(_one_of(CpuKernel, source, value))


def _gpu_kernel(source: str, value: object) -> GpuKernel:
    return GpuKernel(_one_of(GpuKernel, source, value))


def _one_of(choices: type[StrEnum], source: str, value: object) -> str:
    word = str(value).strip().lower()
    if word not in list(choices):
        raise SettingError(source, value, f"one of {', '.join(choices)}")
    return word


_PARSERS = {
    "enabled": _boolean,
    "cpu_kernel": _cpu_kernel,
    "gpu_kernel": _gpu_kernel,
    "min_shared_tokens": _count,
    "log_plan": _boolean,
    "segmentation": _grid,
    "segmentation_queries": _positive,
    "draft_rows": _count,
    "refiner": _refiner,
    "refiner_timeout": _positive,
}
VARIABLES = {name: KILL_SWITCH if name == "enabled" else f"{ENVIRONMENT_PREFIX}{name.upper()}" for name in _PARSERS}
assert set(_PARSERS) == {field.name for field in fields(RelaySettings)}
