"""The sentences a Text4Seg checkpoint was trained on: how to ask for a segmentation, and how an answer to it begins.

The templates are data, byte for byte as published (arXiv 2410.09855; mc-lan/Text4Seg at d6540b6,
``question_answer_list.py``): a checkpoint has seen these sentences and no others, so none is improved here, not even
the one with a capital in its middle or the one that stands twice.

Promises: what is asked for is inserted verbatim, so that the label in the descriptor is the string in the question; a
string that a descriptor cannot carry is refused; equal arguments give equal text, on every machine and in any release.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from relay_models.errors import LabelError
from relay_models.text4seg.labels import BACKGROUND, check_label, match_key

CLASS_SEPARATOR = "|"

TEMPLATES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "QUESTION_ALL": (
            "Segment the entire image and classify each category separately.",
            "Please perform segmentation on this image and highlight all identifiable elements.",
            "Perform segmentation on this image and label all detected categories.",
            "Please identify and segment all categories present in the image.",
            "Segment the image and label all categories detected.",
            "Could you segment the image and label each identifiable category?",
            "Segment the image to identify and label all visible categories.",
            "Segment and classify all elements in the image.",
            "Identify and segment all categories visible in the image.",
            "Can you segment and label the image?",
            "Might you segment this image?",
            "Can you perform segmentation on this image?",
            "Could you please segment this image?",
        ),
        "ANSWER_ALL": (
            "Sure, here is the segmented image with each category classified separately:",
            "Sure, here’s the segmented image showing all visible categories:",
            "The image is segmented and annotated with each category:",
            "The image segmentation is complete, with all categories marked:",
            "Sure, the segmentation mask is:",
            "Sure, the segmented image is:",
            "Certainly, the segmented map is:",
            "Certainly, here is the segmentation mask:",
            "Certainly, here is the segmented output:",
            "Sure, here is the segmentation map:",
            "The segmentation mask is shown below:",
        ),
        "QUESTION_PARTIAL": (
            "Please segment only the [class_name] in the image.",
            "Can you segment the [class_name] in the image?",
            "Where is the [class_name] in this picture? Please respond with segmentation mask.",
            "Where is '[class_name]' in this image? Please output segmentation mask.",
            "Could you provide the segmentation mask for '[class_name]' in this image?",
            "Please segment the image and highlight '[class_name]'.",
        ),
        "ANSWER_PARTIAL": (
            "Sure, here is the segmentation mask for '[class_name]':",
            "Here is the segmentation map focusing on the [class_name]:",
            "Here is the segmentation mask highlighting the [class_name]:",
            "The segmentation map for '[class_name]' is:",
            "The segmentation mask for '[class_name]' is shown below:",
            "Sure, Here's the segmentation of the [class_name]:",
            "Sure, the segmented output for '[class_name]' is:",
            "Certainly, the segmentation map for '[class_name]' is:",
            "Certainly, here is the segmentation mask for '[class_name]':",
            "The segmentation mask for '[class_name]' is shown below:",
        ),
        "QUESTION_CONDITION": (
            "Please segment the image based on the category: [class_name].",
            "Segment the image according to the specified category: [class_name].",
            "Segment the image while focusing on the category: [class_name].",
            "Please provide a segmentation map for the category: [class_name].",
            "Segment the image with emphasis on the class: [class_name].",
            "Please segment the image, focusing on the candidate category: [class_name].",
            "Could you segment the image, considering the indicated class: [class_name]?",
        ),
        "ANSWER_CONDITION": (
            "Sure, here is the segmentation based on the category '[class_name]':",
            "The image has been segmented according to the category '[class_name]':",
            "Certainly, here is the segmentation map for the category '[class_name]':",
            "The image is segmented with emphasis on the class '[class_name]':",
            "Here is the segmented image focusing on the candidate category '[class_name]':",
            "The image has been segmented with the category '[class_name]' in mind:",
            "Sure, the segmentation mask is:",
            "Sure, the segmented image is:",
            "Certainly, the segmented map is:",
            "Certainly, here is the segmentation mask:",
            "Certainly, here is the segmented output:",
            "Sure, here is the segmentation map:",
            "The segmentation mask is shown below:",
        ),
        "QUESTION_OBJECT_ALL": (
            "Could you please segment the [object] in detail?",
            "Can you segment the [object] in this image into its parts?",
            "Segment the [object] and label each part.",
            "Could you segment the [object] in this image and classify its parts separately?",
            "Segment the [object] in this image to show all its parts.",
            "Please provide a detailed segmentation of the [object].",
            "Segment the [object] in detail and label each identifiable part.",
            "Please identify and segment the parts of the [object] in this picture.",
        ),
        "ANSWER_OBJECT_ALL": (
            "Sure, the segmented map of the [object] is:",
            "Certainly, here is the detailed segmentation mask of the [object]:",
            "Here is the segmented image of the [object] with each part classified separately:",
            "The [object] is segmented and annotated with each part labeled:",
            "Sure, the detailed segmented image of the [object] is:",
            "Sure, the segmentation of the [object] into its parts is:",
        ),
        "QUESTION_OBJECT_PART": (
            "Please segment the [part] of the [object] in this image.",
            "Can you segment the [part] of the [object]?",
            "Could you please identify and segment the [part] of the [object] in this image?",
            "Focus on the [part] of the [object] in this image and segment it, please.",
            "Please extract the [part] of the [object] from this image and segment it.",
            "I need the [part] of the [object] segmented in this picture.",
            "Identify and segment the [part] of the [object] in the given image.",
            "Segment out the [part] of the [object] shown in this image.",
        ),
        "ANSWER_OBJECT_PART": (
            "Sure, here is the segmentation mask for the [part] of the [object]:",
            "Here is the segmentation map focusing on the [part] of the [object]:",
            "Here is the segmentation mask highlighting the [part] of the [object]:",
            "The segmentation map for the [part] of the [object] is:",
            "Here's the segmentation of the [part] of the [object]:",
            "Sure, the segmented output for the [part] of the [object] is:",
            "Certainly, the segmentation map for the [part] of the [object] is:",
            "Certainly, here is the segmentation mask for the [part] of the [object]:",
            "Sure, here is the segmentation map for the [part] of the [object]:",
            "The segmentation mask for the [part] of the [object] is shown below:",
        ),
    }
)


class PromptKind(StrEnum):
    """What is asked for.

    REFER: one referring expression (RES, GRES, and REC, whose box is taken from the mask).
    CLASSES: the named classes, over the whole picture.
    EVERYTHING: whatever is there, named by the model.
    PARTS: all parts of one object.
    PART: one part of one object.
    """

    REFER = "refer"
    CLASSES = "classes"
    EVERYTHING = "everything"
    PARTS = "parts"
    PART = "part"


@dataclass(frozen=True)
class _Sentences:
    """The lists of one kind, and which of each is used when nobody asks for another."""

    questions: tuple[str, ...]
    answers: tuple[str, ...]
    default_question: int = 0
    default_answer: int = 0


_SENTENCES: Mapping[PromptKind, _Sentences] = MappingProxyType(
    {
        # of its answers the one that stands twice, so the likeliest in training
        PromptKind.REFER: _Sentences(TEMPLATES["QUESTION_PARTIAL"], TEMPLATES["ANSWER_PARTIAL"], default_answer=4),
        PromptKind.CLASSES: _Sentences(TEMPLATES["QUESTION_CONDITION"], TEMPLATES["ANSWER_CONDITION"]),
        PromptKind.EVERYTHING: _Sentences(TEMPLATES["QUESTION_ALL"], TEMPLATES["ANSWER_ALL"]),
        PromptKind.PARTS: _Sentences(TEMPLATES["QUESTION_OBJECT_ALL"], TEMPLATES["ANSWER_OBJECT_ALL"]),
        PromptKind.PART: _Sentences(TEMPLATES["QUESTION_OBJECT_PART"], TEMPLATES["ANSWER_OBJECT_PART"]),
    }
)


@dataclass(frozen=True)
class Subject:
    """What one question is about. Made by its class methods, each for one `PromptKind`.

    Raises LabelError, from every one of them, for a string that a descriptor could not carry as a label, and for the
    background's name where a thing is asked for.
    """

    kind: PromptKind
    values: tuple[tuple[str, str], ...]  # placeholder, text

    @classmethod
    def refer(cls, expression: str) -> Subject:
        """One region, in words. They become the label as they are, commas and digits included."""
        _check_wanted("expression", expression)
        return cls(PromptKind.REFER, (("[class_name]", expression),))

    @classmethod
    def classes(cls, names: Sequence[str]) -> Subject:
        """The classes ``names``, over the whole picture; see `join_classes`."""
        return cls(PromptKind.CLASSES, (("[class_name]", join_classes(names)),))

    @classmethod
    def everything(cls) -> Subject:
        """Whatever is in the picture."""
        return cls(PromptKind.EVERYTHING, ())

    @classmethod
    def parts(cls, name: str) -> Subject:
        """All parts of the object ``name``."""
        _check_wanted("name", name)
        return cls(PromptKind.PARTS, (("[object]", name),))

    @classmethod
    def part(cls, part: str, name: str) -> Subject:
        """One ``part`` of the object ``name``; the part is the label."""
        _check_wanted("part", part)
        _check_wanted("name", name)
        return cls(PromptKind.PART, (("[object]", name), ("[part]", part)))


def question(subject: Subject, *, index: int | None = None) -> str:
    """The sentence that asks for ``subject``.

    Args:
        subject: what to ask for.
        index: which template of the kind, see `template_index`; by default the canonical one.

    Raises:
        IndexError: there is no such template.
    """
    sentences = _SENTENCES[subject.kind]
    return _filled(sentences.questions, sentences.default_question if index is None else index, subject)


def answer_preamble(subject: Subject, *, index: int | None = None) -> str:
    """The sentence an answer begins with, without the line break and the descriptor that follow it.

    Arguments and errors as of `question`.
    """
    sentences = _SENTENCES[subject.kind]
    return _filled(sentences.answers, sentences.default_answer if index is None else index, subject)


def answer_preambles(subject: Subject) -> tuple[str, ...]:
    """Every sentence an answer about ``subject`` may begin with, each once, in published order."""
    answers = _SENTENCES[subject.kind].answers
    return tuple(dict.fromkeys(_filled(answers, index, subject) for index in range(len(answers))))


def num_questions(kind: PromptKind) -> int:
    return len(_SENTENCES[kind].questions)


def num_answers(kind: PromptKind) -> int:
    return len(_SENTENCES[kind].answers)


def template_index(seed: int | str, count: int) -> int:
    """A choice among ``count`` templates that depends on ``seed`` alone, not on the process, its hash seed or Python.

    Raises:
        ValueError: ``count`` is not positive.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    digest = hashlib.blake2b(str(seed).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % count


def join_classes(names: Sequence[str]) -> str:
    """The class list as the questions name it: ``others`` first, whether or not it was given, then the names in order.

    Raises:
        LabelError: no name besides ``others``; a name twice, as labels are compared; a name a descriptor cannot carry.
    """
    if isinstance(names, str):
        raise LabelError(f"classes must be a list of names, got the single string {names!r}")
    background = match_key(BACKGROUND)
    seen: dict[str, str] = {}
    for name in names:
        check_label(name)
        key = match_key(name)
        if key in seen:
            raise LabelError(f"classes names {name!r} twice (first as {seen[key]!r}); name each class once")
        seen[key] = name
    wanted = [name for key, name in seen.items() if key != background]
    if not wanted:
        raise LabelError(f"classes must name something besides {BACKGROUND!r}, got {list(names)!r}")
    return CLASS_SEPARATOR.join((BACKGROUND, *wanted))


def _check_wanted(field: str, label: str) -> None:
    check_label(label)
    if match_key(label) == match_key(BACKGROUND):
        raise LabelError(f"{field} is {label!r}, the name of whatever was not asked for: name what is to be segmented")


def _filled(templates: tuple[str, ...], index: int, subject: Subject) -> str:
    if not 0 <= index < len(templates):
        raise IndexError(f"index must be 0 to {len(templates) - 1} for {subject.kind.value}, got {index}")
    return _replaced(templates[index], dict(subject.values))


def _replaced(template: str, values: Mapping[str, str]) -> str:
    """Each placeholder replaced once, from left to right: what is inserted may itself contain a placeholder's name."""
    done, rest = "", template
    while found := [(rest.index(name), name) for name in values if name in rest]:
        at, name = min(found)
        done += rest[:at] + values[name]
        rest = rest[at + len(name) :]
    return done + rest
