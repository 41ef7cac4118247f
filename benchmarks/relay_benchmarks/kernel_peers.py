"""Kernels that compute a decode step's attention, behind one face: relay's, and whatever else is installed.

Each takes a `KernelStep`, prepares whatever it plans once a step or keeps between layers, and gives a call that
computes one layer. Preparing is not timed: engines plan once for all layers. What a peer needs beyond the paged cache
itself (a copy of the prefix for each request, say) is not timed either, but limited.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from relay_benchmarks.kernel_steps import KernelStep
from relay_kernels.relay_attention.plan import CostModel
from relay_kernels.relay_attention.work_list import make_work_list

MOST_COPIED_BYTES = 8 << 30
FLEX_BLOCK = 128
# When sharing pays on a GPU, in keys read for one request: tensor cores take 128 rows in the time that a key takes.
GPU_COST_MODEL = CostModel(row_key=1 / 128, segment=64.0, merge=4.0)
PIECES_PER_MULTIPROCESSOR = 2

Layer = Callable[[], Tensor]  # computes [R, N, H]


class AbsentError(Exception):
    """This kernel cannot run here, or not on this step; the message says why."""


@dataclass(frozen=True)
class Peer:
    """A kernel.

    Attributes:
        name: in tables.
        prepare: for a step; raises AbsentError.
        is_ours: what is measured, and no alternative to it.
    """

    name: str
    prepare: Callable[[KernelStep], Layer]
    is_ours: bool = False


def peers_for(device: torch.device) -> list[Peer]:
    """Relay's kernel first."""
    if device.type == "cuda":
        return [
            Peer("relay", relay_triton, is_ours=True),
            Peer("relay unshared", relay_triton_unshared, is_ours=True),
            Peer("flashinfer cascade", flashinfer_cascade),
            Peer("flex-attention", flex_attention),
            Peer("vllm triton", vllm_triton),
            Peer("sdpa copied", sdpa_copied),
        ]
    return [
        Peer("relay", relay_cpu, is_ours=True),
        Peer("vllm cpu", vllm_cpu),
        Peer("sdpa copied", sdpa_copied),
    ]


# ---------------------------------------------------------------- ours


def relay_triton(step: KernelStep, cost_model: CostModel = GPU_COST_MODEL) -> Layer:
    """The Triton kernels, with a work list that is loaded before."""
    try:
        from relay_kernels.relay_attention.triton_relay import Capacity, TritonWorkspace, relay_attention_triton
    except ImportError as error:
        raise AbsentError(f"triton is not installed ({error})") from error
    work_list = make_work_list(step.plan(cost_model), max_keys_per_segment=_keys_per_piece(step))
    workspace = TritonWorkspace(
        Capacity.of(work_list),
        num_heads=step.shape.query_heads,
        num_kv_heads=step.shape.key_heads,
        head_size=step.shape.head_size,
        dtype=step.shape.dtype,
        device=step.device,
    )
    workspace.load(work_list)
    out = torch.empty_like(step.query)

    def layer() -> Tensor:
        return relay_attention_triton(
            step.query, step.key_cache, step.value_cache, step.block_table, workspace, scale=step.scale, out=out
        )

    return layer


def relay_triton_unshared(step: KernelStep) -> Layer:
    """The same kernels where every request reads all of its keys: what sharing alone gains."""
    return relay_triton(step, CostModel.never())


def _keys_per_piece(step: KernelStep) -> int:
    """So short that every multiprocessor has work, but no shorter than a few tiles."""
    programs = 8
    if step.device.type == "cuda":
        count = torch.cuda.get_device_properties(step.device).multi_processor_count
        programs = PIECES_PER_MULTIPROCESSOR * int(count)
    keys = step.unique_keys * step.shape.key_heads // programs
    return max(256, min(8192, keys))


def relay_cpu(step: KernelStep) -> Layer:
    """The compiled kernel on vLLM's own cache layout."""
    from relay_kernels.relay_attention.cpu import CpuRun, supports
    from relay_kernels.relay_attention.cpu_build import KernelUnavailableError

    key_cache, value_cache, isa = _vllm_cpu_cache(step)
    try:
        if not supports(isa):
            raise AbsentError(f"the compiled kernel does not read the cache layout {isa!r} here")
    except KernelUnavailableError as error:
        raise AbsentError(str(error)) from error
    work_list = make_work_list(step.plan(CostModel()), max_keys_per_segment=4096)
    run = CpuRun(
        work_list,
        step.block_table,
        num_heads=step.shape.query_heads,
        num_kv_heads=step.shape.key_heads,
        head_size=step.shape.head_size,
        block_size=step.shape.block_size,
        dtype=step.shape.dtype,
        layout=isa,
    )
    out = torch.empty_like(step.query)

    def layer() -> Tensor:
        run(step.query, key_cache, value_cache, scale=step.scale, out_TND=out)
        return out

    return layer


