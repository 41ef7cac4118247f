"""Steps to plan: drawn directly, and from a small engine that allocates blocks as vLLM does."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from relay_coverage import Step

from relay_kernels.relay_attention.plan import CostModel

BLOCK_SIZES = (1, 2, 3, 16, 128)
NULL_BLOCK = 0

_costs = st.floats(0, 50, allow_nan=False)
cost_models = st.one_of(
    st.just(CostModel.always()),
    st.just(CostModel()),
    st.just(CostModel.never()),
    st.builds(CostModel, key_read=_costs, row_key=_costs, segment=_costs, merge=_costs),
)


@st.composite
def steps(draw: st.DrawFn, max_rows: int = 7, max_blocks: int = 6) -> Step:
    """A random prefix tree with ragged lengths, padding, null blocks and, past each row's end, equal garbage.

    Query lengths are drawn freely, so a row may be computing blocks that other rows already share.
    """
    block_size = draw(st.sampled_from(BLOCK_SIZES))
    num_rows = draw(st.integers(0, max_rows))
    width = draw(st.integers(1, max_blocks))
    block_table = np.zeros((num_rows, width), dtype=np.int32)
    query_lens, seq_lens = [], []
    for row in range(num_rows):
        # Unlike any other row's, then the beginning of an earlier row's.
        block_table[row] = 1 + row * width + np.arange(width)
        if row:
            parent, depth = draw(st.integers(0, row - 1)), draw(st.integers(0, width))
            block_table[row, :depth] = block_table[parent, :depth]
        seq_len = draw(st.integers(0, width * block_size))
        query_len = draw(st.one_of(st.just(min(1, seq_len)), st.integers(0, min(seq_len, 2 * block_size + 1))))
        query_lens.append(draw(st.integers(0, 2)) if seq_len == 0 else query_len)
        seq_lens.append(seq_len)
    if num_rows and draw(st.booleans()):
        column = draw(st.integers(0, width - 1))
        freed = draw(st.sets(st.integers(0, num_rows - 1)))
        block_table[sorted(freed), column] = NULL_BLOCK
    if draw(st.booleans()):
        for row, seq_len in enumerate(seq_lens):
            tail = -(-seq_len // block_size)
            block_table[row, tail:] = 9000 + np.arange(width)[tail:]
    return Step(block_table, tuple(query_lens), tuple(seq_lens), block_size)


@dataclass
class _Request:
    tokens: list[int]
    blocks: list[int]
    num_computed: int
    num_prompt: int


class TinyEngine:
    """Schedules requests over a paged cache as vLLM does, with the habits that make sharing dangerous.

    Blocks enter the prefix cache when they are scheduled, before they are computed; rows keep the tail of whoever had
    them before; finished requests' blocks are handed out again; a step may carry padding rows.
    """

    def __init__(self, block_size: int, num_rows: int = 6, width: int = 8, num_blocks: int = 40) -> None:
        self.block_size = block_size
        self.width = width
        self.block_table = np.zeros((num_rows, width), dtype=np.int32)
        self.rows: list[_Request | None] = [None] * num_rows
        self.free = list(range(1, num_blocks))
        self.users: dict[int, int] = {}
        self.cached: dict[tuple[int, ...], int] = {}

    @property
    def max_tokens(self) -> int:
        return self.width * self.block_size

    def join(self, tokens: list[int]) -> None:
        """Take a request in if there is a row for it."""
        if None in self.rows:
            self.rows[self.rows.index(None)] = _Request(list(tokens), [], 0, len(tokens))

    def finish(self, row: int) -> None:
        """Let a request go. Its blocks stay cached until they are handed out again; its row stays as it is."""
        request = self.rows[row]
        if request is None:
            return
        for block in reversed(request.blocks):
            self.users[block] -= 1
            if self.users[block] == 0:
                self.free.append(block)
        self.rows[row] = None

    def step(self, chunk: int, sampled: int, drafted: int) -> Step:
        """Schedule at most ``chunk`` prompt tokens, or one token and ``drafted`` more, for every request."""
        query_lens, seq_lens = [0] * len(self.rows), [0] * len(self.rows)
        for row, request in enumerate(self.rows):
            if request is None:
                continue
            if not request.blocks:
                self._reuse(request)
            is_decoding = request.num_computed >= request.num_prompt
            if is_decoding:
                request.tokens += [sampled + i for i in range(1 + drafted)]
            query_len = min(len(request.tokens) - request.num_computed, 1 + drafted if is_decoding else chunk)
            seq_len = request.num_computed + query_len
            if seq_len > self.max_tokens or not self._allocate(request, seq_len):
                self.finish(row)
                continue
            query_lens[row], seq_lens[row] = query_len, seq_len
            self.block_table[row, : len(request.blocks)] = request.blocks
        step = Step(self.block_table.copy(), tuple(query_lens), tuple(seq_lens), self.block_size)
        for row, request in enumerate(self.rows):
            if request is not None:
                request.num_computed += query_lens[row]
        return step

    def _reuse(self, request: _Request) -> None:
        """Blocks in the cache count as computed, even those that an earlier row only computes in this very step."""
        for end in range(self.block_size, len(request.tokens), self.block_size):
            block = self.cached.get(tuple(request.tokens[:end]))
            if block is None:
                break
            if self.users[block] == 0:
                self.free.remove(block)
            self.users[block] += 1
            request.blocks.append(block)
        request.num_computed = len(request.blocks) * self.block_size

    def _allocate(self, request: _Request, seq_len: int) -> bool:
        """Blocks for all keys, the full ones offered to others at once."""
        while len(request.blocks) * self.block_size < seq_len:
            if not self.free:
                return False
            block = self.free.pop(0)
            self.cached = {tokens: other for tokens, other in self.cached.items() if other != block}
            self.users[block] = 1
            request.blocks.append(block)
        for i in range(seq_len // self.block_size):
            self.cached.setdefault(tuple(request.tokens[: (i + 1) * self.block_size]), request.blocks[i])
        return True
