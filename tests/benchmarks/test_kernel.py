"""The kernel benchmark: steps as it says, kernels checked before they are timed, and rows that say what was found."""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from relay_benchmarks import kernel, kernel_peers
from relay_benchmarks.errors import BenchArgumentError, KernelCheckError
from relay_benchmarks.kernel import Ceilings, Measured, measure
from relay_benchmarks.kernel_peers import AbsentError, Peer, flex_attention, sdpa_copied
from relay_benchmarks.kernel_steps import OWN_TOKENS, KernelStep, Shape
from relay_benchmarks.summary import Quantiles
from relay_kernels.relay_attention.plan import CostModel

CPU = torch.device("cpu")
SMALL = Shape(6, 40, 2, query_heads=4, key_heads=2, head_size=16, block_size=16, dtype=torch.float32)


@pytest.fixture
def step() -> KernelStep:
    return KernelStep.make(SMALL, CPU, 0)


# ---------------------------------------------------------------- steps


def test_requests_share_what_the_shape_says(step: KernelStep) -> None:
    """40 tokens are two full blocks; requests take the two prompts in turn."""
    table = step.block_table.numpy()
    for row in range(6):
        for other in range(6):
            expected = 2 if row % 2 == other % 2 else 0
            assert int((table[row, :2] == table[other, :2]).sum()) == expected
    own = [set(table[row, 2:][table[row, 2:] > 0].tolist()) for row in range(6)]
    prefixes = set(table[:, :2].flatten().tolist())
    assert 0 not in prefixes
    for row, blocks in enumerate(own):
        assert len(blocks) == -(-(step.seq_lens[row] - 32) // 16)
        assert not blocks & prefixes
        assert not any(blocks & other for i, other in enumerate(own) if i != row)
    assert ((step.seq_lens - 32 >= OWN_TOKENS[0]) & (step.seq_lens - 32 <= OWN_TOKENS[1])).all()
    plan = step.plan(CostModel.always())
    assert [(segment.requests, segment.key_end) for segment in plan.shared] == [((0, 2, 4), 32), ((1, 3, 5), 32)]


def test_equal_seeds_give_equal_steps() -> None:
    first, second, other = (KernelStep.make(SMALL, CPU, seed) for seed in (1, 1, 2))
    assert torch.equal(first.key_cache, second.key_cache)
    assert torch.equal(first.block_table, second.block_table)
    assert not torch.equal(first.query, other.query)


def test_what_has_to_be_read_and_multiplied_is_counted(step: KernelStep) -> None:
    own = int((step.seq_lens - 32).sum())
    assert step.unique_keys == own + 2 * 32
    assert step.least_bytes == (own + 64) * (2 * 2 * 16 * 4) + 2 * 6 * 4 * 16 * 4
    assert step.flops == 4 * (own + 6 * 32) * 4 * 16
    moving, multiplying = Ceilings(1e9, 1e18).floor(step), Ceilings(1e18, 1e9).floor(step)
    assert moving == (step.least_bytes / 1e9, "memory")
    assert multiplying == (step.flops / 1e9, "arithmetic")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"requests": 0}, "requests must be at least 1, got 0"),
        ({"shared": -1}, "shared must not be negative, got -1"),
        ({"query_heads": 5}, "query heads must be a multiple of key heads, got 5 and 2"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(changes: dict[str, int], problem: str) -> None:
    fields = {"requests": 6, "shared": 40, "groups": 2, "query_heads": 4, "key_heads": 2, **changes}
    with pytest.raises(BenchArgumentError, match=problem):
        Shape(**fields)


# ---------------------------------------------------------------- kernels


@pytest.mark.parametrize("prepare", [sdpa_copied, flex_attention, kernel_peers.relay_cpu, kernel_peers.vllm_cpu])
@pytest.mark.parametrize("groups", [1, 3, 6])
def test_every_kernel_that_runs_here_computes_the_same(prepare: Any, groups: int) -> None:
    shape = Shape(6, 300, groups, query_heads=4, key_heads=2, head_size=64, block_size=128, dtype=torch.float32)
    step = KernelStep.make(shape, CPU, 0)
    try:
        layer = prepare(step)
    except AbsentError as reason:
        pytest.skip(str(reason))
    error, budget = step.error_and_budget(layer())
    assert error <= max(budget, 2e-6)


def test_a_copy_of_the_prefix_for_everybody_has_an_end(monkeypatch: pytest.MonkeyPatch, step: KernelStep) -> None:
    monkeypatch.setattr(kernel_peers, "MOST_COPIED_BYTES", 1000)
    with pytest.raises(AbsentError, match="copies of the prefix take"):
        sdpa_copied(step)


def right(step: KernelStep) -> Any:
    return sdpa_copied(step)


def wrong(step: KernelStep) -> Any:
    return lambda: torch.zeros_like(step.query)


def broken(step: KernelStep) -> Any:
    raise RuntimeError("no such instruction\nand more")


def absent(step: KernelStep) -> Any:
    raise AbsentError("not installed")


def test_only_kernels_that_are_right_are_timed(step: KernelStep) -> None:
    names = {"right": right, "wrong": wrong, "broken": broken, "absent": absent}
    found = {one.peer.name: one for one in measure(step, [Peer(name, prepare) for name, prepare in names.items()])}
    assert {name: one.status for name, one in found.items()} == {
        "right": "timed",
        "wrong": "wrong",
        "broken": "failed",
        "absent": "absent",
    }
    assert found["right"].times is not None
    assert found["right"].times.p50 > 0
    assert all(found[name].times is None for name in ("wrong", "broken", "absent"))
    assert (found["broken"].reason, found["absent"].reason) == ("no such instruction", "not installed")


def test_a_kernel_of_ours_that_breaks_ends_the_run(step: KernelStep) -> None:
    with pytest.raises(RuntimeError, match="no such instruction"):
        measure(step, [Peer("ours", broken, is_ours=True)])


# ---------------------------------------------------------------- rows


def test_ours_is_compared_with_the_best_other(step: KernelStep) -> None:
    def found(name: str, p50: float, is_ours: bool = False) -> Measured:
        return Measured(Peer(name, right, is_ours), "timed", "", 0.0, 1.0, Quantiles(p50, p50, p50))

    many = [found("relay", 2e-6, True), found("unshared", 1e-6, True), found("slow", 9e-6), found("fast", 5e-6)]
    rows = kernel.rows_of(step, many, Ceilings(1e12, 1e15), {"time": "now"})
    assert [(row["kernel"], row["best_other"], row["speedup"]) for row in rows] == [
        ("relay", "fast", 2.5),
        ("unshared", "fast", 5.0),
        ("slow", "", ""),
        ("fast", "", ""),
    ]
    assert set(rows[0]) == set(kernel.KERNEL_COLUMNS)
    alone = kernel.rows_of(step, many[:1], Ceilings(1e12, 1e15), {})[0]
    assert (alone["best_other"], alone["speedup"]) == ("", "")


def options(tmp_path: Path, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    kernel.add_arguments(parser)
    small = ["--requests", "4", "--shared", "0,128", "--groups", "1,2,8", "--heads", "2:1", "--head-size", "32"]
    common = ["--device", "cpu", "--dtype", "float32", "--output", str(tmp_path / "rows.csv")]
    return parser.parse_args([*common, *small, *words])


@pytest.fixture
def few_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "peers_for", lambda device: [Peer("relay", right, True), Peer("other", right)])
    monkeypatch.setattr(kernel, "ROUNDS", 1)
    monkeypatch.setattr(kernel, "LEAST_SECONDS", 1e-6)
    monkeypatch.setattr(kernel, "CPU_MATRIX_SIDE", 64)
    monkeypatch.setattr(kernel, "CPU_COPIED_BYTES", 1 << 20)


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.usefixtures("few_peers")
def test_a_run_writes_rows_and_draws(tmp_path: Path) -> None:
    said: list[str] = []
    rows = kernel.run(options(tmp_path, "--plot", str(tmp_path / "plot.png")), said.append)
    written = read(tmp_path / "rows.csv")
    assert [(row["groups"], row["shared_tokens"], row["kernel"]) for row in written] == [
        (groups, shared, name) for groups in "12" for shared in ("0", "128") for name in ("relay", "other")
    ]  # eight prompts are more than there are requests
    assert {row["status"] for row in written} == {"timed"}
    assert {row["best_other"] for row in written if row["kernel"] == "relay"} == {"other"}
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "GB/s copying" in said[0]
    assert "1 of 4: 4 requests, 1 x 0 shared, 2:1 heads: relay" in said[1]
    assert "of floor" in kernel.result_table(rows)


@pytest.mark.usefixtures("few_peers")
def test_a_run_that_is_cut_short_keeps_its_rows(tmp_path: Path) -> None:
    said: list[str] = []
    assert kernel.run(options(tmp_path, "--seconds", "0"), said.append) == []
    assert said[-1] == "0 s are over: 4 of 4 shapes are left out"
    assert read(tmp_path / "rows.csv") == []


@pytest.mark.usefixtures("few_peers")
def test_a_wrong_kernel_of_ours_ends_the_run_and_keeps_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "peers_for", lambda device: [Peer("relay", wrong, True), Peer("other", right)])
    with pytest.raises(KernelCheckError, match=r"relay is wrong on 4 requests, 1 x 0 shared"):
        kernel.run(options(tmp_path), lambda text: None)
    assert [row["status"] for row in read(tmp_path / "rows.csv")] == ["wrong", "timed"]


