"""A mutant for tests: in a worker that loads this extension, the Triton kernels answer zeros."""

from __future__ import annotations

from typing import Any

from engine_probe import EngineProbe

from relay_kernels.relay_attention import triton_relay


class Mutant(EngineProbe):
    """Reports like any probe; importing this module is what breaks the kernels."""


def _zeros(*_: Any, out: Any, **__: Any) -> Any:
    return out.zero_()


triton_relay.relay_attention_triton = _zeros
