"""Which labels are one class, which are refused, and that a stand-in turns back into the label it stands for."""

from __future__ import annotations

import numpy as np
import pytest
from codec_cases import is_carried, raw_labels
from hypothesis import example, given
from hypothesis import strategies as st

from relay_models.errors import LabelError, RelayModelsError
from relay_models.text4seg.codec import decode, encode
from relay_models.text4seg.labels import MAX_LABEL_LENGTH, check_label, match_key, normalise, restore, substitute


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Others", "others"),
        ("dog,  brown", "dog, brown"),
        (" dog\tbrown\u00a0", "dog brown"),
        ("ＤＯＧ", "dog"),
        ("Straße", "STRASSE"),
        ("cafe\u0301", "café"),
        ("ﬁsh", "FISH"),
        ("m²", "M2"),
    ],
)
def test_labels_that_are_one_class(one, other):
    assert match_key(one) == match_key(other)


@pytest.mark.parametrize(("one", "other"), [("dog", "dogs"), ("cafe", "café"), ("dog brown", "dogbrown"), ("狗", "犬")])
def test_labels_that_are_two_classes(one, other):
    assert match_key(one) != match_key(other)


@given(label=raw_labels)
@example(label="ΐ")
@example(label="ß\u0301")
def test_a_key_is_its_own_key(label):
    assert match_key(match_key(label)) == match_key(label)
    assert normalise(normalise(label)) == normalise(label)


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        ("a|b", "separates runs"),
        ("5 *3 sign", "a digit"),
        ("two\nlines", "line break"),
        ("two\rlines", "line break"),
        ("the <seg> tag", "tag"),
        ("the </seg> tag", "tag"),
        ("", "blank"),
        (" \t ", "blank"),
        (" cat", "begins or ends"),
        ("cat\u00a0", "begins or ends"),
        ("dog  brown", "white space"),
        ("dog\tbrown", "white space"),
        ("dog\u2028brown", "white space"),
        ("half \ud83d pair", "surrogate"),
        ("a" * (MAX_LABEL_LENGTH + 1), "characters"),
    ],
)
def test_a_label_that_is_not_carried_is_refused_with_the_reason(label, reason):
    with pytest.raises(LabelError, match=reason) as refusal:
        check_label(label)
    assert repr(label[:5])[:-1] in str(refusal.value)
    assert len(str(refusal.value)) < 300
    assert isinstance(refusal.value, RelayModelsError)


@pytest.mark.parametrize(
    "label",
    [
        "5* hotel",
        "man, number 23",
        "50% off sign",
        "woman's hat",
        "a * b",
        "2*4 board",
        "*",
        "<segment>",
        "<se",
        "x *",
        "狗",
        "dog 🐕",
        "others",
        "a" * MAX_LABEL_LENGTH,
    ],
)
def test_a_label_that_looks_dangerous_but_is_carried(label):
    check_label(label)
    assert substitute(label) == label
    body = encode(np.array([[0, 1, 1]]), ["zebra", label])
    descriptor = decode(body, height=1, width=3)
    assert descriptor.mask(label).tolist() == [[0, 1, 1]]


@pytest.mark.parametrize(
    ("label", "stand_in"),
    [
        ("a|b", "a¦b"),
        ("sign *5", "sign ∗5"),
        ("a *0", "a ∗0"),
        ("the <seg> and </seg>", "the ‹seg> and ‹/seg>"),
        ("two\nlines", "two↵lines"),
        ("a¦b", "a⧵a6;b"),
        ("a  b ", "a ⧵20;b⧵20;"),
        ("⧵20;", "⧵29f5;20;"),
    ],
)
def test_stand_ins_are_these(label, stand_in):
    assert substitute(label) == stand_in
    assert restore(stand_in) == label


@given(label=st.one_of(raw_labels, st.text(st.characters(exclude_categories=()), max_size=8)))
def test_a_stand_in_is_carried_and_turns_back(label):
    if not normalise(label):
        with pytest.raises(LabelError, match="blank"):
            substitute(label)
        return
    stand_in = substitute(label)
    check_label(stand_in)
    assert restore(stand_in) == label
    if match_key(stand_in) not in ("others", "zebra"):
        body = encode(np.array([[0, 1]]), [stand_in, "zebra"])
        assert restore(decode(body, height=1, width=2).labels[1]) == label


@given(one=raw_labels.filter(normalise), other=raw_labels.filter(normalise))
def test_two_labels_never_share_a_stand_in(one, other):
    assert (substitute(one) == substitute(other)) == (one == other)


@given(text=raw_labels)
@example(text="⧵ffffff;")
@example(text="⧵110000;")
@example(text="⧵;")
def test_restoring_is_total(text):
    assert isinstance(restore(text), str)


@given(label=raw_labels.filter(is_carried))
def test_an_ordinary_label_is_written_as_it_is(label):
    if not set(label) & set("¦∗‹↵⧵"):
        assert substitute(label) == label


def test_a_label_too_long_for_its_stand_in_is_refused():
    with pytest.raises(LabelError, match="characters"):
        substitute("¦" * (MAX_LABEL_LENGTH // 2))
