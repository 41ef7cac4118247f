"""The CPU kernels, compiled and plain torch, against the reference, in vLLM's packed layouts with NaN between keys."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cpu_layouts import packed_caches
from relay_tensors import Problem, assert_within_budget, make_problem, tree_step

from relay_kernels.relay_attention import cpu_build
from relay_kernels.relay_attention.cpu import CpuRun, relay_attention_cpu
from relay_kernels.relay_attention.cpu_torch import relay_attention_cpu_torch
from relay_kernels.relay_attention.plan import CostModel, make_plan
from relay_kernels.relay_attention.work_list import WorkList, make_work_list

HAS_AMX = torch.cpu._is_amx_tile_supported()
needs_amx = pytest.mark.skipif(not HAS_AMX, reason="this CPU has no AMX")

KERNELS: list[Callable[..., None]] = [relay_attention_cpu, relay_attention_cpu_torch]
FORMATS = [
    pytest.param("vec", torch.float32, id="vec-fp32"),
    pytest.param("vec", torch.float16, id="vec-fp16"),
    pytest.param("vec", torch.bfloat16, id="vec-bf16"),
    pytest.param("vec16", torch.float32, id="vec16-fp32"),
    pytest.param("amx", torch.bfloat16, id="amx-bf16", marks=needs_amx),
]
# Rows of (leading blocks, query_len, seq_len); see tree_step.
TREE = [
    ([0, 1, 2], 1, 3 * 32 + 1),
    ([0, 1, 2], 1, 3 * 32 + 37),
    ([0, 1, 3], 1, 3 * 32 + 63),
    ([0, 1, 3], 5, 3 * 32 + 11),
    ([4], 1, 111),
    ([4], 63, 32 + 63),
    ([], 1, 1),
    ([], 37, 37),
    ([], 0, 0),
]


def run_kernel(
    kernel: Callable[..., None], problem: Problem, layout: str, max_keys: int | None = 64, cost: CostModel | None = None
) -> tuple[torch.Tensor, torch.Tensor, WorkList]:
    step = problem.step
    plan = make_plan(
        step.block_table, step.query_lens, step.seq_lens, block_size=step.block_size,
        cost_model=cost or CostModel.always(),
    )  # fmt: skip
    work = make_work_list(plan, max_keys_per_segment=max_keys)
    key_cache, value_cache = packed_caches(problem.key_cache, problem.value_cache, layout)
    out = torch.empty_like(problem.query)
    lse = torch.empty(out.shape[:2])
    kernel(
        problem.query, key_cache, value_cache, problem.block_table, work, scale=problem.scale, out=out, layout=layout,
        lse_TN=lse,
    )  # fmt: skip
    return out[: work.num_tokens].double(), lse[: work.num_tokens].double(), work


def check(problem: Problem, out: torch.Tensor, lse: torch.Tensor) -> None:
    exact_out, exact_lse = problem.reference()
    plain_out, plain_lse = problem.reference(problem.query.dtype)
    if not torch.isfinite(plain_lse[torch.isfinite(exact_lse)]).all():  # plain float16 overflows where ours must not
        plain_out, plain_lse = problem.reference(torch.float32)
        plain_out = plain_out.to(problem.query.dtype).double()
    assert_within_budget(out, plain_out, exact_out)
    assert_within_budget(lse, plain_lse, exact_lse)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("layout", "dtype"), FORMATS)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(9, 3), (8, 1), (2, 2)], ids=["gqa3", "mqa8", "mha"])
def test_a_tree_of_ragged_requests_equals_the_reference(
    kernel: Callable[..., None], layout: str, dtype: torch.dtype, num_heads: int, num_kv_heads: int
) -> None:
    problem = make_problem(
        tree_step(32, TREE), num_heads=num_heads, num_kv_heads=num_kv_heads, head_size=64, dtype=dtype,
        device=torch.device("cpu"),
    )  # fmt: skip
    out, lse, work = run_kernel(kernel, problem, layout)
    assert any(end - begin > 3 for *_, begin, end in work.segments.tolist()), "something should be shared"
    check(problem, out, lse)


@pytest.mark.parametrize(("layout", "dtype"), FORMATS)
@pytest.mark.parametrize("head_size", [32, 64, 80, 96, 112, 128, 160, 192, 224, 256])
def test_every_head_size_equals_the_reference(layout: str, dtype: torch.dtype, head_size: int) -> None:
    if head_size % 32 and layout != "vec16":
        pytest.skip("vLLM keeps head sizes that 32 does not divide in the vec16 layout")
    problem = make_problem(
        tree_step(32, TREE[1:6]), num_heads=6, num_kv_heads=2, head_size=head_size, dtype=dtype,
        device=torch.device("cpu"),
    )  # fmt: skip
    check(problem, *run_kernel(relay_attention_cpu, problem, layout)[:2])


@pytest.mark.parametrize("block_size", [16, 48, 128])
@pytest.mark.parametrize("max_keys", [None, 1, 100])
def test_block_sizes_and_cuts_do_not_matter(block_size: int, max_keys: int | None) -> None:
    rows = [([0, 1], 1, 2 * block_size + i) for i in (1, 5, block_size)]
    problem = make_problem(
        tree_step(block_size, rows), num_heads=3, num_kv_heads=1, head_size=80, dtype=torch.float32,
        device=torch.device("cpu"),
    )  # fmt: skip
    check(problem, *run_kernel(relay_attention_cpu, problem, "vec16", max_keys)[:2])


@pytest.mark.parametrize(("layout", "dtype"), FORMATS)
@pytest.mark.parametrize("num_requests", [1, 2, 130, 512])
def test_many_requests_over_one_prefix(layout: str, dtype: torch.dtype, num_requests: int) -> None:
    step = tree_step(32, [([0, 1], 1, 64 + 1 + i % 35) for i in range(num_requests)])
    problem = make_problem(
        step, num_heads=3, num_kv_heads=1, head_size=32, dtype=dtype, device=torch.device("cpu")
    )  # fmt: skip
    check(problem, *run_kernel(relay_attention_cpu, problem, layout)[:2])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("layout", "dtype"), FORMATS)
def test_scores_as_large_as_ten_thousand_neither_overflow_nor_vanish(
    kernel: Callable[..., None], layout: str, dtype: torch.dtype
) -> None:
    problem = make_problem(
        tree_step(32, TREE[:6]), num_heads=4, num_kv_heads=2, head_size=64, dtype=dtype, device=torch.device("cpu")
    )  # fmt: skip
    problem.query.mul_(1e4 / 4 / float(problem.query.double().norm(dim=-1).max() * problem.scale))
    out, lse, _ = run_kernel(kernel, problem, layout)
    assert torch.isfinite(out).all()
    assert lse.abs().max() > 1e3
    check(problem, out, lse)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_token_that_sees_nothing_gets_zeros_and_minus_infinity(kernel: Callable[..., None]) -> None:
    step = tree_step(32, [([], 2, 0), ([], 1, 5)])
    problem = make_problem(step, num_heads=2, num_kv_heads=1, head_size=32, dtype=torch.float32,
                           device=torch.device("cpu"))  # fmt: skip
    out, lse, _ = run_kernel(kernel, problem, "vec")
    assert torch.equal(out[:2], torch.zeros(2, 2, 32, dtype=torch.float64))
    assert torch.isneginf(lse[:2]).all()
    assert torch.isfinite(lse[2]).all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("layout", "dtype"), FORMATS)
@pytest.mark.parametrize("max_keys", [None, 32], ids=["one slot", "several slots"])
@pytest.mark.parametrize("where", ["query", "key"])
def test_a_nan_that_is_seen_reaches_the_output(
    kernel: Callable[..., None], layout: str, dtype: torch.dtype, max_keys: int | None, where: str
) -> None:
    rows: list[tuple[list[int], int, int]] = [([], 1, 100), ([], 1, 77), ([], 3, 50)]
    problem = make_problem(
        tree_step(32, rows), num_heads=2, num_kv_heads=1, head_size=32, dtype=dtype, device=torch.device("cpu")
    )
    if where == "query":
        problem.query[0] = float("nan")
    else:
        problem.key_cache[problem.block_table[0, 1], 3] = float("nan")
    out, lse, _ = run_kernel(kernel, problem, layout, max_keys)
    exact_out, exact_lse = problem.reference()
    assert exact_out[0].isnan().all()
    assert torch.equal(out.isnan(), exact_out.isnan())
    assert torch.equal(lse.isnan(), exact_lse.isnan())


def test_one_run_serves_every_layer_and_leaves_padding_alone() -> None:
    problem = make_problem(
        tree_step(32, TREE), num_heads=6, num_kv_heads=2, head_size=64, dtype=torch.float32,
        device=torch.device("cpu"), num_padding_tokens=3,
    )  # fmt: skip
    step = problem.step
    plan = make_plan(step.block_table, step.query_lens, step.seq_lens, block_size=32, cost_model=CostModel.always())
    work = make_work_list(plan, max_keys_per_segment=64)
    shape = {"num_heads": 6, "num_kv_heads": 2, "head_size": 64, "block_size": 32}
    run = CpuRun(work, problem.block_table, **shape, dtype=torch.float32, layout="vec")
    for layer in range(3):
        key_cache, value_cache = packed_caches(problem.key_cache * (layer + 1), problem.value_cache - layer, "vec")
        out = torch.full_like(problem.query, 7.0)
        run(problem.query, key_cache, value_cache, scale=problem.scale, out_TND=out)
        expected = Problem(
            step, problem.query, problem.key_cache * (layer + 1), problem.value_cache - layer, problem.block_table,
            problem.scale,
        ).reference()[0]  # fmt: skip
        assert torch.allclose(out[:-3].double(), expected, atol=1e-5)
        assert (out[-3:] == 7.0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float64}, "dtype"),
        ({"layout": "neon"}, "layout must be one of .* 'neon'"),
        ({"num_heads": 7}, r"num_heads \(7\)"),
        ({"head_size": 72}, r"head_size \(72\)"),
        ({"layout": "amx", "dtype": torch.float32}, "bfloat16"),
    ],
)
def test_what_the_kernel_cannot_serve_is_refused_by_name(change: dict[str, object], message: str) -> None:
    work = make_work_list(
        make_plan(torch.ones(1, 1, dtype=torch.int32).numpy(), [1], [1], block_size=32, cost_model=CostModel()),
        max_keys_per_segment=None,
    )
    shape: dict[str, object] = {
        "num_heads": 4, "num_kv_heads": 2, "head_size": 64, "block_size": 32, "dtype": torch.float32, "layout": "vec",
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        CpuRun(work, torch.ones(1, 1, dtype=torch.int32), **{**shape, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("query", lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), "query must hold .* contiguous heads"),
        ("out", lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), "out must hold .* contiguous heads"),
        ("query", lambda t: t[:1], "query must hold"),
        ("query", lambda t: t.half(), "out must be torch.float16"),
        ("key_cache", lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), "key_cache must hold .* packed runs"),
        ("value_cache", lambda t: t.half(), "value_cache must be torch.float32"),
        ("key_cache", lambda t: t[:1], "key_cache must hold . blocks"),
        ("block_table", lambda t: t.long(), "block_table must be int32"),
        ("block_table", lambda t: t[:, :1], "work_list names row . and key"),
        ("block_table", lambda t: -t, "block_table holds the block -"),
    ],
)
def test_tensors_that_would_be_misread_are_refused_by_name(
    name: str, change: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    problem = make_problem(
        tree_step(32, TREE[:2]), num_heads=4, num_kv_heads=2, head_size=64, dtype=torch.float32,
        device=torch.device("cpu"),
    )  # fmt: skip
    step = problem.step
    plan = make_plan(step.block_table, step.query_lens, step.seq_lens, block_size=32, cost_model=CostModel.always())
    key_cache, value_cache = packed_caches(problem.key_cache, problem.value_cache, "vec")
    tensors = {
        "query": problem.query, "key_cache": key_cache, "value_cache": value_cache,
        "block_table": problem.block_table, "out": torch.empty_like(problem.query),
    }  # fmt: skip
    tensors[name] = change(tensors[name])
    with pytest.raises(ValueError, match=message):
        relay_attention_cpu(
            tensors["query"], tensors["key_cache"], tensors["value_cache"], tensors["block_table"],
            make_work_list(plan, max_keys_per_segment=None), scale=1.0, out=tensors["out"], layout="vec",
        )  # fmt: skip


def test_a_long_prefill_is_not_cut_into_piles_of_partial_results() -> None:
    step = tree_step(32, [([0], 1, 33), ([0], 1, 40), ([], 4096, 16384)])
    plan = make_plan(step.block_table, step.query_lens, step.seq_lens, block_size=32, cost_model=CostModel.always())
    assert make_work_list(plan, max_keys_per_segment=1024).num_slots == 4 + 4096


def test_the_build_is_keyed_by_everything_it_depends_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = cpu_build.find_compiler()
    assert compiler is not None
    key = cpu_build.build_key(compiler)
    assert key == cpu_build.build_key(compiler)
    monkeypatch.setattr(cpu_build, "cpu_flags", lambda: ("sse2",))
    other_cpu = cpu_build.build_key(compiler)
    monkeypatch.undo()
    monkeypatch.setattr(torch, "__version__", "0.0.0")
    other_torch = cpu_build.build_key(compiler)
    monkeypatch.undo()
    source = tmp_path / "kernel.cpp"
    source.write_text(cpu_build.SOURCE.read_text() + "\n")
    monkeypatch.setattr(cpu_build, "SOURCE", source)
    assert len({key, other_cpu, other_torch, cpu_build.build_key(compiler)}) == 4


def test_without_a_compiler_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(cpu_build.KernelUnavailableError, match=r"no C\+\+ compiler.*install one"):
        cpu_build.build()


def test_a_failed_compilation_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "broken.cpp"
    source.write_text("this is not C++")
    monkeypatch.setattr(cpu_build, "SOURCE", source)
    monkeypatch.setenv("VLLM_RELAY_CACHE", str(tmp_path / "cache"))
    with pytest.raises(cpu_build.KernelUnavailableError, match="could not compile"):
        cpu_build.build()
    assert [file.name for file in (tmp_path / "cache" / "kernels").iterdir()] == ["build.lock"]


def test_code_that_others_could_have_written_is_not_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VLLM_RELAY_CACHE", str(tmp_path))
    built = cpu_build.build()
    for path in (built, built.parent):
        path.chmod(0o777)
        with pytest.raises(cpu_build.KernelUnavailableError, match="could be written by another user"):
            cpu_build.build()
        path.chmod(0o755)
    assert cpu_build.build() == built


def test_two_processes_that_build_at_once_share_one_file(tmp_path: Path) -> None:
    environment = {**os.environ, "VLLM_RELAY_CACHE": str(tmp_path)}
    program = "from relay_kernels.relay_attention import cpu_build; print(cpu_build.load().relay_layouts())"
    runs = [
        subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [run.communicate(timeout=120)[0].strip() for run in runs] == ["3" if HAS_AMX else "1"] * 2
    assert len(list((tmp_path / "kernels").glob("*.so"))) == 1
