"""Which plugins a served vLLM loads: the value of VLLM_PLUGINS, worked out before vLLM is imported.

VLLM_PLUGINS filters every plugin group of vLLM at once. Unset, it means "all of them, except endpoint plugins", so
adding our name to an unset variable must name everything that would have loaded anyway.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points

from relay_serving.errors import RelayServingError

VARIABLE = "VLLM_PLUGINS"
OUR_NAME = "relay"
GENERAL_GROUP = "vllm.general_plugins"
ENDPOINT_GROUP = "vllm.endpoint_plugins"

# vLLM takes the name itself as consent to download adapters from the hub; consent is not ours to give
_NAMING_IS_CONSENT = {"lora_hf_hub_resolver"}


def discovered_names() -> list[str]:
    """The names of every plugin vLLM would load if VLLM_PLUGINS were unset, in order of discovery."""
    groups = sorted(group for group in entry_points().groups if group.startswith("vllm.") and group != ENDPOINT_GROUP)
    return list(dict.fromkeys(plugin.name for group in groups for plugin in entry_points(group=group)))


def plugins_value(current: str | None, enabled: bool, discovered: Iterable[str]) -> str:
    """VLLM_PLUGINS with our name in it, or out of it; a user's own list is otherwise kept as it is.

    `current` is the variable's value, None if unset; the empty string is vLLM's way of saying "none".
    """
    if current is None:
        names = [name for name in discovered if name not in _NAMING_IS_CONSENT]
    else:
        names = [name for name in current.split(",") if name.strip()]
    names = [name for name in names if name.strip() != OUR_NAME]
    return ",".join([*names, OUR_NAME] if enabled else names)


def check_relay_loads() -> None:
    """vLLM swallows a plugin's import error and serves as stock: find it first. Raises RelayServingError."""
    ours = [plugin for plugin in entry_points(group=GENERAL_GROUP) if plugin.name == OUR_NAME]
    if not ours:
        raise RelayServingError(
            f"no plugin named {OUR_NAME!r} is installed in this environment; install it again: pip install vllm-relay"
        )
    for plugin in ours:
        _check_loads(plugin)


def _check_loads(plugin: EntryPoint) -> None:
    if not plugin.value.startswith("relay_serving."):
        raise RelayServingError(f"another package also calls its plugin {OUR_NAME!r}: {plugin.value}; uninstall one")
    try:
        plugin.load()
    except Exception as error:
        raise RelayServingError(f"{plugin.value} does not import: {type(error).__name__}: {error}") from error
