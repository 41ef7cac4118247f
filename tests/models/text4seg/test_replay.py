"""Replaying counts passes as an engine makes them, and the row drafter needs few of them on ground-truth masks."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relay_models.errors import RelayModelsError
from relay_models.text4seg.replay import Replay, replay

VAL = Path(__file__).parents[3].parent / "shared" / "data" / "seg-tiny" / "val.jsonl"
PROMPT = [1, 2, 3]
ANSWER = list(range(10, 31))  # 21 tokens


def nothing(new: Any, lengths: Any, token_ids: Any) -> list[list[int]]:
    return [[]]


def oracle(length: int) -> Any:
    """Drafts what the answer is, as far as it goes, and something else behind it."""

    def propose(new: Any, lengths: Any, token_ids: Any) -> list[list[int]]:
        return [(ANSWER + [99] * length)[lengths[0] - len(PROMPT) :][:length]]

    return propose


def test_without_drafts_each_token_takes_a_pass() -> None:
    assert replay(PROMPT, ANSWER, nothing, max_drafts=4) == Replay(tokens=21, passes=21, drafted=0)


def test_wrong_drafts_save_nothing() -> None:
    assert replay(PROMPT, ANSWER, lambda *_: [[0, 0, 0]], max_drafts=4) == Replay(21, 21, 3 * 20)


def test_right_drafts_write_themselves_and_one_more() -> None:
    """The first pass writes one token; each of the others four drafts and a fifth token of its own."""
    assert replay(PROMPT, ANSWER, oracle(4), max_drafts=4) == Replay(21, 1 + 20 // 5, 4 * 4)


def test_a_draft_is_kept_up_to_its_first_wrong_token() -> None:
    def half_right(new: Any, lengths: Any, token_ids: Any) -> list[list[int]]:
        ((first, second, *_),) = oracle(4)(new, lengths, token_ids)
        return [[first, second, 0, first]]

    assert replay(PROMPT, ANSWER, half_right, max_drafts=4).passes == 1 + 7  # 20 = 6 * 3 + 2


def test_only_passes_that_wrote_a_counted_token_count() -> None:
    """Passes end behind 1, 6, 11, 16 and 21 tokens; drafts that were checked for the first of them count whole."""
    passes = [replay(PROMPT, ANSWER, oracle(4), max_drafts=4, count_from=start).passes for start in range(21)]
    assert passes == [5, *[4] * 5, *[3] * 5, *[2] * 5, *[1] * 5]
    assert replay(PROMPT, ANSWER, oracle(4), max_drafts=4, count_from=15) == Replay(6, 2, 8)


def test_a_proposer_sees_what_an_engine_would_show_it() -> None:
    """All tokens so far, those of the step among them; behind the end what was rejected."""
    seen = []

    def propose(new: list[list[int]], lengths: Any, token_ids: Any) -> list[list[int]]:
        length = int(lengths[0])
        assert token_ids[0, :length].tolist() == PROMPT + ANSWER[: length - len(PROMPT)]
        assert new[0] == token_ids[0, length - len(new[0]) : length].tolist()
        seen.append(int(token_ids[0, length]))
        return [[ANSWER[length - len(PROMPT)] if length - len(PROMPT) < 21 else 0, 77, 78]]

    replay(PROMPT, ANSWER, propose, max_drafts=3)
    assert seen[1:-1] == [78] * (len(seen) - 2)


@pytest.mark.parametrize("count_from", [-1, 21])
def test_a_start_outside_of_the_answer_is_refused(count_from: int) -> None:
    with pytest.raises(RelayModelsError, match=f"count_from must lie in the answer of 21 tokens, got {count_from}"):
        replay(PROMPT, ANSWER, nothing, max_drafts=4, count_from=count_from)


def test_a_draft_that_an_engine_could_not_check_is_refused() -> None:
    with pytest.raises(RelayModelsError, match="a draft of 4 tokens, max_drafts is 3"):
        replay(PROMPT, ANSWER, oracle(4), max_drafts=3)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    from relay_serving.embedded_model import prepare

    return AutoTokenizer.from_pretrained(prepare())


needs_val = pytest.mark.skipif(not VAL.exists(), reason="no seg-tiny beside this checkout")


@needs_val
def test_every_fifth_mask_takes_at_most_a_tenth_of_a_pass_for_a_token(tokenizer: Any) -> None:
    from relay_benchmarks.drafting import make_sample, measure, read_masks
    from relay_models.text4seg.row_drafter import RowDrafter, Vocabulary

    masks = itertools.islice(read_masks(VAL), 0, None, 5)
    samples = [make_sample(tokenizer, text, mask, 16, varied=True) for text, mask in masks]
    measured = measure(samples, RowDrafter(Vocabulary(tokenizer), 32).propose, 32)
    tokens = sum(run.tokens for run in measured.descriptors)
    print(f"{len(samples)} masks, {measured.passes / tokens:.3f} passes a token")
    assert len(samples) > 150
    assert measured.passes <= 0.10 * tokens
    large = measured.of([i for i, sample in enumerate(samples) if sample.area >= 0.05])
    assert large.passes <= 0.10 * sum(run.tokens for run in large.descriptors)


@needs_val
@pytest.mark.slow
@pytest.mark.parametrize("drafts", [16, 32])
def test_the_goal_on_all_masks(tokenizer: Any, drafts: int) -> None:
    """At most 0.10 passes a token, and half of what vLLM's n-gram proposer needs in the same run."""
    from relay_benchmarks.drafting import compare, make_sample, read_masks
    from relay_models.text4seg.codec import DescriptorFormat
    from relay_models.text4seg.row_drafter import Vocabulary

    samples = [make_sample(tokenizer, text, mask, 16, varied=False) for text, mask in read_masks(VAL)]
    every, large = compare(samples, Vocabulary(tokenizer), [drafts], print)
    assert len(every.samples) == 817
    assert np.isclose(every.tokens(DescriptorFormat.R_RLE) / every.tokens(DescriptorFormat.FULL), 0.256, atol=0.005)
    assert every.rows.passes <= 0.10 * every.tokens(DescriptorFormat.R_RLE)
    assert every.rows.passes <= 0.5 * every.ngram.passes
    assert large.rows.passes <= 0.5 * large.ngram.passes
