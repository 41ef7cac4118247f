"""Records what a real vLLM gives its attention builder, for the plan's tests: ``python record_steps.py``.

Writes tests/kernels/recorded_steps/*.json. Run it again after a change of vLLM; the files are committed, so that the
plan's tests need no engine.
"""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from typing import Any

from engines import IN_PROCESS, run_engines, tiny_llama, tree_prompts

TARGET = Path(__file__).parents[2] / "kernels" / "recorded_steps"
ENGINE = {
    "skip_tokenizer_init": True, "dtype": "float32", "block_size": 32, "max_model_len": 512,
    "max_num_batched_tokens": 256, "max_num_seqs": 8, "kv_cache_memory_bytes": 64 << 20,
    "worker_extension_cls": "engine_probe.StepRecorder",
}  # fmt: skip


# Small chunks end where a block ends, and few blocks are soon used again: what a row leaves behind its end is then
# sooner or later what another row holds there.
REUSING = {"num_gpu_blocks_override": 40, "long_prefill_token_threshold": 64}
CAPTURED_ROWS = 8

Steps = list[dict[str, Any]]


def record(
    folder: Path, model: Path, engine: dict[str, Any], scenario: dict[str, Any], calls: list[Any] | None = None
) -> Steps:
    """The steps of one run of stock vLLM, as its metadata builder saw them."""
    log = folder / "steps.jsonl"
    log.unlink(missing_ok=True)
    job = {"name": "a", "engine": {**ENGINE, **engine, "model": str(model)}, "scenarios": [scenario], "calls": calls}
    run_engines(folder, "stock", [job], {"RELAY_TEST_RECORD": str(log), **IN_PROCESS})
    return [json.loads(line) for line in log.read_text().splitlines()]


def bursts(count: int) -> dict[str, Any]:
    """Every few steps some requests that begin alike, of other lengths than those whose rows they take."""
    rng = random.Random(0)

    def text(length: int) -> list[int]:
        return [rng.randrange(3, 256) for _ in range(length)]

    prompts, arrivals = [], []
    for burst in range(count):
        document = text(rng.randrange(70, 260))
        for _ in range(rng.randrange(2, 4)):
            prompts.append(document[: rng.randrange(66, len(document) + 1)] + text(rng.randrange(1, 9)))
            arrivals.append(4 * burst)
    return {"name": "bursts", "prompts": prompts, "arrivals": arrivals, "max_tokens": 3}


def blocks_in_use(step: dict[str, Any], row: int) -> int:
    return -(-step["seq_lens"][row] // step["block_size"])


def as_gathered(steps: Steps) -> Steps:
    """The steps as vLLM's second model runner would hand them over, which does not run on CPU.

    The first clears a row that it frees. The second puts decodes first and shorter chunks before longer ones, and
    copies the blocks in use of each row into a table that lives as long as the engine: behind them, a row keeps what
    longer ones left there (worker/gpu/block_table.py, _gather_block_tables_kernel).
    """
    table = [[0] * len(steps[0]["block_table"][0]) for _ in range(ENGINE["max_num_seqs"])]
    gathered = []
    for step in steps:
        order = sorted(
            range(len(step["query_lens"])), key=lambda row: (step["query_lens"][row] != 1, step["query_lens"][row])
        )
        for place, row in enumerate(order):
            used = blocks_in_use(step, row)
            table[place][:used] = step["block_table"][row][:used]
        lengths = {key: [step[key][row] for row in order] for key in ("query_lens", "seq_lens")}
        gathered.append({**step, **lengths, "block_table": [list(blocks) for blocks in table[: len(order)]]})
    return gathered


def continues_another_row(step: dict[str, Any]) -> bool:
    """Whether all blocks of some row and the first one behind its end are what another row begins with."""
    table = step["block_table"]
    for i, row in enumerate(table):
        reach = blocks_in_use(step, i) + 1
        if reach <= len(row) and any(other[:reach] == row[:reach] for j, other in enumerate(table) if j != i):
            return True
    return False


def padded(step: dict[str, Any]) -> dict[str, Any]:
    """As the CUDA runners pad a batch up to a captured size: rows of the null block, with nothing in them."""
    rows = CAPTURED_ROWS - len(step["seq_lens"])
    width = len(step["block_table"][0])
    return {
        **step,
        "block_table": step["block_table"] + [[0] * width] * rows,
        "query_lens": step["query_lens"] + [0] * rows,
        "seq_lens": step["seq_lens"] + [0] * rows,
    }


def some_of(steps: Steps, count: int) -> Steps:
    """At most so many steps, spread over the run."""
    return steps[:: max(-(-len(steps) // count), 1)]


def save(name: str, origin: str, steps: Steps) -> None:
    TARGET.mkdir(exist_ok=True)
    kept = [{key: step[key] for key in ("block_table", "query_lens", "seq_lens")} for step in steps]
    document = {"origin": origin, "block_size": steps[0]["block_size"], "steps": kept}
    (TARGET / f"{name}.json").write_text(json.dumps(document, separators=(",", ":")) + "\n")
    print(f"{name}: {len(kept)} steps")


def main() -> None:
    from test_features import tiny_gemma3

    version = __import__("vllm").__version__
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        llama = tiny_llama(folder / "llama")
        prompts = tree_prompts()
        burst = {"name": "a", "prompts": [prompts[0]] * 4 + prompts[:8], "max_tokens": 12}
        steps = record(folder, llama, {}, burst)
        save("cold_burst", f"vLLM {version}: equal prompts at once into an empty cache", steps[:12])

        steps = as_gathered(record(folder, llama, REUSING, bursts(300)))
        sprung = [step for step in steps if continues_another_row(step)]
        origin = f"vLLM {version}: rows reused after longer ones, gathered as its second model runner does"
        save("stale_tails", origin, sprung[:10] + some_of(steps, 20))

        staggered = {"name": "b", "prompts": prompts, "max_tokens": 20, "arrivals": list(range(16))}
        steps = record(folder, llama, {}, staggered, [["dummy_step", [rows, 160]] for rows in (3, 8)])
        origin = f"vLLM {version}: batches padded as its CUDA runners pad them, then two that it made up to warm up"
        save("padded_rows", origin, [padded(step) for step in some_of(steps[:-2], 20) + steps[-2:]])

        crowded = {"name": "c", "prompts": prompts, "max_tokens": 60}
        steps = record(folder, llama, {"num_gpu_blocks_override": 40}, crowded)
        save("preemption", f"vLLM {version}: 40 blocks for 16 requests, preempted and recomputed", some_of(steps, 40))

        gemma = tiny_gemma3(folder / "gemma")
        steps = record(folder, gemma, {}, {"name": "d", "prompts": prompts, "max_tokens": 40})
        windowed = [step for step in steps if step["spec"] == "SlidingWindowSpec"]
        save(
            "sliding_window",
            f"vLLM {version}: a group of windowed layers, freed blocks are null",
            some_of(windowed, 40),
        )


if __name__ == "__main__":
    main()
