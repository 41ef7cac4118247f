"""The work list: a relay plan lowered to the integer arrays that every kernel runs from.

Legend: R requests, T query tokens of the step, S segments, P slots.

A *segment* is a contiguous range of key positions read through one row of the block table. A *slot* is one
(segment, query token) pair; it owns one partial result (output and log-sum-exp), and the slots of one token are merged
in the order of their keys. Nothing here depends on torch or vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from relay_kernels.relay_attention.plan import RelayPlan

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


MOST_SLOTS_OF_CUT_SEGMENT = 4096  # enough for any number of cores; a long prefill is parallel in its tokens already


@dataclass(frozen=True, eq=False)
class WorkList:
    """Integer arrays, all int32 and C-contiguous.

    Attributes:
        segments: [S, 5], columns (block_row, key_start, key_end, slot_begin, slot_end). Keys ``[key_start, key_end)``
            are positions in the request whose block-table row is ``block_row``; slots ``[slot_begin, slot_end)``
            belong to this segment, ordered by query token.
        slot_token: [P], the query token (row of the step's query tensor) of each slot.
        slot_key_end: [P], the exclusive end of the keys the slot's token may see inside its segment:
            ``key_start < slot_key_end <= key_end``. Causality lives here and nowhere else.
        token_slot_start: [T + 1], CSR offsets into ``token_slots``.
        token_slots: [P], for each token its slots in ascending key order. A token without slots (padding, or an
            empty sequence) gets an output of zeros and a log-sum-exp of -inf.
        token_key_end: [T], how many keys of its request each token sees, itself the last; 0 for padding. Layers with a
            sliding window count back from there.
    """

    segments: Int32Array
    slot_token: Int32Array
    slot_key_end: Int32Array
    token_slot_start: Int32Array
    token_slots: Int32Array
    token_key_end: Int32Array

    @property
    def num_slots(self) -> int:
        return int(self.slot_token.shape[0])

    @property
    def num_tokens(self) -> int:
        return int(self.token_slot_start.shape[0]) - 1


def make_work_list(
    plan: RelayPlan,
    query_start_loc: Sequence[int] | npt.NDArray[np.integer[Any]] | None = None,
    *,
    max_keys_per_segment: int | None,
) -> WorkList:
    """Lower a plan to the arrays that kernels run from.

    Args:
        plan: what the step shares.
        query_start_loc: [R + 1], row r's query tokens are ``query_start_loc[r]`` and the ``query_len`` that follow;
            the last entry is the number of tokens. None packs the rows one after another. Tokens between the end of
            one row and the start of the next belong to nobody and get no slots.
        max_keys_per_segment: cut longer segments into even pieces of at most this many keys (but no less than one
            block) that can run in parallel; None cuts nothing. A segment of many query tokens is cut into fewer, since
            every piece of it costs each token a partial result.

    Raises:
        ValueError: an argument has the wrong shape or an impossible value; the message names it.
    """
    if max_keys_per_segment is not None and max_keys_per_segment < 1:
        raise ValueError(f"max_keys_per_segment must be at least 1 or None, got {max_keys_per_segment}")
    query_lens_R = _int64(plan.query_lens)
    seq_lens_R = _int64(plan.seq_lens)
    computed_R = seq_lens_R - query_lens_R
    query_start_R, num_tokens = _query_starts(query_lens_R, query_start_loc)

    # The segments of the plan, shared ones first; S counts them here, and P counts the pieces they are cut into.
    shared = sorted(plan.shared, key=lambda segment: segment.key_start)
    own_rows = np.flatnonzero((query_lens_R > 0) & (seq_lens_R > 0))
    rows = np.concatenate((_int64(row for segment in shared for row in segment.requests), own_rows))
    num_rows_S = np.concatenate((_int64(len(segment.requests) for segment in shared), np.ones_like(own_rows)))
    first_row_S = np.cumsum(num_rows_S) - num_rows_S
    key_start_S = np.concatenate(
        (_int64(segment.key_start for segment in shared), _int64(plan.suffix_starts)[own_rows])
    )
    key_end_S = np.concatenate((_int64(segment.key_end for segment in shared), seq_lens_R[own_rows]))
    tokens_S = np.add.reduceat(query_lens_R[rows], first_row_S) if len(rows) else first_row_S
    segment_P, key_start_P, key_end_P = _cut(key_start_S, key_end_S, tokens_S, plan.block_size, max_keys_per_segment)

    # A span is the tokens of one row in one piece: its last ones, from the first that sees a key of the piece.
    piece_of_span, row_in_piece = expand(num_rows_S[segment_P])
    row_of_span = rows[first_row_S[segment_P[piece_of_span]] + row_in_piece]
    unseeing = np.maximum(key_start_P[piece_of_span] - computed_R[row_of_span], 0)
    span, token_in_span = expand(query_lens_R[row_of_span] - unseeing)
    piece, row = piece_of_span[span], row_of_span[span]
    token_in_row = unseeing[span] + token_in_span

    slot_token = query_start_R[row] + token_in_row
    slot_end_P = np.cumsum(np.bincount(piece, minlength=len(key_start_P)))
    slot_begin_P = np.concatenate(([0], slot_end_P[:-1]))[: len(slot_end_P)]
    token_slot_end = np.cumsum(np.bincount(slot_token, minlength=num_tokens))
    owner, place = expand(query_lens_R[own_rows])
    token_key_end = np.zeros(num_tokens, dtype=np.int64)
    token_key_end[query_start_R[own_rows][owner] + place] = computed_R[own_rows][owner] + place + 1
    return WorkList(
        segments=_int32(np.stack((rows[first_row_S[segment_P]], key_start_P, key_end_P, slot_begin_P, slot_end_P), 1)),
        slot_token=_int32(slot_token),
        slot_key_end=_int32(np.minimum(key_end_P[piece], computed_R[row] + token_in_row + 1)),
        token_slot_start=_int32(np.concatenate(([0], token_slot_end))),
        # Every token's slots stand in ascending key order already, so a stable sort by token keeps them so.
        token_slots=_int32(slot_token.argsort(kind="stable")),
        token_key_end=_int32(token_key_end),
    )


def fitted_work_list(
    plan: RelayPlan,
    query_start_loc: Sequence[int] | npt.NDArray[np.integer[Any]] | None = None,
    *,
    max_keys_per_segment: int,
    most_segments: int,
    most_slots: int,
) -> WorkList:
    """The work list of a plan where buffers have an end: a step that may not fit shares nothing and is cut nowhere.

    Whether it may is judged by what no work list of the plan exceeds: for each segment its pieces, and its pieces times
    its query tokens. A step's tokens and rows have to fit in any case.

    Raises:
        ValueError: as `make_work_list`; or there are more rows than ``most_segments``, or tokens than ``most_slots``.
    """
    segments = [(s.num_keys, sum(plan.query_lens[row] for row in s.requests)) for s in (*plan.shared, *plan.suffixes)]
    keys_S, tokens_S = (_int64(values) for values in zip(*segments, strict=True)) if segments else (_int64(()),) * 2
    pieces_S, _ = _pieces(keys_S, tokens_S, plan.block_size, max_keys_per_segment)
    if int(pieces_S.sum()) <= most_segments and int((pieces_S * tokens_S).sum()) <= most_slots:
        return make_work_list(plan, query_start_loc, max_keys_per_segment=max_keys_per_segment)
    for name, needed, most in (
        ("segments", len(plan.suffixes), most_segments),
        ("slots", sum(plan.query_lens[s.requests[0]] for s in plan.suffixes), most_slots),
    ):
        if needed > most:
            raise ValueError(f"the step needs {needed} {name}, more than most_{name}, {most}")
    unshared = RelayPlan(plan.block_size, plan.query_lens, plan.seq_lens, (), (0,) * plan.num_requests)
    return make_work_list(unshared, query_start_loc, max_keys_per_segment=None)


def _query_starts(
    query_lens_R: Int64Array, query_start_loc: Sequence[int] | npt.NDArray[np.integer[Any]] | None
) -> tuple[Int64Array, int]:
    """Each row's first query token, and the number of tokens."""
    ends = np.cumsum(query_lens_R)
    if query_start_loc is None:
        return ends - query_lens_R, int(query_lens_R.sum())
    starts = np.asarray(query_start_loc, dtype=np.int64)
    if starts.shape != (len(query_lens_R) + 1,):
        raise ValueError(
            f"query_start_loc must have one entry per row and one for the end, {len(query_lens_R) + 1}, got shape "
            f"{starts.shape}"
        )
    if starts[0] < 0:
        raise ValueError(f"query_start_loc[0] must not be negative, got {starts[0]}")
    overlaps = starts[:-1] + query_lens_R > starts[1:]
    if overlaps.any():
        row = int(overlaps.argmax())
        raise ValueError(
            f"query_start_loc[{row}] is {starts[row]} and query_lens[{row}] is {query_lens_R[row]}, which overlaps "
            f"query_start_loc[{row + 1}], {starts[row + 1]}"
        )
    return starts[:-1], int(starts[-1])


def _cut(
    key_start_S: Int64Array, key_end_S: Int64Array, tokens_S: Int64Array, block_size: int, max_keys: int | None
) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Cut segments into even pieces of whole blocks: (segment, key_start, key_end) of each, in key order."""
    pieces_S, piece_blocks_S = _pieces(key_end_S - key_start_S, tokens_S, block_size, max_keys)
    segment_P, part_P = expand(pieces_S)
    piece_keys_P = piece_blocks_S[segment_P] * block_size
    key_start_P = key_start_S[segment_P] + part_P * piece_keys_P
    return segment_P, key_start_P, np.minimum(key_start_P + piece_keys_P, key_end_S[segment_P])


def _pieces(
    keys_S: Int64Array, tokens_S: Int64Array, block_size: int, max_keys: int | None
) -> tuple[Int64Array, Int64Array]:
    """How many pieces each segment is cut into, and how many blocks each of them but the last has."""
    blocks_S = -(-keys_S // block_size)
    max_blocks = int(blocks_S.max(initial=1)) if max_keys is None else max(max_keys // block_size, 1)
    most_pieces_S = np.maximum(MOST_SLOTS_OF_CUT_SEGMENT // np.maximum(tokens_S, 1), 1)
    wanted_S = np.clip(-(-blocks_S // max_blocks), 1, most_pieces_S)
    piece_blocks_S = np.maximum(-(-blocks_S // wanted_S), 1)
    return -(-blocks_S // piece_blocks_S), piece_blocks_S


def expand(counts: Int64Array) -> tuple[Int64Array, Int64Array]:
    """``[2, 3]`` as owners ``[0, 0, 1, 1, 1]`` and places ``[0, 1, 0, 1, 2]``."""
    owners = np.repeat(np.arange(len(counts)), counts)
    return owners, np.arange(len(owners)) - (np.cumsum(counts) - counts)[owners]


def _int64(values: Iterable[int]) -> Int64Array:
    return np.fromiter(values, dtype=np.int64)


def _int32(values: npt.NDArray[np.integer[Any]]) -> Int32Array:
    return np.ascontiguousarray(values, dtype=np.int32)
