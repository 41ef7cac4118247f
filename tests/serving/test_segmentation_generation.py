"""What the engine has said, put together where an answer is asked to go on."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models

from relay_serving.segmentation.generation import Spoken, pieces_of


def test_an_answer_that_went_on_counts_the_prompt_that_was_asked() -> None:
    refused = Spoken("No", token_ids=[5], finish_reason="stop", prompt_tokens=300, cached_tokens=256)
    forced = Spoken("<seg>", token_ids=[6, 7], finish_reason="length", prompt_tokens=301, cached_tokens=300)
    both = refused.followed_by(forced)
    assert (both.text, both.token_ids, both.finish_reason) == ("No<seg>", [5, 6, 7], "length")
    assert (both.prompt_tokens, both.cached_tokens) == (300, 256), "no more tokens were cached than were asked"


def test_a_prompt_of_which_nothing_was_cached_stays_so() -> None:
    refused = Spoken("No", token_ids=[5], prompt_tokens=300, cached_tokens=0)
    assert refused.followed_by(Spoken(prompt_tokens=301, cached_tokens=300)).cached_tokens == 0


def test_the_first_thing_said_counts_its_own_prompt() -> None:
    first = Spoken().followed_by(Spoken("a", [1], "stop", prompt_tokens=20, cached_tokens=16))
    assert first == Spoken("a", [1], "stop", prompt_tokens=20, cached_tokens=16)


def test_the_token_that_ended_an_answer_is_taken_back_and_no_other() -> None:
    spoken = Spoken("No", token_ids=[2, 5, 2])
    spoken.take_back(frozenset({2}))
    assert spoken.token_ids == [2, 5]
    spoken.take_back(frozenset({2}))
    assert spoken.token_ids == [2, 5]


def llama_like(*tokens: str) -> Tokenizer:
    """Decodes as LLaMA's tokenizers do: the space that a text begins with is dropped, bytes are put together."""
    tokenizer = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token=tokens[0]))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


@pytest.mark.parametrize(
    ("tokens", "pieces"),
    [
        (("▁the", "▁dog", "▁*", "1", "6"), ["the", " dog", " *", "1", "6"]),
        (("<seg>", "▁", "café", "<0xE7>", "<0x8C>", "<0xAB>", "▁*"), ["<seg>", " ", "café", "", "", "猫", " *"]),
    ],
)
def test_pieces_of_an_answer_add_up_to_its_text(tokens: tuple[str, ...], pieces: list[str]) -> None:
    tokenizer = llama_like(*tokens)
    ids = list(range(len(tokens)))
    assert pieces_of(ids, tokenizer.decode) == pieces
    assert "".join(pieces) == tokenizer.decode(ids)