# ---------------------------------------------------------------- vLLM's


def vllm_cpu(step: KernelStep) -> Layer:
    """vLLM's CPU attention, from its own cache."""
    from vllm import _custom_ops as ops

    key_cache, value_cache, isa = _vllm_cpu_cache(step)
    shape = step.shape
    query_start = torch.arange(shape.requests + 1, dtype=torch.int32)
    seq_lens = torch.from_numpy(step.seq_lens).int()
    metadata = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=shape.requests,
        num_heads=shape.query_heads,
        num_kv_heads=shape.key_heads,
        head_dim=shape.head_size,
        seq_lens=seq_lens,
        dtype=shape.dtype,
        query_start_loc=query_start,
        causal=True,
        sliding_window_size=-1,
        isa=isa,
        enable_kv_split=True,
    )
    out = torch.empty_like(step.query)

    def layer() -> Tensor:
        ops.cpu_attention_with_kv_cache(
            query=step.query, key_cache=key_cache, value_cache=value_cache, output=out, query_start_loc=query_start,
            seq_lens=seq_lens, scale=step.scale, causal=True, alibi_slopes=None, sliding_window=-1,
            block_table=step.block_table, softcap=0.0, scheduler_metadata=metadata, s_aux=None,
        )  # fmt: skip
        return out

    return layer


def _vllm_cpu_cache(step: KernelStep) -> tuple[Tensor, Tensor, str]:
    """Keys and values [B, K, S, H] as vLLM packs them, and the name of that layout."""
    if importlib.util.find_spec("vllm") is None:
        raise AbsentError("vLLM is not installed, whose cache layout the kernel reads")
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    shape = step.shape
    isa = _get_attn_isa(shape.dtype, shape.block_size, shape.head_size)
    blocks = len(step.key_cache)
    whole = torch.zeros(blocks, shape.key_heads, 2 * shape.block_size, shape.head_size, dtype=shape.dtype)
    key_cache, value_cache = whole.chunk(2, dim=2)
    slots = torch.arange(blocks * shape.block_size)
    ops.cpu_attn_reshape_and_cache(
        step.key_cache.flatten(0, 1), step.value_cache.flatten(0, 1), key_cache, value_cache, slots, isa
    )
    return key_cache, value_cache, isa


def vllm_triton(step: KernelStep) -> Layer:
    """vLLM's unified Triton attention, which reads every request's keys for itself."""
    if importlib.util.find_spec("vllm") is None:
        raise AbsentError("vLLM is not installed")
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    out = torch.empty_like(step.query)
    query_start = torch.arange(step.shape.requests + 1, dtype=torch.int32, device=step.device)
    seq_lens = torch.from_numpy(step.seq_lens).int().to(step.device)
    longest = int(step.seq_lens.max())

    def layer() -> Tensor:
        unified_attention(
            q=step.query, k=step.key_cache, v=step.value_cache, out=out, cu_seqlens_q=query_start, max_seqlen_q=1,
            seqused_k=seq_lens, max_seqlen_k=longest, softmax_scale=step.scale, causal=True, window_size=(-1, -1),
            block_table=step.block_table, softcap=0, q_descale=None, k_descale=None, v_descale=None,
        )  # fmt: skip
        return out

    return layer


# ---------------------------------------------------------------- others'


