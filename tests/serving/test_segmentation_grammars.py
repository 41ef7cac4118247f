"""The constraint of a chat: text is free, and a descriptor that is opened has to be one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import xgrammar
from transformers import AutoTokenizer

from relay_models.text4seg.codec import encode
from relay_serving.embedded_model import prepare
from relay_serving.segmentation.grammars import Grammars

BODY = encode(np.array([[0] * 10 + [1] * 6] * 16), ["others", "the dog"])


@pytest.fixture(scope="module")
def compiled() -> xgrammar.CompiledGrammar:
    folder: Path = prepare()
    info = xgrammar.TokenizerInfo.from_huggingface(AutoTokenizer.from_pretrained(folder))
    return xgrammar.GrammarCompiler(info).compile_structural_tag(json.loads(Grammars(16, 16, len).chat()))


@pytest.mark.parametrize(
    ("text", "is_accepted"),
    [
        ("Just talk: 2 < 3, and <b>no</b> mask.", True),
        (f"Here:\n<seg>{BODY}</seg>", True),
        (f"One <seg>{BODY}</seg> and another: <seg>{BODY}</seg>. Done.", True),
        ("Here:\n<seg>others *15\n", False),
        ("Here:\n<seg>others *17\n", False),
        ("Here:\n<seg>No.\n", False),
        (f"Here:\n<seg>{BODY} others *16\n", False),
        (f"Here:\n<seg>{BODY[: len(BODY) // 2]}</seg>", False),
    ],
)
def test_a_descriptor_is_whole_and_text_is_free(
    compiled: xgrammar.CompiledGrammar, text: str, is_accepted: bool
) -> None:
    assert xgrammar.GrammarMatcher(compiled).accept_string(text) == is_accepted


def test_the_longest_descriptor_is_a_checkerboard_where_it_is_known() -> None:
    grammars = Grammars(2, 2, len)
    assert grammars.most_tokens(["cat"]) == len(" \n<seg>others *1| cat *1\n others *1| cat *1\n</seg>")
    assert grammars.most_tokens(None) is None
    long_labels = [f"{i:03} {'a' * 396}" for i in range(100)]
    assert grammars.most_tokens(long_labels) is None, "without a grammar such labels may still be asked for"
