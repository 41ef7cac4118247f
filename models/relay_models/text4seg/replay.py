"""Replays known answers through a drafter, offline: how many passes of a model would have written them?

A pass of a speculating engine checks the drafts that stand behind the last token, keeps those that the model would have
written itself, and adds one token of its own. With the answer known beforehand, counting passes needs no model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from relay_models.errors import RelayModelsError

# What vLLM calls its proposers with: the tokens just written by each request, the number of tokens of each request, and
# all of their tokens, [R, N]. Returns the drafts of each request.
Propose = Callable[[list[list[int]], npt.NDArray[np.int32], npt.NDArray[np.int32]], Sequence[Sequence[int]]]


@dataclass(frozen=True)
class Replay:
    """What it took to write one answer, or the counted part of it.

    Attributes:
        tokens: tokens written.
        passes: passes that wrote at least one of them.
        drafted: tokens that were checked in these passes.
    """

    tokens: int
    passes: int
    drafted: int

    @property
    def passes_per_token(self) -> float:
        return self.passes / self.tokens


def replay(
    prompt: Sequence[int], answer: Sequence[int], propose: Propose, *, max_drafts: int, count_from: int = 0
) -> Replay:
    """Write ``answer`` behind ``prompt``, pass by pass, as an engine would with a model that answers just so.

    Args:
        prompt: token ids; the first pass reads it and writes the first token of the answer, without drafts.
        answer: token ids.
        propose: called after each pass with a batch of this one request, as vLLM calls a proposer.
        max_drafts: ``num_speculative_tokens``: no draft may be longer.
        count_from: tokens of the answer before this one, and passes that wrote only such, are not counted.

    Raises:
        RelayModelsError: the answer is empty, ``count_from`` lies outside of it, or a draft is too long.
    """
    if not 0 <= count_from < len(answer):
        raise RelayModelsError(f"count_from must lie in the answer of {len(answer)} tokens, got {count_from}")
    token_ids = np.zeros((1, len(prompt) + len(answer) + max_drafts), dtype=np.int32)
    token_ids[0, : len(prompt)] = prompt
    passes = drafted = written = 0
    draft: Sequence[int] = ()
    while written < len(answer):
        kept = _common_length(draft, answer[written:])
        new = list(answer[written : written + kept + 1])
        if written + len(new) > count_from:
            passes += 1
            drafted += len(draft)
        end = len(prompt) + written + len(new)
        token_ids[0, end - len(new) : end] = new
        written += len(new)
        (draft,) = propose([new], np.array([end], dtype=np.int32), token_ids)
        if len(draft) > max_drafts:
            raise RelayModelsError(f"propose returned a draft of {len(draft)} tokens, max_drafts is {max_drafts}")
        # Drafts stand behind the last token while they are checked, and whatever was wrong in them stays there.
        token_ids[0, end : end + len(draft)] = draft[: token_ids.shape[1] - end]
    return Replay(len(answer) - count_from, passes, drafted)


def _common_length(left: Sequence[int], right: Sequence[int]) -> int:
    length = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        length += 1
    return length
