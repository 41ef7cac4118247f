"""Mutants for tests: a worker that loads this extension can be told to break its plans in one way after another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from engine_probe import EngineProbe

from relay_kernels.relay_attention import plan as planner
from relay_kernels.relay_attention.plan import RelayPlan, Segment
from relay_kernels.relay_attention.work_list import WorkList
from relay_serving.vllm_plugin import attention_backend

_make_plan, _make_work_list = attention_backend.make_plan, attention_backend.make_work_list


class Mutant(EngineProbe):
    """Sound until it is told otherwise."""

    runner: Any = None

    def become(self, name: str) -> None:
        """Make plans as the function of that name in this module does, and otherwise as they should be made."""
        Mutant.runner = self.model_runner  # type: ignore[attr-defined]
        for owner, rule, sound in SOUND:
            setattr(owner, rule, sound)
        mutant = globals()[name]
        owner, rule = PLACES.get(name, (attention_backend, "make_plan"))
        setattr(owner, rule, mutant)


def shares_what_is_scheduled(query_lens: Any, seq_lens: Any, block_size: int, width: int) -> Any:
    """Forgets that the blocks of this very step stand in the tables of others already.

    No token tells, because the work list is causal whatever the plan says.
    """
    return np.where(query_lens > 0, seq_lens // block_size, 0)


def compares_tokens(block_table: Any, query_lens: Any, seq_lens: Any, **how: Any) -> RelayPlan:
    """Groups what reads the same instead of what is the same: salts mean nothing."""
    block_size, tokens = how["block_size"], Mutant.runner.input_batch.token_ids_cpu
    same: dict[bytes, int] = {}
    table = block_table.copy()
    for row, seq_len in enumerate(seq_lens.tolist()):
        for i in range(seq_len // block_size):
            text = tokens[row, : (i + 1) * block_size].tobytes()
            table[row, i] = same.setdefault(text, int(block_table[row, i]))
    return _make_plan(table, query_lens, seq_lens, **how)


def starts_suffixes_a_block_late(*arguments: Any, **how: Any) -> RelayPlan:
    """Leaves out the block between what is shared and the suffix, where there is one."""
    plan = _make_plan(*arguments, **how)
    lengths = zip(plan.suffix_starts, plan.seq_lens, plan.query_lens, strict=True)
    starts = [
        start + plan.block_size if 0 < start <= seq_len - query_len - plan.block_size else start
        for start, seq_len, query_len in lengths
    ]
    return replace(plan, suffix_starts=tuple(starts))


def starts_suffixes_a_block_early(*arguments: Any, **how: Any) -> RelayPlan:
    """Counts the last shared block twice."""
    plan = _make_plan(*arguments, **how)
    return replace(plan, suffix_starts=tuple(max(start - plan.block_size, 0) for start in plan.suffix_starts))


def _without_the_newest(plan: RelayPlan) -> list[Segment]:
    kept = [Segment(segment.requests[:-1], segment.key_start, segment.key_end) for segment in plan.shared]
    return [segment for segment in kept if len(segment.requests) > 1]


def forgets_a_joined_row(*arguments: Any, **how: Any) -> RelayPlan:
    """The last row of each segment, whose suffix still begins behind it, reads nothing of the prefix."""
    plan = _make_plan(*arguments, **how)
    return replace(plan, shared=tuple(_without_the_newest(plan)))


def leaves_a_joined_row_alone(*arguments: Any, **how: Any) -> RelayPlan:
    """The last row of each group reads its prefix alone: every token is right, and the saving is lost."""
    plan = _make_plan(*arguments, **how)
    shared = [s for s in _without_the_newest(plan) if s.key_start == 0]
    starts = [0] * plan.num_requests
    for segment in shared:
        for row in segment.requests:
            starts[row] = max(starts[row], segment.key_end)
    return replace(plan, shared=tuple(shared), suffix_starts=tuple(starts))


_kept: list[RelayPlan] = []


def keeps_the_plan_of_the_step_before(block_table: Any, query_lens: Any, seq_lens: Any, **how: Any) -> RelayPlan:
    """Plans anew only where the number of rows has changed: one that takes the place of another goes unseen."""
    lengths = {"query_lens": tuple(query_lens.tolist()), "seq_lens": tuple(seq_lens.tolist())}
    is_like_it = bool(_kept) and len(_kept[0].suffix_starts) == len(seq_lens)
    if not is_like_it or (_kept[0].suffix_starts > seq_lens - query_lens).any():
        _kept[:] = [_make_plan(block_table, query_lens, seq_lens, **how)]
    return replace(_kept[0], **lengths)


def forgets_causality(plan: RelayPlan, *arguments: Any, **how: Any) -> WorkList:
    """Every query token sees the keys of its whole segment, those after it as well."""
    lowered = _make_work_list(plan, *arguments, **how)
    ends = np.repeat(lowered.segments[:, 2], lowered.segments[:, 4] - lowered.segments[:, 3])
    return replace(lowered, slot_key_end=np.ascontiguousarray(ends))


def takes_the_first_block_for_the_prefix(block_table: Any, rows: Any, start: int, limit: int) -> int:
    """Takes rows that agree in one block to agree in all that follow."""
    return limit


PLACES: dict[str, tuple[Any, str]] = {
    "shares_what_is_scheduled": (planner, "shareable_blocks"),
    "takes_the_first_block_for_the_prefix": (planner, "common_prefix_end"),
    "forgets_causality": (attention_backend, "make_work_list"),
}
SOUND = [(owner, rule, getattr(owner, rule)) for owner, rule in [*PLACES.values(), (attention_backend, "make_plan")]]
