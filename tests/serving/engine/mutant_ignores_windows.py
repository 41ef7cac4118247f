"""A mutant for tests: in a worker that loads this extension, every layer runs its group's plan, window or not."""

from __future__ import annotations

from engine_probe import EngineProbe

from relay_serving.vllm_plugin import attention_backend


class Mutant(EngineProbe):
    """Reports like any probe; importing this module is what breaks the layers."""


attention_backend.layer_refusal = lambda impl: None
