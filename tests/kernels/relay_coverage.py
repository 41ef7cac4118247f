"""The judge of plans and work lists: every key a token may see, exactly once, read from where it lies.

It knows nothing of how plans are made. Everything is checked against the block table and the lengths alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from relay_kernels.relay_attention.plan import CostModel, RelayPlan, make_plan
from relay_kernels.relay_attention.work_list import WorkList, make_work_list

Table = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Step:
    """What a planner is given for one step."""

    block_table: Table
    query_lens: tuple[int, ...]
    seq_lens: tuple[int, ...]
    block_size: int

    @property
    def takes_part(self) -> tuple[bool, ...]:
        return tuple(q > 0 and s > 0 for q, s in zip(self.query_lens, self.seq_lens, strict=True))

    def plan(self, cost_model: CostModel) -> RelayPlan:
        return make_plan(
            self.block_table, self.query_lens, self.seq_lens, block_size=self.block_size, cost_model=cost_model
        )


def faults_of_step(
    step: Step,
    cost_model: CostModel,
    max_keys_per_segment: int | None = None,
    query_start_loc: Sequence[int] | None = None,
) -> list[str]:
    """What is wrong with the plan and the work list made for a step; empty if nothing is."""
    plan = step.plan(cost_model)
    faults = plan_faults(step, plan)
    if faults:
        return faults
    work_list = make_work_list(plan, query_start_loc, max_keys_per_segment=max_keys_per_segment)
    starts = _starts(step) if query_start_loc is None else list(query_start_loc)
    return form_faults(work_list) + coverage_faults(step, work_list, starts)


def plan_faults(step: Step, plan: RelayPlan) -> list[str]:
    """Breaches of what a plan promises, which no kernel could see in the work list."""
    faults = []
    for segment in plan.shared:
        if len(set(segment.requests)) < 2:
            faults.append(f"{segment} is shared by fewer than two rows")
        for row in segment.requests:
            if not step.takes_part[row]:
                faults.append(f"{segment} holds row {row}, which is padding")
            if segment.key_end > step.seq_lens[row] - step.query_lens[row]:
                faults.append(f"{segment} holds keys that row {row} only computes in this step")
        if segment.key_start % step.block_size or segment.key_end % step.block_size:
            faults.append(f"{segment} is not made of whole blocks")
    own = [segment.requests for segment in plan.suffixes]
    if own != [(row,) for row, takes_part in enumerate(step.takes_part) if takes_part]:
        faults.append(f"suffixes belong to {own}")
    return faults


def form_faults(work_list: WorkList) -> list[str]:
    """Breaches of the contract of `WorkList` that need no step to see."""
    faults = []
    for name, array in vars(work_list).items():
        if array.dtype != np.int32 or not array.flags.c_contiguous:
            faults.append(f"{name} is not a contiguous int32 array")
    next_slot = 0
    for _, key_start, key_end, begin, end in work_list.segments.tolist():
        if begin != next_slot or end <= begin:
            faults.append(f"slots [{begin}, {end}) follow slot {next_slot}")
        next_slot = end
        tokens, ends = work_list.slot_token[begin:end], work_list.slot_key_end[begin:end]
        if (np.diff(tokens) <= 0).any():
            faults.append(f"slots [{begin}, {end}) are not in the order of their tokens")
        if (ends <= key_start).any() or (ends > key_end).any():
            faults.append(f"slots [{begin}, {end}) end outside their segment")
    if next_slot != work_list.num_slots or sorted(work_list.token_slots.tolist()) != list(range(work_list.num_slots)):
        faults.append("segments and tokens do not hold each slot once")
    owners = np.repeat(np.arange(work_list.num_tokens), np.diff(work_list.token_slot_start))
    if not np.array_equal(work_list.slot_token[work_list.token_slots], owners):
        faults.append("token_slots gives a token the slot of another")
    return faults


def coverage_faults(step: Step, work_list: WorkList, query_starts: Sequence[int]) -> list[str]:
    """Keys seen twice, not at all, out of order, too early, or read where they do not lie."""
    faults: list[str] = []
    row_of_token = {
        query_starts[row] + i: (row, i)
        for row, takes_part in enumerate(step.takes_part)
        if takes_part
        for i in range(step.query_lens[row])
    }
    segment_of_slot = np.repeat(np.arange(len(work_list.segments)), np.diff(work_list.segments[:, 3:5])[:, 0])
    same_keys: dict[tuple[int, int, int, int], bool] = {}
    for token in range(work_list.num_tokens):
        slots = work_list.token_slots[work_list.token_slot_start[token] : work_list.token_slot_start[token + 1]]
        row, i = row_of_token.get(token, (0, 0))
        end = step.seq_lens[row] - step.query_lens[row] + i + 1 if token in row_of_token else 0
        if work_list.token_key_end[token] != end:
            faults.append(f"token {token}: token_key_end is {work_list.token_key_end[token]}, not {end}")
        if token not in row_of_token:
            faults += [f"token {token} belongs to nobody and has slots"] if len(slots) else []
            continue
        next_key = 0
        for slot in slots.tolist():
            reader, key_start, _, _, _ = work_list.segments[segment_of_slot[slot]].tolist()
            key_end = int(work_list.slot_key_end[slot])
            if key_start != next_key:
                faults.append(f"row {row}, token {i}: keys from {key_start} follow those up to {next_key}")
            next_key = key_end
            read = (row, reader, key_start, key_end)
            if read not in same_keys:
                same_keys[read] = _lie_in_the_same_place(step, *read)
            if not same_keys[read]:
                faults.append(f"row {row}, token {i}: keys [{key_start}, {key_end}) read from row {reader}")
        if next_key != end:
            faults.append(f"row {row}, token {i}: sees keys up to {next_key}")
    missing = [token for token in row_of_token if token >= work_list.num_tokens]
    return faults + [f"token {token} is not in the work list" for token in missing]


def _lie_in_the_same_place(step: Step, row: int, reader: int, key_start: int, key_end: int) -> bool:
    """Whether the reader's blocks hold the row's keys. A null block holds nobody's, so nobody else's either."""
    if row == reader:
        return True
    blocks = slice(key_start // step.block_size, -(-key_end // step.block_size))
    if blocks.stop > step.block_table.shape[1]:
        return False
    own = step.block_table[row, blocks]
    return bool(np.array_equal(own, step.block_table[reader, blocks]) and (own != 0).all())


def _starts(step: Step) -> list[int]:
    return np.concatenate(([0], np.cumsum(step.query_lens))).astype(int).tolist()
