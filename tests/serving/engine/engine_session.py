"""A real vLLM engine that stays open and plays scripts as it is told on stdin.

An order is a line ``[method of Session, arguments]``, its answer a line on stdout. It wants
VLLM_ENABLE_V1_MULTIPROCESSING=0: then everything runs in this process, step by step.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import psutil
from engine_driver import open_engine, read_counters, run_scenario
from engine_scripts import MEMORY_EVERY_STEPS, MOST_ALIVE, Operation, Pool, random_operations
from step_witness import StepWitness, request_of

MOST_WRONG = 10
SOAK_JUDGES_EVERY = 64


class Player:
    """Plays operations. Requests are numbered in the order in which they joined.

    Attributes:
        alive: the requests that are running or waiting, oldest first.
        tokens, when, prompts: of each request, what it was given, in which step, and after which prompt of the pool.
        ends: how many ended in which way.
    """

    def __init__(self, llm: Any, witness: StepWitness, pool: Pool, numbers: Iterator[int]) -> None:
        self.engine = llm.llm_engine
        self.witness = witness
        self.pool = pool
        self.alive: list[int] = []
        self.tokens: dict[int, list[int]] = {}
        self.when: dict[int, list[int]] = {}
        self.prompts: dict[int, int] = {}
        self.ends: Counter[str] = Counter()
        self.num_steps = 0
        self.num_tokens = 0
        self._numbers = numbers
        self._aborts_preempted = False

    def play(self, operation: Operation) -> None:
        name, *arguments = operation
        getattr(self, name)(*arguments)

    def join(self, prompt: int, salt: str | None, num_tokens: int) -> None:
        """A request of at most so many tokens; fewer if the answer is no longer clear after that."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        num_tokens = min(num_tokens, len(self.pool.answers[prompt]))
        if len(self.alive) >= MOST_ALIVE or not num_tokens:
            self.ends["turned away"] += 1
            return
        text = TokensPrompt(prompt_token_ids=self.pool.prompts[prompt])
        if salt is not None:
            text["cache_salt"] = salt
        number = next(self._numbers)
        self.witness.salts[number], self.prompts[number] = salt, prompt
        self.tokens[number], self.when[number] = [], []
        self.alive.append(number)
        params = SamplingParams(
            temperature=0.0, ignore_eos=True, max_tokens=num_tokens, detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )  # fmt: skip
        self.engine.add_request(str(number), text, params)

    def abort(self, which: int) -> None:
        if self.alive:
            self._abort(self.alive[which % len(self.alive)])

    def abort_preempted(self) -> None:
        self._aborts_preempted = True

    def _abort(self, number: int) -> None:
        self.ends[f"aborted while {self._status_of(number)}"] += 1
        self.alive.remove(number)
        self.engine.abort_request([str(number)])

    def _status_of(self, number: int) -> str:
        requests = self.witness.scheduler.requests
        (status,) = [request.status.name.lower() for name, request in requests.items() if request_of(name) == number]
        return str(status)

    def steps(self, count: int) -> None:
        for _ in range(count):
            if self.alive:
                self.step()

    def step(self) -> None:
        for output in self.engine.step():
            number, new = int(output.request_id), list(output.outputs[0].token_ids)
            self.tokens[number] += new
            self.when[number] += [self.num_steps] * len(new)
            self.num_tokens += len(new)
            drafted = self.witness.drafts.get(number, 0)
            self.witness.seen["drafted tokens accepted"] += max(len(new) - 1, 0) if drafted else 0
            if drafted and not output.finished:
                self.witness.seen["drafted tokens rejected"] += drafted - (len(new) - 1)
            if output.finished:
                self.alive.remove(number)
                self.ends["finished"] += 1
        self.num_steps += 1
        if self._aborts_preempted:
            preempted = [number for number in self.alive if self._status_of(number) == "preempted"]
            for number in preempted[:1]:
                self._aborts_preempted = False
                self._abort(number)

    def strays(self) -> list[str]:
        """Requests whose tokens are not how the pool's answer begins."""
        answers = {number: self.pool.answers[prompt] for number, prompt in self.prompts.items()}
        return [
            f"request {number} has {given} in step {self.num_steps}, not {answers[number]}"
            for number, given in self.tokens.items()
            if given != answers[number][: len(given)]
        ]

    def forget_those_gone(self) -> None:
        for number in set(self.tokens).difference(self.alive):
            for table in (self.tokens, self.when, self.prompts, self.witness.salts):
                table.pop(number)


