"""Helpers of the tests that run real vLLM engines: starting one side, tiny models, comparing tokens."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PATIENCE_SECONDS = 1200.0
JUDGES = HERE.parents[1] / "kernels"  # what judges plans and work lists there judges those of engines, too
STOCK_IMPL = "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackendImpl"
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
RELAY_IMPL = "relay_serving.vllm_plugin.attention_backend.RelayCPUImpl"
INTERPRETED_IMPL = "interpreted_gpu_backend.InterpretedImpl"


def run_engines(
    folder: Path,
    side: str,
    jobs: list[dict[str, Any]],
    environment: dict[str, str] | None = None,
    *,
    implementation: str | None = None,
) -> tuple[list[dict[str, Any]], str]:
    """The driver's report for each engine, and everything that was logged.

    Args:
        folder: for the job and result files.
        side: "stock" (no plugin of ours is loaded, and its layers are asserted to be vLLM's) or "relay" (ours).
        jobs: ``{"name", "engine", "scenarios"}`` each; ``engine`` holds arguments of vLLM's LLM. ``calls``, if given,
            are made to the workers after the scenarios: ``[[method, arguments], ...]``.
        environment: variables beside the cleaned ones of this process.
        implementation: the class all layers must have on both sides, where relay replaces none; it then counts nothing.
    """
    job_file, result_file = folder / f"{side}.jobs.json", folder / f"{side}.results.json"
    job_file.write_text(json.dumps(jobs))
    command = [sys.executable, str(HERE / "engine_driver.py"), str(job_file), str(result_file)]
    variables = environment_of(side, environment)
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False)
    log = done.stdout + done.stderr
    assert done.returncode == 0, f"the {side} engine failed:\n{log[-6000:]}"
    reports: list[dict[str, Any]] = json.loads(result_file.read_text())
    for report in reports:
        check_layers(side, report, implementation)
    return reports, log


def environment_of(side: str, changes: dict[str, str] | None = None) -> dict[str, str]:
    """This process's variables for an engine of one side, without what somebody may have set for vLLM."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("VLLM_", "TRITON_")) or k == "VLLM_RELAY_CACHE"}
    return {
        **clean,
        "VLLM_PLUGINS": "relay" if side == "relay" else "",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(JUDGES), *filter(None, [os.environ.get("PYTHONPATH")])]),
        **(changes or {}),
    }


def check_layers(side: str, report: dict[str, Any], implementation: str | None = None) -> None:
    """Stock means stock: all layers of a report are of the class that this side runs, and only relay counts."""
    expected = implementation or (RELAY_IMPL if side == "relay" else STOCK_IMPL)
    for layers in report["layers"]:
        assert set(layers) == {expected}, f"the {side} engine ran {layers}"
    assert bool(report["counters"]) == (expected in (RELAY_IMPL, INTERPRETED_IMPL))


def run_engine(
    folder: Path,
    side: str,
    engine: dict[str, Any],
    scenarios: list[dict[str, Any]],
    environment: dict[str, str] | None = None,
) -> dict[str, Any]:
    """One engine's report; its log is under "log"."""
    jobs = [{"name": side, "engine": engine, "scenarios": scenarios}]
    (report,), log = run_engines(folder, side, jobs, environment)
    return {**report, "log": log}


