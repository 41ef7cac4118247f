"""Stock and relay as two engine processes, alive at the same time, of which the caller works only one at a time.

An engine's life: launch → start (a minute) → describe → warm and measure → begin_close → close. Both load this
distribution's code, but only relay's VLLM_PLUGINS names the plugin: what that makes of each is read back from its
worker and checked.

Promises: when `processes.close_all` returns, no process of the engines is alive. Should this process be killed
outright, they end by themselves.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Mapping
from enum import StrEnum
from multiprocessing.connection import Connection
from typing import Any

from relay_benchmarks.errors import ComparisonError, KernelCheckError
from relay_benchmarks.processes import MeasuredProcess
from relay_benchmarks.workload import Shape
from relay_serving import plugin_names, start_defaults
from relay_serving.settings import KILL_SWITCH, cache_folder

STOCK_CLASSES = {
    "backends": ["vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend"],
    "implementations": ["vllm.v1.attention.backends.cpu_attn.CPUAttentionBackendImpl"],
    "builders": ["vllm.v1.attention.backends.cpu_attn.CPUAttentionMetadataBuilder"],
}
RELAY_CLASSES = {
    "backends": ["relay_serving.vllm_plugin.attention_backend.RelayCPUBackend"],
    "implementations": ["relay_serving.vllm_plugin.attention_backend.RelayCPUImpl"],
    "builders": ["relay_serving.vllm_plugin.attention_backend.RelayCPUMetadataBuilder"],
}
_MUST_AGREE = (
    *("vllm_version", "torch_version", "model_class", "dtype", "layers", "query_heads", "key_heads", "head_size"),
    *("max_model_len", "block_size", "block_sizes", "num_blocks", "compiled"),
)
# of what a side agrees with itself: rounding leaves 0.6 of 32 tokens, another attention a few percent
LEAST_EQUAL = 0.2


class Side(StrEnum):
    STOCK = "stock"
    RELAY = "relay"


class Engine(MeasuredProcess):
    """The parent's end of one engine process."""

    kind = "engine"

    def __init__(self, side: Side, environment: Mapping[str, str]) -> None:
        self.side = side
        self._owes_an_answer = False
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "relay_benchmarks.measured_engine", str(theirs.fileno())]
            super().__init__(side, command, environment, pass_fds=[theirs.fileno()])
        self._pipe = Connection(ours.detach())

    def request(self, command: str, **arguments: Any) -> None:
        """Send a command; `answer` waits for what comes of it."""
        self._owes_an_answer = True
        try:
            self._pipe.send((command, arguments))
        except OSError as error:
            raise self.failure() from error

    def answer(self) -> Any:
        """Raises EngineFailedError if the engine refuses or dies instead."""
        while not self._pipe.poll(0.2):
            if self.has_ended() and not self._pipe.poll(0):
                raise self.failure()
        try:
            status, value = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self.failure() from error
        self._owes_an_answer = False
        if status == "failed":
            raise self.failure(value)
        return value

    def call(self, command: str, **arguments: Any) -> Any:
        self.request(command, **arguments)
        return self.answer()

    def warm(self, shape: Shape, seed: int) -> None:
        self.call("warm", shape=shape, seed=seed)

    def measure(self, shape: Shape, seed: int, steps: int) -> dict[str, Any]:
        answer: dict[str, Any] = self.call("measure", shape=shape, seed=seed, steps=steps)
        return answer

    def complete(self, shape: Shape, seed: int, generate: int, is_warm: bool) -> dict[str, Any]:
        answer: dict[str, Any] = self.call("complete", shape=shape, seed=seed, generate=generate, is_warm=is_warm)
        return answer

    def begin_close(self) -> None:
        self._processes()
        if self._owes_an_answer:  # it will not read the word before it has given it
            self._process.terminate()
            return
        try:
            self._pipe.send(("stop", {}))
        except OSError:
            pass

    def close(self) -> None:
        super().close()
        self._pipe.close()


def environment_of(side: Side, users: Mapping[str, str]) -> dict[str, str]:
    """The same environment but for the plugin: other plugins are off on both sides."""
    return {
        **users,
        **start_defaults.compile_cache_environment(users, cache_folder(users)),
        plugin_names.VARIABLE: plugin_names.OUR_NAME if side is Side.RELAY else "",
        KILL_SWITCH: "1" if side is Side.RELAY else "0",
        "PYTHONUNBUFFERED": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }


def check_sides(described: Mapping[Side, Mapping[str, Any]], model: str = "this model") -> None:
    """Raises ComparisonError unless stock is stock, relay is relay, and nothing else differs; KernelCheckError."""
    for side, classes in ((Side.STOCK, STOCK_CLASSES), (Side.RELAY, RELAY_CLASSES)):
        for kind, expected in classes.items():
            if (found := described[side][kind]) != expected:
                raise ComparisonError(
                    f"the {side} engine's attention {kind} are {', '.join(found) or 'none'} instead of "
                    f"{expected[0]}; nothing was timed"
                )
    if described[Side.STOCK]["relay_is_loaded"]:
        raise ComparisonError("the stock engine's worker has relay's backend loaded; nothing was timed")
    for name in _MUST_AGREE:
        stock, relay = described[Side.STOCK][name], described[Side.RELAY][name]
        if stock != relay:
            raise ComparisonError(f"the engines differ in {name}: stock {stock}, relay {relay}; nothing was timed")
    _check_kernel_passed(described[Side.RELAY]["kernel_check"], model)


def check_warm(side: Side, cached_tokens: int, shared_tokens: int, block_size: int) -> None:
    """Raises ComparisonError unless every request found the shared prompt's full blocks in the prefix cache."""
    in_full_blocks = shared_tokens // block_size * block_size
    if cached_tokens < in_full_blocks:
        raise ComparisonError(
            f"the {side} engine found {cached_tokens} of {in_full_blocks} shared tokens in its prefix cache; the cache "
            "was to be warm. Pass a larger --kv-cache-memory-bytes"
        )


def check_answers(where: str, equal: float, self_equal: float) -> None:
    """Raises ComparisonError if the sides' greedy answers have less in common than rounding explains.

    Args:
        equal: fraction of what both generated that is the same.
        self_equal: the same between rounds of one side, the lower of the two.
    """
    if equal < LEAST_EQUAL * self_equal:
        raise ComparisonError(
            f"{where}: only {100 * equal:.1f} % of what the sides generated is the same, where each agrees with itself "
            f"in {100 * self_equal:.1f} %; speeds of different answers are not compared"
        )


def _check_kernel_passed(found: Mapping[str, Any], model: str) -> None:
    if "refusal" in found:
        raise ComparisonError(f"relay cannot serve {model}: {found['refusal']}; nothing was timed")
    if not found["passed"]:
        raise KernelCheckError(
            f"the kernel {found['kernel']} is wrong: its error is {found['error']:.3g}, the budget "
            f"{found['budget']:.3g}; nothing was timed. Run the kernel tests"
        )
