"""The CSV file that rows of results are appended to, never rewritten. Columns are explained in results/README.md."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from relay_benchmarks.errors import ResultsFileError

RESULTS_FOLDER = Path(__file__).parent / "results"

RUN_COLUMNS = (
    *("time", "status", "machine", "cpu", "cores", "memory_gib", "load_at_start", "commit"),
    *("relay_version", "vllm_version", "torch_version"),
)
ENGINE_COLUMNS = ("model", "dtype", "layers", "query_heads", "key_heads", "head_size", "compiled")
COUNTED = ("relay_steps", "eligible_steps", "steps", "layer_calls", "kv_tokens_saved")
DECODE_COLUMNS = (
    *RUN_COLUMNS,
    *ENGINE_COLUMNS,
    *("workload", "batch", "shared_tokens", "question_tokens", "decode_steps", "block_size", "default_block_size"),
    *("cache", "seed", "side", "backend", "kernel", "rounds"),
    *("p20_ms", "p50_ms", "p80_ms", "round_medians_ms", "speedup_median", "speedup_min", "speedup_max"),
    *("ratio_to_no_prompt", "equal_tokens", "self_equal_tokens", "other_side_cpu_percent"),
    *COUNTED,
    *("planning_us", "planning_percent"),
)


class ResultsFile:
    """Append-only; a file with other columns is refused rather than mixed."""

    def __init__(self, path: Path, columns: Sequence[str] = DECODE_COLUMNS) -> None:
        self.path = path
        self._columns = tuple(columns)

    def prepare(self) -> None:
        """Write the header where there is no file yet, check it where there is. Raises ResultsFileError."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+", newline="", encoding="utf-8") as file:
                file.seek(0)
                text = file.read()
                if not text:
                    csv.writer(file, lineterminator="\n").writerow(self._columns)
                    return
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ResultsFileError(
                f"cannot append to the results file {self.path}: {reason}; name another with --output"
            ) from error
        header = tuple(next(csv.reader([text.splitlines()[0]]), []))
        if header != self._columns:
            odd = sorted(set(header) ^ set(self._columns)) or ["the order"]
            raise ResultsFileError(
                f"{self.path} has other columns than this release writes (differing: {', '.join(odd)}); "
                "name another file with --output"
            )
        if not text.endswith("\n"):
            raise ResultsFileError(f"{self.path} ends in half a row; end its last line, or name another with --output")

    def append(self, rows: Sequence[Mapping[str, object]]) -> None:
        """Every row must fill exactly the columns; what has no value is the empty string."""
        for row in rows:
            if set(row) != set(self._columns):
                raise ValueError(f"a row's columns differ: {sorted(set(row) ^ set(self._columns))}")
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns, lineterminator="\n").writerows(rows)