class Session:
    """The orders that a test may give."""

    def __init__(self) -> None:
        self.llm: Any = None
        self.witness: StepWitness | None = None
        self._numbers = itertools.count()

    def open(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Build an engine, in the place of the one before, and say what runs in it."""
        from vllm.distributed import cleanup_dist_env_and_memory

        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
            self.llm = self.witness = None
            cleanup_dist_env_and_memory()
        self.llm = open_engine(arguments)
        return self.report()

    def report(self) -> dict[str, Any]:
        """What runs here, and what relay has counted since the engine was opened."""
        return {"layers": self.llm.collective_rpc("probe_layers"), "counters": read_counters(self.llm)}

    def answer(self, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        """Tokens and gaps, as `run_scenario` has them. Only before a pool is taken, whose requests are numbered."""
        name = f"answer {next(self._numbers)}"
        return run_scenario(self.llm, {"name": name, "prompts": prompts, "max_tokens": max_tokens, "logprobs": 2})

    def take(self, prompts: list[list[int]], answers: list[list[int]]) -> None:
        """The pool that scripts refer to from now on."""
        self.pool = Pool(prompts, answers)
        self.witness = self.witness or StepWitness(self.llm)

    def call(self, method: str, arguments: list[Any]) -> None:
        """Call a method of the worker, which its extension may have brought."""
        self.llm.collective_rpc(method, args=tuple(arguments))

    def _new_player(self) -> Player:
        assert self.witness is not None, "no pool was taken"
        self.witness.forget()
        return Player(self.llm, self.witness, self.pool, self._numbers)

    def play(self, operations: list[Operation]) -> dict[str, Any]:
        """Play a script on an empty cache until nobody is left, and say what came out."""
        assert self.llm.llm_engine.reset_prefix_cache(), "blocks are still in use after everybody left"
        player = self._new_player()
        for operation in operations:
            player.play(operation)
        while player.alive:
            player.step()
        outcome = {"tokens": list(player.tokens.values()), "when": list(player.when.values())}
        return outcome | self._witnessed(player)

    def soak(self, seconds: float, seed: int) -> dict[str, Any]:
        """Play at random for so long, comparing each token with the pool's answer as it comes.

        Memory is what is resident and this process's own, every MEMORY_EVERY_STEPS: pages of files come and go as the
        machine pleases.
        """
        player = self._new_player()
        player.witness.judge_every = SOAK_JUDGES_EVERY
        operations = random_operations(random.Random(seed), len(self.pool.prompts))
        process = psutil.Process()
        begin = time.monotonic()
        memory: list[int] = []
        wrong: list[str] = []
        while time.monotonic() - begin < seconds and len(wrong) < MOST_WRONG:
            if player.num_steps >= len(memory) * MEMORY_EVERY_STEPS:
                used = process.memory_info()
                memory.append(used.rss - used.shared)
            player.play(next(operations))
            wrong += player.strays()
            player.forget_those_gone()
        outcome = {"steps": player.num_steps, "tokens": player.num_tokens, "wrong": wrong, "memory": memory}
        return outcome | self._witnessed(player)

    @staticmethod
    def _witnessed(player: Player) -> dict[str, Any]:
        witness = player.witness
        return {"seen": {**witness.seen, **player.ends}, "relayed": witness.relayed, "faults": witness.faults}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints belongs to the log
    session = Session()
    for line in sys.stdin:
        method, arguments = json.loads(line)
        answers.write(json.dumps(getattr(session, method)(*arguments)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