def flashinfer_cascade(step: KernelStep) -> Layer:
    """FlashInfer's multi-level cascade (flashinfer.ai/2024/02/02/cascade-inference.html) over the same pages."""
    if importlib.util.find_spec("flashinfer") is None:
        raise AbsentError("flashinfer is not installed")
    import flashinfer  # type: ignore[import-not-found,import-untyped,unused-ignore]

    shape = step.shape
    if not shape.has_sharers:
        raise AbsentError("nothing is shared")
    prefix_blocks = shape.shared // shape.block_size
    groups = min(shape.groups, shape.requests)
    # Its groups are neighbours: requests stand group by group.
    order = torch.tensor(sorted(range(shape.requests), key=lambda row: row % shape.groups), device=step.device)
    sizes = [len(range(group, shape.requests, shape.groups)) for group in range(groups)]
    table = step.block_table[order].cpu()
    own_R = step.seq_lens[order.cpu().numpy()] - prefix_blocks * shape.block_size
    own_blocks_R = -(-own_R // shape.block_size)

    def device(values: Any) -> Tensor:
        return torch.as_tensor(values, dtype=torch.int32, device=step.device)

    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + size)
    indices = [table[starts[group], :prefix_blocks] for group in range(groups)]
    own = [table[row, prefix_blocks : prefix_blocks + int(count)] for row, count in enumerate(own_blocks_R)]
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=step.device)
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, workspace, "NHD")
    wrapper.plan(
        [device(starts), device(range(shape.requests + 1))],
        [device([prefix_blocks * i for i in range(groups + 1)]), device([0, *own_blocks_R.cumsum().tolist()])],
        [device(torch.cat(indices)), device(torch.cat(own))],
        [device([shape.block_size] * groups), device((own_R - 1) % shape.block_size + 1)],
        shape.query_heads,
        shape.key_heads,
        shape.head_size,
        shape.block_size,
        causal=True,
        q_data_type=shape.dtype,
    )
    query = step.query[order].contiguous()
    cache = torch.stack((step.key_cache, step.value_cache), 1)
    back = order.argsort()
    result: list[Tensor] = []

    def layer() -> Tensor:
        result[:] = [wrapper.run(query, cache)]
        return result[0]

    layer.reorder = back  # type: ignore[attr-defined]  # applied where results are compared, not where they are timed
    return layer


def flex_attention(step: KernelStep) -> Layer:
    """PyTorch's FlexAttention over the whole cache as one sequence, of which each request sees its own keys: blocks of
    a shared prefix are read once for 128 query rows."""
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as attend

    shape = step.shape
    num_keys = step.key_cache.shape[0] * shape.block_size
    # For each slot of the cache the group whose prefix it is part of, or the request it belongs to alone.
    owner = torch.full((2, num_keys), -1, dtype=torch.int32, device=step.device)
    prefix = shape.shared // shape.block_size * shape.block_size
    for row in range(shape.requests):
        slots = step.slots(row)
        if row < shape.groups:
            owner[0, slots[:prefix]] = row
        owner[1, slots[prefix:]] = row
    groups = shape.groups

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (owner[0][k] == q % groups) | (owner[1][k] == q)

    mask = create_block_mask(sees, None, None, shape.requests, num_keys, device=step.device, BLOCK_SIZE=FLEX_BLOCK)
    query = step.query.transpose(0, 1)[None]
    key, value = (cache.flatten(0, 1).transpose(0, 1)[None] for cache in (step.key_cache, step.value_cache))
    attend = torch.compile(attend) if step.device.type == "cuda" else attend

    def layer() -> Tensor:
        out: Tensor = attend(query, key, value, block_mask=mask, scale=step.scale, enable_gqa=True)
        return out[0].transpose(0, 1)

    return layer


def sdpa_copied(step: KernelStep) -> Layer:
    """PyTorch's own attention with a copy of the prefix for each request: what sharing saves in memory, too."""
    shape = step.shape
    longest = int(step.seq_lens.max())
    num_bytes = shape.requests * longest * shape.bytes_per_key
    if num_bytes > MOST_COPIED_BYTES:
        raise AbsentError(f"copies of the prefix take {num_bytes >> 30} GiB")
    keys, values = (
        torch.zeros(shape.requests, longest, shape.key_heads, shape.head_size, dtype=shape.dtype, device=step.device)
        for _ in range(2)
    )
    hidden = torch.zeros(shape.requests, 1, 1, longest, dtype=shape.dtype, device=step.device)
    for row in range(shape.requests):
        slots = step.slots(row)
        keys[row, : len(slots)] = step.key_cache.flatten(0, 1)[slots]
        values[row, : len(slots)] = step.value_cache.flatten(0, 1)[slots]
        hidden[row, :, :, len(slots) :] = float("-inf")
    query = step.query[:, :, None]

    def layer() -> Tensor:
        out = F.scaled_dot_product_attention(
            query, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=hidden, scale=step.scale, enable_gqa=True
        )
        return out[:, :, 0]

    return layer
