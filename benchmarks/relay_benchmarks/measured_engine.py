"""The child of a benchmark: one vLLM engine that answers its parent's commands one at a time.

Run as `python -m relay_benchmarks.measured_engine FD`; FD is a socket. Commands: start → describe, then for each shape
warm, then measure as often as asked, or complete, and at the end stop. Which attention it runs is decided by its
environment alone (VLLM_PLUGINS). Every process vLLM spawns imports this module again, so nothing heavy is imported at
its top.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

from relay_benchmarks.child_process import end_with_the_parent
from relay_benchmarks.worker_inspection import EXTENSION
from relay_benchmarks.workload import Shape, make_prompts, make_shared_prompt

SLACK_TOKENS = 64  # requests begin a few steps apart, and the first may not end before the last has begun


class MeasuredEngine:
    """A vLLM engine, driven step by step as its offline interface drives it."""

    def __init__(self, engine_args: dict[str, Any]) -> None:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.llm_engine import LLMEngine

        self._default_block_size = _default_block_size(engine_args)
        arguments = EngineArgs(**engine_args, worker_extension_cls=EXTENSION, skip_tokenizer_init=True)
        # the server's context, for the server's scheduling defaults
        self._engine = LLMEngine.from_engine_args(arguments, usage_context=UsageContext.OPENAI_API_SERVER)
        self._config = self._engine.vllm_config
        self._vocabulary = self._config.model_config.get_vocab_size()
        self._requests = 0

    def describe(self, check_kernel: bool, seed: int) -> dict[str, Any]:
        return {
            **self._engine.collective_rpc("relay_bench_describe")[0],
            "kernel_check": self._engine.collective_rpc("relay_bench_check_kernel", args=(seed,))[0]
            if check_kernel
            else None,
            "default_block_size": self._default_block_size,
        }

    def warm(self, shape: Shape, seed: int) -> None:
        """Put the shared prompt into the prefix cache, then decode once so that nothing is run for the first time."""
        self._cache_shared(shape, seed)
        self.measure(shape, seed, steps=2)

    def measure(self, shape: Shape, seed: int, steps: int) -> dict[str, Any]:
        """Decode the whole batch; times the steps in which every request, and nothing else, gets one token.

        Returns seconds of each step, the tokens of each request, the fewest prompt tokens that any request found in
        the prefix cache, and on the relay side (None on the other) what its counters gained, from the first prefill to
        the last decode: those are read while the engine is idle, so they agree with one another. Planning time is of
        the timed steps only, which the engine does not wait for: it may be one step off at either end.
        """
        counters_before = self._counters()
        requests = [
            self._add(prompt, generate=steps + SLACK_TOKENS) for prompt in make_prompts(shape, self._vocabulary, seed)
        ]
        tokens: dict[str, list[int]] = {request: [] for request in requests}
        cached: dict[str, int] = {}
        ended_at = 0.0
        while not all(tokens.values()):
            _, ended_at = self._step(tokens, cached)
        timed_from = self._counters()
        seconds = []
        for _ in range(steps):
            began_at = ended_at
            advanced, ended_at = self._step(tokens, cached)
            seconds.append(ended_at - began_at)
            if advanced != len(requests):
                raise RuntimeError(
                    f"a decode step advanced {advanced} of {len(requests)} requests; the cache is too small, or "
                    f"requests began more than {SLACK_TOKENS} steps apart"
                )
        timed_to = self._counters()
        self._end(requests)
        return {
            "seconds": seconds,
            "tokens": [tokens[request] for request in requests],
            "cached_tokens": min(cached.values()),
            "counters": _gained(counters_before, self._counters()),
            "timed_counters": _gained(timed_from, timed_to),
        }

    def complete(self, shape: Shape, seed: int, generate: int, is_warm: bool) -> dict[str, Any]:
        """Answer all requests, `generate` tokens each, as a batch job does: timed from the first to the last token.

        The prefix cache is emptied before; if `is_warm`, the shared prompt alone is put into it, not timed. Returns as
        `measure`, with `seconds` a number.
        """
        if not self._engine.reset_prefix_cache():
            raise RuntimeError("the prefix cache could not be emptied")
        if is_warm:
            self._cache_shared(shape, seed)
        counters_before = self._counters()
        prompts = make_prompts(shape, self._vocabulary, seed)
        tokens: dict[str, list[int]] = {}
        cached: dict[str, int] = {}
        began = time.perf_counter()
        for prompt in prompts:
            tokens[self._add(prompt, generate)] = []
        while self._engine.has_unfinished_requests():
            self._step(tokens, cached)
        seconds = time.perf_counter() - began
        return {
            "seconds": seconds,
            "tokens": list(tokens.values()),
            "prompt_tokens": sum(map(len, prompts)),
            "cached_tokens": min(cached.values()),
            "counters": _gained(counters_before, self._counters()),
        }

    def close(self) -> None:
        self._engine.engine_core.shutdown(timeout=2.0)

    def _cache_shared(self, shape: Shape, seed: int) -> None:
        """Compute the shared prompt, so that its full blocks are in the prefix cache."""
        shared = make_shared_prompt(shape, self._vocabulary, seed)
        if shared:
            self._add(shared, generate=1)
            while self._engine.has_unfinished_requests():
                self._engine.step()

    def _add(self, prompt: list[int], generate: int) -> str:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        self._requests += 1
        parameters = SamplingParams(
            temperature=0.0,
            ignore_eos=True,
            max_tokens=generate,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        request = f"bench-{self._requests}"
        self._engine.add_request(request, {"prompt_token_ids": prompt}, parameters)
        return request

    def _step(self, tokens: dict[str, list[int]], cached: dict[str, int]) -> tuple[int, float]:
        """`LLMEngine.step`, keeping the engine core's own clock: this process may be late to read what is ready.

        Returns how many of the requests got exactly one token, and when the step ended.
        """
        ready = self._engine.engine_core.get_output()
        processed = self._engine.output_processor.process_outputs(
            ready.outputs, engine_core_timestamp=ready.timestamp, iteration_stats=None
        )
        advanced = 0
        for output in processed.request_outputs:
            if output.request_id not in tokens:
                continue
            new = output.outputs[0].token_ids
            tokens[output.request_id].extend(new)
            cached.setdefault(output.request_id, output.num_cached_tokens or 0)
            advanced += len(new) == 1 and not output.finished
        return advanced, ready.timestamp

    def _end(self, requests: list[str]) -> None:
        """Abort, and wait for the engine to have done so: commands are answered in order."""
        self._engine.abort_request(requests)
        self._engine.collective_rpc("relay_bench_describe")

    def _counters(self) -> dict[str, int] | None:
        from dataclasses import asdict

        from relay_serving.vllm_plugin import counters

        readings = [asdict(file.read()) for _, file in counters.find(self._config.instance_id)]
        if not readings:
            return None
        for reading in readings:
            reading.update({f"fallback_{reason}": count for reason, count in reading.pop("fallbacks").items()})
        return {name: sum(reading[name] for reading in readings) for name in readings[0]}


def _gained(before: dict[str, int] | None, after: dict[str, int] | None) -> dict[str, int] | None:
    return None if before is None or after is None else {name: after[name] - before[name] for name in after}


def _default_block_size(engine_args: dict[str, Any]) -> int:
    """What this process would use if nobody asked for a block size."""
    from vllm.engine.arg_utils import EngineArgs

    rest = {name: value for name, value in engine_args.items() if name != "block_size"}
    return int(EngineArgs(**rest, skip_tokenizer_init=True).create_engine_config().cache_config.block_size)


def main(argv: list[str]) -> int:
    end_with_the_parent()
    descriptor = int(argv[0])
    os.set_inheritable(descriptor, False)
    engine: MeasuredEngine | None = None
    with Connection(descriptor) as parent:
        try:
            while (command := parent.recv())[0] != "stop":
                name, arguments = command
                if name == "start":
                    engine = MeasuredEngine(**arguments)
                    answer: Any = None
                else:
                    answer = getattr(engine, name)(**arguments)
                parent.send(("done", answer))
        except EOFError:
            return 1
        except Exception as error:
            traceback.print_exc()
            parent.send(("failed", f"{type(error).__name__}: {error}"))
            return 1
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: let the shutdown finish
            if engine is not None:
                engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