class EngineSession:
    """A process of one side in which one engine at a time plays scripts (engine_session.py).

    If it dies, whoever asked gets an AssertionError with the end of its log, and the next question starts it anew.

    Args:
        folder: for its log.
        side, environment: as for `run_engines`.
    """

    def __init__(self, folder: Path, side: str, environment: dict[str, str]) -> None:
        self.side = side
        self._log = folder / f"{side}.log"
        self._variables = environment_of(side, {**environment, **IN_PROCESS})
        self._engine: dict[str, Any] = {}
        self._pool: list[Any] | None = None
        self._process: subprocess.Popen[str] | None = None

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def open(self, engine: dict[str, Any]) -> None:
        """Have an engine with these arguments of vLLM's LLM, instead of the one before if that is another."""
        if self._process is not None and self._engine == engine:
            return
        if self._engine.get("speculative_config"):  # it loaded numba, after which vLLM starts no other engine there
            self.close()
        self._engine, self._pool = engine, None
        self._start()

    def take(self, prompts: list[list[int]], answers: list[list[int]]) -> None:
        """The pool of all scripts from now on, in this engine."""
        self._pool = [prompts, answers]
        self._send("take", self._pool)

    def ask(self, method: str, *arguments: Any, timeout: float = PATIENCE_SECONDS) -> Any:
        """The answer of a method of engine_session.Session."""
        if self._process is None:
            self._start()
            self._send("take", self._pool or [[], []])
        return self._send(method, list(arguments), timeout)

    def close(self) -> None:
        if self._process is not None:
            self._process.stdin.close()  # type: ignore[union-attr]
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process.stdout.close()  # type: ignore[union-attr]
            self._process = None

    def _start(self) -> None:
        if self._process is None:
            command, pipe = [sys.executable, str(HERE / "engine_session.py")], subprocess.PIPE
            with self._log.open("a") as log:
                self._process = subprocess.Popen(
                    command, env=self._variables, stdin=pipe, stdout=pipe, stderr=log, text=True
                )
        check_layers(self.side, self._send("open", [self._engine]))

    def _send(self, method: str, arguments: list[Any], timeout: float = PATIENCE_SECONDS) -> Any:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps([method, arguments]) + "\n")
            process.stdin.flush()
            is_ready, _, _ = select.select([process.stdout], [], [], timeout)
            line = process.stdout.readline() if is_ready else ""
        except BrokenPipeError:
            line = ""
        if not line:
            process.kill()
            self.close()
            raise AssertionError(f"the {self.side} engine did not answer {method!r}:\n{self.log[-6000:]}")
        return json.loads(line)


def relay_counters(report: dict[str, Any]) -> dict[str, Any]:
    """The counters of the one engine of a relay report."""
    (values,) = report["counters"]
    return dict(values)


def tiny_llama(folder: Path, **overrides: Any) -> Path:
    """A two-layer Llama with random weights, saved for vLLM with ``skip_tokenizer_init``."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(overrides.pop("seed", 0))
    shape = {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 256, "max_position_embeddings": 2048,
        "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    return save_tiny(folder, LlamaForCausalLM(LlamaConfig(**{**shape, **overrides})))


def save_tiny(folder: Path, model: Any) -> Path:
    """Save a random model in float32."""
    model.float().save_pretrained(folder)
    return folder


def tree_prompts(seed: int = 0, vocab: int = 256) -> list[list[int]]:
    """Sixteen prompts: two systems; under the first, two documents; ragged questions; three that share nothing."""
    import random

    rng = random.Random(seed)

    def text(length: int) -> list[int]:
        return [rng.randrange(3, vocab) for _ in range(length)]

    system_a, system_b = text(140), text(101)
    documents = [text(70), text(96)]
    prompts = [system_a + documents[i % 2] + text(5 + 3 * i) for i in range(8)]
    prompts += [system_b + text(9 + 7 * i) for i in range(5)]
    return prompts + [text(20 + 31 * i) for i in range(3)]


def divergences(stock: dict[str, Any], relay: dict[str, Any]) -> list[tuple[int, int, float | None]]:
    """(request, place, stock's gap between its two best log-probabilities) of each request's first differing token."""
    found = []
    for i, (left, right) in enumerate(zip(stock["tokens"], relay["tokens"], strict=True)):
        assert len(left) == len(right)
        for place, pair in enumerate(zip(left, right, strict=True)):
            if pair[0] != pair[1]:
                gap = stock["gaps"][i][place] if stock["gaps"][i] else None
                found.append((i, place, gap))
                break
    return found