@pytest.mark.usefixtures("few_peers")
def test_a_step_that_does_not_fit_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = KernelStep.make

    def made(shape: Shape, device: torch.device, seed: int) -> KernelStep:
        if shape.shared:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make(shape, device, seed)

    monkeypatch.setattr(KernelStep, "make", made)
    said: list[str] = []
    rows = kernel.run(options(tmp_path), said.append)
    assert {row["shared_tokens"] for row in rows} == {0}
    assert any("4 requests, 1 x 128 shared, 2:1 heads: left out, for it does not fit" in line for line in said)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--kernels", "relay,warp"), "--kernels is 'warp'; here it must be of relay, other"),
        (("--heads", "3:2"), "query heads must be a multiple of key heads, got 3 and 2"),
        (("--requests", "0", "--groups", "0"), "requests must be at least 1, got 0"),
    ],
)
@pytest.mark.usefixtures("few_peers")
def test_a_mistake_is_named_before_anything_is_measured(tmp_path: Path, words: Sequence[str], problem: str) -> None:
    with pytest.raises(BenchArgumentError, match=problem):
        kernel.run(options(tmp_path, *words), lambda text: None)
    assert not (tmp_path / "rows.csv").exists()


def test_a_gpu_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BenchArgumentError, match="--device is cuda, and PyTorch sees no GPU here"):
        kernel.run(options(tmp_path, "--device", "cuda"), lambda text: None)


