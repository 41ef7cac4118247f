"""The repair that lets ahead-of-time artefacts load on CPU, and whether vLLM still needs it."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from relay_serving.vllm_plugin import aot_load_repair


def test_a_function_without_the_method_gets_one_and_others_keep_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own:
        def finalize_loading(self, vllm_config: Any) -> str:
            return "own"

    def plain() -> None: ...

    artefacts = iter([plain, Own()])
    load = lambda *args, **kwargs: SimpleNamespace(_artifacts=SimpleNamespace(compiled_fn=next(artefacts)))  # noqa: E731
    monkeypatch.setattr(torch.compiler, "load_compiled_function", load)
    aot_load_repair.repair()
    repaired = torch.compiler.load_compiled_function
    aot_load_repair.repair()
    assert torch.compiler.load_compiled_function is repaired, "repaired twice"
    first, second = (repaired(None)._artifacts.compiled_fn for _ in range(2))
    assert first.finalize_loading(None) is None
    assert second.finalize_loading(None) == "own"


def test_vllm_still_calls_the_missing_method() -> None:
    """When this fails, aot_load_repair and its entry in PATCHES.md can go."""
    from vllm.compilation import decorators

    source = inspect.getsource(decorators._try_load_aot_compiled_fn)
    assert "compiled_fn.finalize_loading(" in source
    assert "hasattr" not in source
    assert "getattr(loaded_fn" not in source
