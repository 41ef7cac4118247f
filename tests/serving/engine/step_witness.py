"""Watches a running engine from inside: what was scheduled, what the attention builder was given, what it planned.

Every step is judged as it is built, from the block table that vLLM handed over and the plan that the layers will run;
what is wrong is kept as a sentence. What happened is counted, so that a test can tell a hard run from an idle one.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
from relay_coverage import Step, coverage_faults, form_faults, plan_faults

MOST_FAULTS, MOST_FAULTS_OF_A_STEP = 400, 2
# From so many blocks, a prefix of rows that all decode one token pays for every one of them (see `_left_alone`).
PAYING_BLOCKS = 2
MOST_PAYING_ROWS = 11


def request_of(internal_id: str) -> int:
    """vLLM appends random characters to the name it was given."""
    return int(internal_id.rsplit("-", 1)[0])


class StepWitness:
    """Observes one in-process engine for as long as it lives.

    Attributes:
        seen: what the scheduler did, the same on both sides if they ran the same steps.
        relayed: what took part in shared segments; empty on the stock side.
        faults: what was wrong with a step, one sentence each; at most so many of each and in all.
        salts: of each request; whoever adds a request writes its salt here first.
        drafts: the drafted tokens of each request in the latest step.
        judge_every: work lists are read token by token in every so many steps; everything else is checked in all.
    """

    def __init__(self, llm: Any) -> None:
        self.seen: Counter[str] = Counter()
        self.relayed: Counter[str] = Counter()
        self.faults: list[str] = []
        self.drafts: dict[int, int] = {}
        self.salts: dict[int, str | None] = {}
        self.judge_every = 1
        self.scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        self._runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        ((group,),) = self._runner.attn_groups
        self._watch(group.get_metadata_builder(), "build", self._on_build)
        self._watch(self.scheduler, "schedule", self._on_schedule)
        self._watch(self.scheduler.kv_cache_manager.block_pool, "_maybe_evict_cached_block", self._on_new_block)

    @staticmethod
    def _watch(owner: Any, name: str, tell: Callable[..., None]) -> None:
        """Call `tell` with the owner, what a method returned, and its arguments, each time it has run."""
        method = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            tell(owner, result, *args, **kwargs)
            return result

        setattr(owner, name, watched)

    def forget(self) -> None:
        """Begin to count anew."""
        self.seen.clear()
        self.relayed.clear()
        self.faults.clear()

    def _on_new_block(self, pool: Any, was_evicted: bool, *_: Any) -> None:
        self.seen["evictions"] += was_evicted

    def _on_schedule(self, scheduler: Any, scheduled: Any, *_: Any, **__: Any) -> None:
        self.seen["schedules"] += 1
        self.seen["tokens scheduled"] += scheduled.total_num_scheduled_tokens
        self.seen["preemptions"] += len(scheduled.preempted_req_ids or ())
        self.drafts = {request_of(name): len(ids) for name, ids in scheduled.scheduled_spec_decode_tokens.items()}
        for name in scheduled.num_scheduled_tokens:
            request = scheduler.requests[name]
            self.seen["chunks of prefill"] += request.is_prefill_chunk
            self.seen["chunks of recomputation"] += request.is_prefill_chunk and request.num_preemptions > 0

    def _on_build(
        self, builder: Any, metadata: Any, common_prefix_len: int, common_attn_metadata: Any, **_: Any
    ) -> None:
        self.seen["steps"] += 1
        common, rows = common_attn_metadata, common_attn_metadata.num_reqs
        starts = common.query_start_loc[: rows + 1].numpy()
        step = Step(
            common.block_table_tensor[:rows].numpy(),
            tuple(np.diff(starts).tolist()),
            tuple(common.seq_lens[:rows].tolist()),
            builder.block_size,
        )
        names = self._runner.input_batch.req_ids[:rows]
        salts = [self.salts[request_of(name)] for name in names]
        tokens = self._runner.input_batch.token_ids_cpu[:rows]
        self.seen["steps with twins of other salts"] += _has_salted_twins(step, salts, tokens)
        self.seen["steps that share what they compute"] += _shares_what_it_computes(step)
        faults = _blocks_of_two_salts(step, salts)
        relay = getattr(metadata, "relay", None)
        if relay is not None:
            faults += _group_faults(relay.plan, salts, tokens) + plan_faults(step, relay.plan)
            if not faults and self.seen["steps"] % self.judge_every == 0:
                work_list = relay._work_list
                faults += form_faults(work_list) + coverage_faults(step, work_list, starts.tolist())
            self._count(relay.plan, names)
        if hasattr(builder, "counters"):
            faults += _left_alone(step, relay.plan if relay is not None else None)
        self.faults += [f"step {self.seen['steps']}: {fault}" for fault in faults[:MOST_FAULTS_OF_A_STEP]]
        del self.faults[MOST_FAULTS:]

    def _count(self, plan: Any, names: list[str]) -> None:
        grouped = {row for segment in plan.shared for row in segment.requests}
        self.relayed["steps"] += 1
        self.relayed["groups"] += plan.num_groups
        self.relayed["rows"] += len(grouped)
        self.relayed["nested segments"] += sum(segment.key_start > 0 for segment in plan.shared)
        for row in grouped:
            request = self.scheduler.requests[names[row]]
            is_drafted = request_of(names[row]) in self.drafts
            self.relayed["rows with drafts"] += is_drafted
            self.relayed["rows that prefill"] += plan.query_lens[row] > 1 and not is_drafted
            self.relayed["rows that were preempted before"] += request.num_preemptions > 0


def _computed_blocks(step: Step, row: int) -> int:
    return (step.seq_lens[row] - step.query_lens[row]) // step.block_size


def _has_salted_twins(step: Step, salts: list[str | None], tokens: Any) -> bool:
    """Whether rows of different salts have computed the same first block of tokens: whom tokens alone would group."""
    salts_of: dict[bytes, set[str | None]] = defaultdict(set)
    for row, salt in enumerate(salts):
        if _computed_blocks(step, row):
            salts_of[tokens[row, : step.block_size].tobytes()].add(salt)
    return any(len(found) > 1 for found in salts_of.values())


def _shares_what_it_computes(step: Step) -> bool:
    """Whether a block that one row only computes in this step counts as computed for another one."""
    done, doing = set(), set()
    for row, seq_len in enumerate(step.seq_lens):
        computed = _computed_blocks(step, row)
        done.update(step.block_table[row, :computed].tolist())
        doing.update(step.block_table[row, computed : seq_len // step.block_size].tolist())
    return bool(done & doing)


def _blocks_of_two_salts(step: Step, salts: list[str | None]) -> list[str]:
    """vLLM's own promise, on which all of ours rests: a block in use belongs to one salt."""
    owner: dict[int, str | None] = {}
    faults = []
    for row, salt in enumerate(salts):
        used = -(-step.seq_lens[row] // step.block_size)
        for block in step.block_table[row, :used].tolist():
            if owner.setdefault(block, salt) != salt:
                faults.append(f"block {block} is in rows of the salts {owner[block]!r} and {salt!r}")
    return faults


def _group_faults(plan: Any, salts: list[str | None], tokens: Any) -> list[str]:
    faults = []
    for segment in plan.shared:
        if len({salts[row] for row in segment.requests}) > 1:
            faults.append(f"{segment} groups the salts {[salts[row] for row in segment.requests]}")
        shared = tokens[list(segment.requests), segment.key_start : segment.key_end]
        if (shared != shared[0]).any():
            faults.append(f"{segment} groups rows of different tokens")
    return faults


def _left_alone(step: Step, plan: Any) -> list[str]:
    """Rows that read alone what they should read together: nothing but the saving is lost, so no token tells.

    Where all rows with the same two computed blocks decode one token each, and are few, the cost model always gains by
    reading those blocks once for all of them, however their prefixes part later.
    """
    rows_of: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for row in range(len(step.seq_lens)):
        if _computed_blocks(step, row) >= PAYING_BLOCKS:
            rows_of[tuple(step.block_table[row, :PAYING_BLOCKS].tolist())].append(row)
    first_blocks = Counter(step.block_table[row, 0] for row in range(len(step.seq_lens)) if _computed_blocks(step, row))
    grouped = {row for segment in plan.shared for row in segment.requests} if plan else set()
    faults = []
    for blocks, rows in rows_of.items():
        is_plain = all(step.query_lens[row] == 1 for row in rows) and first_blocks[blocks[0]] == len(rows)
        if is_plain and 1 < len(rows) <= MOST_PAYING_ROWS and not grouped.issuperset(rows):
            faults.append(f"rows {sorted(set(rows) - grouped)} read alone what rows {rows} have in common")
    return faults