WITHOUT_VLLM = """
import sys
from relay_benchmarks import kernel

kernel.CPU_MATRIX_SIDE, kernel.CPU_COPIED_BYTES, kernel.ROUNDS = 64, 1 << 20, 1
status = kernel.main(sys.argv[1:])
assert not [name for name in sys.modules if name.split(".")[0] in ("vllm", "fastapi")], "of no use here"
sys.exit(status)
"""


def test_it_runs_without_vllm(tmp_path: Path) -> None:
    shape = ["--requests", "2", "--shared", "128", "--groups", "1", "--heads", "2:1", "--head-size", "32"]
    words = ["--device", "cpu", "--kernels", "sdpa copied", *shape, "--output", str(tmp_path / "rows.csv")]
    done = subprocess.run([sys.executable, "-c", WITHOUT_VLLM, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "sdpa copied" in done.stdout
    assert [row["status"] for row in read(tmp_path / "rows.csv")] == ["timed"]


INTERPRETED = """
import torch
from relay_benchmarks.kernel_peers import relay_triton, relay_triton_unshared
from relay_benchmarks.kernel_steps import KernelStep, Shape

shape = Shape(4, 64, 2, query_heads=4, key_heads=2, head_size=32, block_size=16, dtype=torch.float32)
step = KernelStep.make(shape, torch.device("cpu"), 0)
for prepare in (relay_triton, relay_triton_unshared):
    error, budget = step.error_and_budget(prepare(step)())
    assert error <= max(budget, 2e-6), (prepare, error, budget)
"""


def test_the_triton_kernels_are_prepared_rightly() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
