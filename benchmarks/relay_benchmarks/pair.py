"""The model that both sides run, and starting them: engines for decode and throughput, servers for serve."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from relay_benchmarks.errors import BenchArgumentError
from relay_benchmarks.processes import MeasuredProcess, close_all
from relay_benchmarks.sides import Engine, Side, check_sides, environment_of
from relay_serving import embedded_model
from relay_serving.errors import ModelNotFoundError
from relay_serving.settings import RelaySettings

P = TypeVar("P", bound=MeasuredProcess)


def say(line: str) -> None:
    """A line of progress."""
    print(line, file=sys.stderr, flush=True)


def context_of(model: str | None) -> int | None:
    """The model's context, as far as it can be known before a minute is spent on starting it twice.

    Raises ModelNotFoundError for a folder that is none, or holds no model.
    """
    if model is None:
        return embedded_model.CONTEXT_TOKENS
    if not os.path.exists(model):
        if model.startswith((".", "/", "~")) or model.count("/") > 1:
            raise ModelNotFoundError(f"no model folder at {model!r}; check the path, or leave it out")
        return None
    config = Path(model) / "config.json"
    if not config.is_file():
        raise ModelNotFoundError(f"{model!r} holds no config.json; name the folder of a Hugging Face model")
    try:
        return int(json.loads(config.read_text())["max_position_embeddings"])
    except (ValueError, KeyError, TypeError):
        return None


def shown_name(model: str | None, embedded: str = embedded_model.SMOLLM2) -> str:
    """The name in tables and rows: of a folder only its last part."""
    if model is None:
        return embedded
    return Path(model).resolve().name if os.path.exists(model) else model


@contextmanager
def closing(processes: Mapping[Side, P]) -> Iterator[None]:
    """Ends the processes; their logs are kept where one of them may be to blame."""
    keeps_logs = True
    try:
        yield
        keeps_logs = False
    except (KeyboardInterrupt, BenchArgumentError):
        keeps_logs = False  # nothing a process of ours did
        raise
    finally:
        close_all(processes.values())
        if not keeps_logs:
            for process in processes.values():
                process.forget_log()


@contextmanager
def running_engines(
    engine_args: Mapping[str, Any], settings: RelaySettings, seed: int, model: str
) -> Iterator[tuple[dict[Side, Engine], dict[Side, dict[str, Any]]]]:
    """Both engines, started at once, checked to be what they are called, and ended; and what each says of itself."""
    engines: dict[Side, Engine] = {}
    with closing(engines):
        for side in Side:
            engines[side] = Engine(side, environment_of(side, os.environ))
        began = time.monotonic()
        for side, engine in engines.items():
            say(f"starting {side} (log: {engine.log_path})")
            ours = {"additional_config": settings.to_additional_config()} if side is Side.RELAY else {}
            engine.request("start", engine_args={**engine_args, **ours})
        described = {}
        for side, engine in engines.items():
            engine.answer()
            described[side] = engine.call("describe", check_kernel=side is Side.RELAY, seed=seed)
            say_it_is_up(side, described[side], began)
        check_sides(described, model)
        yield engines, described


def say_it_is_up(side: Side, described: Mapping[str, Any], began: float) -> None:
    say(f"{side} is up after {time.monotonic() - began:.0f} s: {', '.join(described['backends'])}")
