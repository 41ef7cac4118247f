"""The published sentences, byte for byte, and what may be put into them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay_models.errors import LabelError
from relay_models.text4seg.labels import check_label, match_key
from relay_models.text4seg.prompts import (
    TEMPLATES,
    PromptKind,
    Subject,
    answer_preamble,
    answer_preambles,
    join_classes,
    num_answers,
    num_questions,
    question,
    template_index,
)

GOLDEN = Path(__file__).parents[4] / "shared" / "golden" / "text4seg" / "prompts"

SUBJECTS = {
    PromptKind.REFER: Subject.refer("dog"),
    PromptKind.CLASSES: Subject.classes(["dog", "grass"]),
    PromptKind.EVERYTHING: Subject.everything(),
    PromptKind.PARTS: Subject.parts("dog"),
    PromptKind.PART: Subject.part("tail", "dog"),
}


def golden(name: str) -> dict:
    if not GOLDEN.exists():
        pytest.skip(f"the golden vectors are not at {GOLDEN}")
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def is_label(text: str) -> bool:
    try:
        check_label(text)
    except LabelError:
        return False
    return match_key(text) != "others"


labels = st.text(min_size=1, max_size=30).filter(is_label)


def test_the_templates_are_the_published_ones():
    assert json.dumps(dict(TEMPLATES)) == json.dumps(golden("templates.json"))


def test_filled_questions_and_answers_are_the_published_ones():
    filled = golden("filled.json")
    for example in filled["res"]:
        subject = Subject.refer(example["expression"])
        assert [question(subject, index=i) for i in range(num_questions(subject.kind))] == example["questions"]
        assert [answer_preamble(subject, index=i) for i in range(num_answers(subject.kind))] == example["answers"]
    classes = filled["open_vocabulary"]
    assert join_classes(classes["classes"]) == classes["joined"]
    subject = Subject.classes(classes["classes"])
    assert [question(subject, index=i) for i in range(num_questions(subject.kind))] == classes["questions"]


def test_every_kind_uses_its_own_lists_in_full():
    lists = {
        PromptKind.REFER: "PARTIAL",
        PromptKind.CLASSES: "CONDITION",
        PromptKind.EVERYTHING: "ALL",
        PromptKind.PARTS: "OBJECT_ALL",
        PromptKind.PART: "OBJECT_PART",
    }
    assert set(lists) == set(PromptKind)
    texts = {"[class_name]": {PromptKind.REFER: "dog", PromptKind.CLASSES: "others|dog|grass"}}
    for kind, name in lists.items():
        filled = [
            sentence.replace("[class_name]", texts["[class_name]"].get(kind, ""))
            .replace("[object]", "dog")
            .replace("[part]", "tail")
            for sentence in TEMPLATES[f"QUESTION_{name}"]
        ]
        assert [question(SUBJECTS[kind], index=i) for i in range(num_questions(kind))] == filled
        assert num_answers(kind) == len(TEMPLATES[f"ANSWER_{name}"])


@pytest.mark.parametrize("kind", PromptKind)
def test_no_placeholder_is_left(kind):
    sentences = [question(SUBJECTS[kind], index=i) for i in range(num_questions(kind))]
    sentences += [answer_preamble(SUBJECTS[kind], index=i) for i in range(num_answers(kind))]
    assert not [sentence for sentence in sentences if "[" in sentence]


def test_the_defaults_are_one_sentence_each():
    subject = Subject.refer("dog laying down")
    assert question(subject) == "Please segment only the dog laying down in the image."
    assert answer_preamble(subject) == "The segmentation mask for 'dog laying down' is shown below:"
    answers = TEMPLATES["ANSWER_PARTIAL"]
    assert answers.count("The segmentation mask for '[class_name]' is shown below:") == 2, "why it is the default"
    for kind, subject in SUBJECTS.items():
        assert question(subject) == question(subject, index=0), kind


def test_the_preambles_are_each_named_once():
    preambles = answer_preambles(Subject.refer("dog"))
    assert len(preambles) == 9
    assert set(preambles) == {answer_preamble(Subject.refer("dog"), index=i) for i in range(10)}


@given(labels)
def test_an_expression_stands_in_question_and_answer_verbatim(expression):
    subject = Subject.refer(expression)
    for index, template in enumerate(TEMPLATES["QUESTION_PARTIAL"]):
        before, after = template.split("[class_name]")
        assert question(subject, index=index) == before + expression + after
    for index, template in enumerate(TEMPLATES["ANSWER_PARTIAL"]):
        before, after = template.split("[class_name]")
        assert answer_preamble(subject, index=index) == before + expression + after


def test_a_placeholder_in_the_text_stays_text():
    assert question(Subject.refer("the [class_name] sign")) == (
        "Please segment only the the [class_name] sign in the image."
    )
    assert question(Subject.part("[object]", "[part]")) == "Please segment the [object] of the [part] in this image."


@pytest.mark.parametrize("bad", ["a|b", "5 *3 sign", "two\nlines", "a <seg> b", "", "  ", " dog"])
def test_what_a_descriptor_cannot_carry_is_refused(bad):
    for make in (
        lambda: Subject.refer(bad),
        lambda: Subject.classes(["dog", bad]),
        lambda: Subject.parts(bad),
        lambda: Subject.part(bad, "dog"),
        lambda: Subject.part("tail", bad),
    ):
        with pytest.raises(LabelError):
            make()


@pytest.mark.parametrize("background", ["others", "Others", "ＯＴＨＥＲＳ"])
def test_the_background_cannot_be_what_is_asked_for(background):
    for field, make in (("expression", Subject.refer), ("name", Subject.parts)):
        with pytest.raises(LabelError, match=f"{field} is '{background}'"):
            make(background)
    with pytest.raises(LabelError, match="part is"):
        Subject.part(background, "dog")


def test_classes_are_joined_with_others_first():
    assert join_classes(["dog", "grass"]) == "others|dog|grass"
    assert join_classes(["dog", "OTHERS", "grass"]) == "others|dog|grass"
    assert join_classes(("person, man, individual",)) == "others|person, man, individual"


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        ([], "besides 'others'"),
        (["others"], "besides 'others'"),
        (["dog", "cat", "DOG"], "names 'DOG' twice"),
        (["others", "Others", "dog"], "names 'Others' twice"),
        ("dog", "the single string 'dog'"),
    ],
)
def test_class_lists_that_cannot_be_asked_for(names, complaint):
    with pytest.raises(LabelError, match=complaint):
        join_classes(names)


@given(st.lists(labels, min_size=1, max_size=8, unique_by=match_key))
def test_a_class_list_splits_into_what_was_joined(names):
    assert join_classes(names).split("|") == ["others", *names]


@pytest.mark.parametrize("index", [-1, 6, 100])
def test_an_index_outside_the_list_is_refused(index):
    with pytest.raises(IndexError, match=f"0 to 5 for refer, got {index}"):
        question(Subject.refer("dog"), index=index)


def test_a_seed_chooses_the_same_template_in_every_process():
    seeds = [0, 1, 2, "photo-7", 10**30]
    here = [template_index(seed, 13) for seed in seeds]
    program = (
        "from relay_models.text4seg.prompts import template_index; "
        f"print([template_index(seed, 13) for seed in {seeds!r}])"
    )
    for hash_seed in ("1", "2"):
        there = subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": hash_seed}, capture_output=True, text=True
        )
        assert there.stdout.strip() == repr(here), there.stderr
    assert here == [1, 4, 12, 3, 9], "a recipe that names a seed would now be trained on other sentences"


def test_seeds_choose_every_template_about_equally_often():
    counts = [0] * 6
    for seed in range(6000):
        counts[template_index(seed, 6)] += 1
    assert min(counts) > 850
    assert max(counts) < 1150


def test_a_choice_among_nothing_is_refused():
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        template_index(1, 0)
