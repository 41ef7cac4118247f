"""Compiles the Triton kernels for a GPU that need not be there, and prints what each takes of its shared memory.

Run as a script, without TRITON_INTERPRET, by test_triton_compiles.py: an interpreted process cannot compile.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from relay_kernels.relay_attention.triton_plan import (
    COMPARED_BLOCKS,
    MAX_DEPTH,
    MAX_ROWS,
    extend_kernel,
    lower_kernel,
    partition_kernel,
)
from relay_kernels.relay_attention.triton_relay import HEADS_PER_MERGE, attend_kernel, default_tiles, merge_kernel

WARP_SIZE = 32
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


FLAGS = ("HAS_WINDOW", "HAS_SOFT_CAP", "HAS_FP8_CACHE")


def compile_kernel(
    kernel: Any, dtype: torch.dtype, constants: dict[str, Any], capability: int, **options: int
) -> dict[str, Any]:
    """Sizes of the machine code and of the shared memory of one kernel."""
    cache = "fp8e4nv" if constants.get("HAS_FP8_CACHE") else NAMES[dtype]

    def type_of(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in ("p_key", "p_value"):
            return f"*{cache}"
        if name in ("p_query", "p_out"):
            return f"*{NAMES[dtype]}"
        if name.startswith(("p_partial", "p_lse", "p_sinks")):
            return "*fp32"
        if name in ("p_sums", "p_totals"):
            return "*i64"
        if name.startswith("p_"):
            return "*i32"
        if name.startswith(("num_", "most_", "width", "depth", "window")):
            return "i32"
        return "fp32" if name in ("scale", "soft_cap", "value_scale") else "i64"

    signature = {name: type_of(name) for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(signature.values()) if t.startswith("*")}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, WARP_SIZE), options=options)
    return {"code_bytes": len(compiled.asm["cubin"]), "shared_bytes": compiled.metadata.shared}


def main(dtype_name: str, head_size: int, capability: int) -> None:
    dtype = {name: dtype for dtype, name in NAMES.items()}[dtype_name]
    tiles = default_tiles(head_size, dtype)
    head = {"HEAD_SIZE": head_size, "PADDED_HEAD_SIZE": triton.next_power_of_2(head_size)}
    # 8-bit numbers of four exponent bits are known to GPUs from 8.9 on.
    variants = {"": dict.fromkeys(FLAGS, False), ", all features": dict.fromkeys(FLAGS, True)}
    if capability < 89:
        variants[", all features"]["HAS_FP8_CACHE"] = False
    report = {
        f"attend {size}{named}": compile_kernel(
            attend_kernel,
            dtype,
            {
                **head,
                "NUM_KV_HEADS": 8,
                "HEADS_PER_KV_HEAD": 3,
                "CACHE_BLOCK_SIZE": 16,
                "TILE_ROWS": tile.rows,
                "TILE_KEYS": tile.keys,
                **flags,
            },
            capability,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        for size, tile in (("small", tiles.small), ("large", tiles.large))
        for named, flags in variants.items()
    }
    merge_constants = {**head, "NUM_HEADS": 24, "TILE_HEADS": HEADS_PER_MERGE, "WANTS_LSE": True, "HAS_SINKS": True}
    report["merge"] = compile_kernel(merge_kernel, dtype, merge_constants, capability, num_warps=4)
    print(json.dumps(report))


def plan_report(dtype: torch.dtype, capability: int) -> dict[str, dict[str, Any]]:
    """Of the kernels that plan, for as many rows as they take."""
    rows = {"ROWS": MAX_ROWS, "DEPTHS": MAX_DEPTH}
    costs = {"KEY_READ": 128, "ROW_KEY": 1}
    lowering = {
        **rows, **costs, "SEGMENT": 8192, "MERGE": 512, "MIN_KEYS": 0, "MAX_BLOCKS": 64, "BLOCK_SIZE": 16,
        "NODE_STEPS": 12, "PIECE_STEPS": 14, "MEMBER_STEPS": 13, "HEADS_PER_KV_HEAD": 3, "SMALL_ROWS": 16,
        "LARGE_ROWS": 64, "PIECE_CAPACITY": 16384, "MOST_SLOTS": 4096,
    }  # fmt: skip
    return {
        "partition": compile_kernel(
            partition_kernel, dtype, {**rows, **costs, "BLOCK_SIZE": 16}, capability, num_warps=8
        ),
        "extend": compile_kernel(extend_kernel, dtype, {**rows, "COMPARED": COMPARED_BLOCKS}, capability, num_warps=4),
        "lower": compile_kernel(lower_kernel, dtype, lowering, capability, num_warps=8),
    }


if __name__ == "__main__":
    if sys.argv[1] == "plan":
        print(json.dumps(plan_report(torch.bfloat16, int(sys.argv[2]))))
    else:
        main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
