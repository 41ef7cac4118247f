"""The CPU kernel beside vLLM's own, on the same tensors in the same cache: same layouts, and no larger errors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from relay_kernels.relay_attention.cpu import relay_attention_cpu
from relay_kernels.relay_attention.cpu_torch import unpack_keys, unpack_values
from relay_kernels.relay_attention.plan import CostModel, make_plan
from relay_kernels.relay_attention.reference import paged_attention_reference
from relay_kernels.relay_attention.work_list import make_work_list

SEEDS = 5
HAS_AMX = torch.cpu._is_amx_tile_supported()
BF16_LAYOUT = "amx" if HAS_AMX else "vec"


@pytest.fixture(scope="module", autouse=True)
def _vllm_kernels() -> None:
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    if HAS_AMX:
        torch.cpu._init_amx()


@dataclass(frozen=True)
class Shape:
    """Requests that share ``shared`` tokens and go on with ragged suffixes; the largest score is about ``logits``."""

    num_requests: int
    shared: int
    suffix: int
    query_len: int = 1
    num_heads: int = 9
    num_kv_heads: int = 3
    head_size: int = 64
    block_size: int = 128
    logits: float = 8.0

    @property
    def seq_lens(self) -> list[int]:
        return [self.shared + self.suffix + self.query_len - 1 + i % 5 for i in range(self.num_requests)]


class Layer:
    """Random tensors of one layer in vLLM's cache, the parts that hold no key poisoned with NaN."""

    def __init__(self, shape: Shape, layout: str, dtype: torch.dtype, seed: int) -> None:
        from vllm import _custom_ops as ops

        self.shape, self.layout = shape, layout
        generator = torch.Generator().manual_seed(seed)
        size, shared_blocks = shape.block_size, shape.shared // shape.block_size
        width = max(-(-length // size) for length in shape.seq_lens)
        table = np.zeros((shape.num_requests, width), dtype=np.int32)
        table[:, :shared_blocks] = 1 + np.arange(shared_blocks)
        own = width - shared_blocks
        table[:, shared_blocks:] = 1 + shared_blocks + np.arange(shape.num_requests * own).reshape(-1, own)
        self.block_table = torch.from_numpy(table)
        slots = torch.cat(
            [
                self.block_table[row].long()[torch.arange(length) // size] * size + torch.arange(length) % size
                for row, length in enumerate(shape.seq_lens)
            ]
        ).unique()
        num_blocks = int(table.max()) + 1

        def random(*sizes: int) -> torch.Tensor:
            return torch.randn(*sizes, generator=generator)

        keys, values = (random(len(slots), shape.num_kv_heads, shape.head_size).to(dtype) for _ in range(2))
        query = random(shape.num_requests * shape.query_len, shape.num_heads, shape.head_size)
        self.scale = shape.head_size**-0.5
        self.query = (query * (shape.logits / (4.0 * shape.head_size**0.5 * self.scale))).to(dtype)
        whole = torch.full((num_blocks, shape.num_kv_heads, 2 * size, shape.head_size), float("nan"), dtype=dtype)
        self.key_cache, self.value_cache = whole.chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(
            keys, values, self.key_cache, self.value_cache, slots, layout, k_scale=1.0, v_scale=1.0,
            kv_cache_dtype="auto",
        )  # fmt: skip
        self.plain_keys = torch.full((num_blocks * size, shape.num_kv_heads, shape.head_size), float("nan"))
        self.plain_values = self.plain_keys.clone()
        self.plain_keys[slots], self.plain_values[slots] = keys.float(), values.float()

    def exact(self) -> torch.Tensor:
        """float64 attention of the rounded tensors."""
        cache_shape = (-1, self.shape.block_size, self.shape.num_kv_heads, self.shape.head_size)
        return paged_attention_reference(
            self.query.double(), self.plain_keys.double().view(cache_shape),
            self.plain_values.double().view(cache_shape), self.block_table,
            [self.shape.query_len] * self.shape.num_requests, self.shape.seq_lens, self.scale,
        )[0]  # fmt: skip

    def stock(self) -> torch.Tensor:
        """vLLM's own kernel, which multiplies what lies between the keys by zero: there it finds zeros."""
        for cache in (self.key_cache, self.value_cache):
            cache.nan_to_num_()
        from vllm import _custom_ops as ops

        shape = self.shape
        starts = torch.arange(0, len(self.query) + 1, shape.query_len, dtype=torch.int32)
        seq_lens = torch.tensor(shape.seq_lens, dtype=torch.int32)
        metadata = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=shape.num_requests, num_heads=shape.num_heads, num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_size, seq_lens=seq_lens, dtype=self.query.dtype, query_start_loc=starts, causal=True,
            sliding_window_size=-1, isa=self.layout, enable_kv_split=True, dynamic_causal=None, kv_cache_dtype="auto",
        )  # fmt: skip
        out = torch.empty_like(self.query)
        ops.cpu_attention_with_kv_cache(
            query=self.query, key_cache=self.key_cache, value_cache=self.value_cache, output=out,
            query_start_loc=starts, seq_lens=seq_lens, scale=self.scale, causal=True, alibi_slopes=None,
            sliding_window=-1, block_table=self.block_table, softcap=0.0, scheduler_metadata=metadata, s_aux=None,
            dynamic_causal=None, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto",
        )  # fmt: skip
        return out.double()

    def relay(self) -> torch.Tensor:
        """Ours, sharing whatever can be shared."""
        plan = make_plan(
            self.block_table.numpy(), [self.shape.query_len] * self.shape.num_requests, self.shape.seq_lens,
            block_size=self.shape.block_size, cost_model=CostModel.always(),
        )  # fmt: skip
        assert plan.is_shared == (self.shape.num_requests > 1 and self.shape.shared > 0)
        work = make_work_list(plan, max_keys_per_segment=2048)
        out = torch.empty_like(self.query)
        relay_attention_cpu(
            self.query, self.key_cache, self.value_cache, self.block_table, work, scale=self.scale, out=out,
            layout=self.layout,
        )  # fmt: skip
        return out.double()


@pytest.mark.parametrize(
    ("layout", "dtype", "head_size", "block_size"),
    [
        ("vec", torch.float32, 64, 128),
        ("vec", torch.float16, 128, 32),
        ("vec16", torch.bfloat16, 80, 128),
        ("vec16", torch.float32, 112, 16),
        pytest.param(
            "amx", torch.bfloat16, 96, 64, marks=pytest.mark.skipif(not HAS_AMX, reason="this CPU has no AMX")
        ),
    ],
)
def test_the_layouts_are_those_vllm_writes(layout: str, dtype: torch.dtype, head_size: int, block_size: int) -> None:
    layer = Layer(Shape(2, 0, 5 * block_size, head_size=head_size, block_size=block_size), layout, dtype, seed=0)
    keys = unpack_keys(layer.key_cache, layout).transpose(0, 1)
    values = unpack_values(layer.value_cache, layout).transpose(0, 1)
    assert torch.equal(torch.nan_to_num(keys), torch.nan_to_num(layer.plain_keys))
    assert torch.equal(torch.nan_to_num(values), torch.nan_to_num(layer.plain_values))
    assert torch.isfinite(layer.plain_keys).any()


GRID = [
    Shape(1, 0, 1),
    Shape(1, 0, 333),
    Shape(2, 128, 1),
    Shape(5, 384, 63),
    Shape(16, 2048, 111),
    Shape(64, 1024, 37),
    Shape(512, 128, 9),
    Shape(7, 256, 37, query_len=5),
    Shape(3, 128, 130, query_len=111),
    Shape(9, 256, 63, num_heads=8, num_kv_heads=1, head_size=128),
    Shape(9, 256, 63, num_heads=4, num_kv_heads=4, head_size=96, block_size=64),
    Shape(33, 512, 111, num_heads=8, num_kv_heads=2, head_size=256, block_size=32),
    Shape(16, 1024, 63, logits=100.0),
    Shape(16, 1024, 63, logits=1e4),
    Shape(5, 256, 37, query_len=3, logits=1e4),
]


@pytest.mark.parametrize("shape", GRID, ids=str)
def test_bfloat16_errors_are_no_larger_than_those_of_vllm(shape: Shape) -> None:
    squares, highest = {"relay": 0.0, "stock": 0.0}, {"relay": 0.0, "stock": 0.0}
    for seed in range(SEEDS):
        layer = Layer(shape, BF16_LAYOUT, torch.bfloat16, seed)
        exact = layer.exact()
        for side, out in (("relay", layer.relay()), ("stock", layer.stock())):
            error = out - exact
            squares[side] += float(error.square().mean())
            highest[side] = max(highest[side], float(error.abs().max()))
    rms_ratio = (squares["relay"] / squares["stock"]) ** 0.5 if squares["stock"] else float(squares["relay"] > 0)
    print(f"rms {rms_ratio:.4f}x, maximum {highest['relay'] / (highest['stock'] or 1.0):.3f}x of vLLM's")
    assert rms_ratio <= 1.05
    assert highest["relay"] <= 1.5 * highest["stock"]
