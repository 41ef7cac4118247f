"""Lets vLLM load on CPU the ahead-of-time artefacts that it saves there; see PATCHES.md.

What vLLM compiles with Inductor alone, as on CPU, comes back from disk as a plain function, and vLLM 0.32 then calls a
method on it that only its own backend's functions have. The method, which would do nothing there, is added.
"""

from __future__ import annotations

from typing import Any


def repair() -> None:
    """Do so in this process, once."""
    import torch

    load = torch.compiler.load_compiled_function
    if getattr(load, "is_relay_repair", False):
        return

    def load_compiled_function(*args: Any, **kwargs: Any) -> Any:
        loaded = load(*args, **kwargs)
        compiled = loaded._artifacts.compiled_fn
        if not hasattr(compiled, "finalize_loading"):
            compiled.finalize_loading = _nothing_left_to_load
        return loaded

    load_compiled_function.is_relay_repair = True  # type: ignore[attr-defined]
    torch.compiler.load_compiled_function = load_compiled_function


def _nothing_left_to_load(vllm_config: Any) -> None:
    pass
