"""Which family a model is of. Every module of this package that has a `from_config` is asked, in order of name.

To add a family, add a module: ``from_config(config, model_id)`` returns its `Family`, or None for a model of others.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

from relay_models.errors import CheckpointError
from relay_models.text4seg import families
from relay_models.text4seg.families.family import Family, has_architecture

FromConfig = Callable[[Mapping[str, Any], str], Family | None]

ORIGINAL_LLAVA = "LlavaLlamaForCausalLM"


def family_of(config: Mapping[str, Any], model_id: str = "") -> Family | None:
    """The family of a model, from its config.json and its id or path; None if no family is for it.

    Raises:
        CheckpointError: it is a family's, but says something impossible.
    """
    return next((family for ask in adapters().values() if (family := ask(config, model_id)) is not None), None)


def supports(config: Mapping[str, Any], model_id: str = "") -> bool:
    """Whether a family is for this model."""
    return family_of(config, model_id) is not None


def require_family(config: Mapping[str, Any], model_id: str = "") -> Family:
    """As `family_of`. Raises CheckpointError also for a model of no family, with what to do."""
    family = family_of(config, model_id)
    if family is not None:
        return family
    if needs_conversion(config):
        raise CheckpointError(
            f"{model_id or 'the model'} is in the original LLaVA layout, which vLLM does not load: convert it first, "
            f"with vllm-relay convert text4seg {model_id or 'SRC'} DST"
        )
    raise CheckpointError(
        f"architectures {config.get('architectures')!r} of {model_id or 'the model'} are of no segmentation family: "
        f"use one of {', '.join(adapters())}"
    )


def needs_conversion(config: Mapping[str, Any]) -> bool:
    """Whether the config is of upstream's own LLaVA code, which `convert` reads."""
    return has_architecture(config, ORIGINAL_LLAVA)


def adapters() -> dict[str, FromConfig]:
    """The `from_config` of every family's module, by the module's name."""
    names = sorted(module.name for module in pkgutil.iter_modules(families.__path__))
    modules = {name: importlib.import_module(f"{families.__name__}.{name}") for name in names if name != "registry"}
    return {name: module.from_config for name, module in modules.items() if hasattr(module, "from_config")}
