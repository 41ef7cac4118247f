"""Options of every benchmark that runs whole models on both sides, and how they reach vLLM."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from relay_benchmarks.errors import BenchArgumentError

GIB = 1 << 30
DTYPES = ("bfloat16", "float16", "float32")


class Cache(StrEnum):
    """What is in the prefix cache when the clock starts: it is emptied before each measurement."""

    WARM = "warm"  # what requests share, and nothing else
    COLD = "cold"  # nothing


def require(holds: bool, flag: str, value: object, expected: str) -> None:
    """Raises BenchArgumentError, naming the flag and its value, unless it holds."""
    if not holds:
        raise BenchArgumentError(f"{flag} {value} is not possible; it must be {expected}")


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """The same on both sides.

    Attributes:
        question_tokens: shortest and longest question.
        rounds: alternated pairs of measurements.
        block_size, max_model_len: None is vLLM's default.
        kv_cache_bytes: of each side.
    """

    question_tokens: tuple[int, int] = (8, 60)
    rounds: int = 3
    dtype: str = "bfloat16"
    block_size: int | None = None
    max_model_len: int | None = None
    kv_cache_bytes: int = 2 * GIB
    enforce_eager: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        low, high = self.question_tokens
        require(1 <= low <= high, "--question", f"{low}-{high}", "LOW-HIGH with 1 <= LOW <= HIGH")
        require(self.rounds >= 1, "--rounds", self.rounds, "1 or more")
        require(self.block_size is None or self.block_size >= 1, "--block-size", self.block_size, "1 token or more")
        require(
            self.max_model_len is None or self.max_model_len >= 1, "--max-model-len", self.max_model_len, "1 or more"
        )
        require(self.kv_cache_bytes >= 1 << 20, "--kv-cache-memory-bytes", self.kv_cache_bytes, "at least 1 MiB")
        require(0 <= self.seed < 2**32, "--seed", self.seed, "0 to 2^32 - 1")

    def vllm_arguments(self, model: str, max_num_seqs: int) -> dict[str, Any]:
        """vLLM's engine arguments, the same on both sides; what is left out is vLLM's default."""
        chosen = {
            "model": model,
            "dtype": self.dtype,
            "block_size": self.block_size,
            "max_model_len": self.max_model_len,
            "kv_cache_memory_bytes": self.kv_cache_bytes,
            "enforce_eager": self.enforce_eager,
            "max_num_seqs": max_num_seqs,
            "enable_prefix_caching": True,
            "seed": self.seed,
        }
        return {name: value for name, value in chosen.items() if value is not None}

    def check_fits(self, parts: str, total: int, max_model_len: int) -> None:
        """Raises BenchArgumentError if the longest request, made of `parts`, does not fit into the context."""
        if total > max_model_len:
            raise BenchArgumentError(f"{parts} make {total}, over the model's context of {max_model_len}; shorten one")


def add_arguments(parser: argparse.ArgumentParser, defaults: EngineOptions, results: str) -> None:
    """The flags of `EngineOptions`, a model and where results go; `results` names the default file."""
    add = parser.add_argument
    add("model", nargs="?", help="hub id or folder; an embedded model if left out")
    low, high = defaults.question_tokens
    add(
        "--question",
        type=integer_range,
        default=(low, high),
        metavar="LOW-HIGH",
        help=f"question tokens ({low}-{high})",
    )
    add("--rounds", type=int, default=defaults.rounds, metavar="N", help="alternated pairs (%(default)s)")
    add("--dtype", default=defaults.dtype, choices=DTYPES, help="(%(default)s)")
    add("--block-size", type=int, metavar="N", help="cache block of both sides (default: vLLM's)")
    add("--max-model-len", type=int, metavar="N", help="context of both sides (default: the model's)")
    add(
        "--kv-cache-memory-bytes",
        type=int,
        default=defaults.kv_cache_bytes,
        metavar="N",
        help="KV cache of each side (%(default)s)",
    )
    add(
        "--enforce-eager",
        action=argparse.BooleanOptionalAction,
        default=defaults.enforce_eager,
        help="do not compile the model, on either side (default: compile, as the server does)",
    )
    add("--seed", type=int, default=defaults.seed, metavar="N", help="of the prompts (%(default)s)")
    add("--output", type=Path, metavar="CSV", help=f"append rows here (default: results/{results} of this package)")
    add("--plot", type=Path, metavar="PNG", help="draw cost against shared tokens here (default: beside the rows)")


def chosen(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of `EngineOptions` as parsed by what `add_arguments` added."""
    return {
        "question_tokens": args.question,
        "rounds": args.rounds,
        "dtype": args.dtype,
        "block_size": args.block_size,
        "max_model_len": args.max_model_len,
        "kv_cache_bytes": args.kv_cache_memory_bytes,
        "enforce_eager": args.enforce_eager,
        "seed": args.seed,
    }


def integers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def integer_range(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    return int(low), int(high or low)


integers.__name__ = "list of whole numbers"  # argparse names the type by it
integer_range.__name__ = "range"
