"""From a photo with masks to questions with answers, and to what of an answer nobody knows.

Legend: G rows and columns of the grid; a cell holds an index into a question's labels, 0 is `others`.

The kinds of questions, in the sentences of arXiv 2410.09855 (`relay_models.text4seg.prompts`):
    class                      all of one class, by its name or by an expression of kind "class"
    position, size, relation, other   one instance, by an expression; or, where it means nothing, `absent`
    absent                     a class that is not there: the answer is `others` everywhere
    classes                    several classes at once, present and absent ones
    everything                 whatever is there
Masks are joined first and then reduced to the grid by the nearest pixel, as the paper does.

What it promises:
    - All of a class is asked for only where its masks are complete: it is not in `unsure`, and it is one of
      `labelled_classes`, where these are given. Of any other class only single instances are asked for, by expressions
      of position, size or relation; `everything` names it where it has a mask.
    - Absent is what the photo lists in `absent`, within `labelled_classes` or not (`known_absent`).
    - A cell whose truth is unknown is marked in `ignore_GG`, and `ignored_spans` tells which characters of the answer
      depend on it. What is written there (`others`, or a label) is a place holder that no loss may see:
        one instance: cells of crowds and groups of the same class. (Of a whole class they are a certain part.)
        everything: cells without a mask, where some class may lack masks (`unsure`, `labelled_classes`).
    - What is there and vanishes on the grid is not asked for: its answer would say that it is not there.
    - Equal photo, grid, mix and state of the generator give equal questions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import numpy as np
import numpy.typing as npt

from relay_models.errors import RelayModelsError
from relay_models.recipes.text4seg.augment import plural
from relay_models.recipes.text4seg.dataset import Expression, Instance, Photo
from relay_models.text4seg.codec import BACKGROUND, CLOSE_TAG, OPEN_TAG, encode
from relay_models.text4seg.geometry import reduce_to_grid
from relay_models.text4seg.prompts import PromptKind, Subject, answer_preamble, num_questions, question

Cells = npt.NDArray[np.uint8]
CellMask = npt.NDArray[np.bool_]
Span = tuple[int, int]

QUESTION_KINDS = ("class", "position", "size", "relation", "other", "absent", "classes", "everything")
MAX_LABELS = 255  # of one question, so that cells fit in uint8

# How often a class of a map is asked for by its bare name, as evaluations do, and in the ways of `_called`.
_SHARES_OF_NAMES = (0.6, 0.1, 0.15, 0.15)
# How a thing that is not there may be called: by its name, as evaluations do, and as expressions call what is there.
_ABSENT_NAMES = ("{}", "the {}")
_ABSENT_EXPRESSIONS = ("the {} on the left", "the {} on the right", "the leftmost {}", "the rightmost {}")


@dataclass(frozen=True, eq=False)
class Question:
    """One question about one photo, and its answer.

    Attributes:
        prompt: the sentence that asks; the picture comes before it.
        answer: preamble, line break, descriptor with its tags.
        cells_GG: what the descriptor says.
        ignore_GG: True where the truth is unknown; see `ignored_spans`.
        labels: the first is `others`; then the expression, or the classes.
        kind: one of `QUESTION_KINDS`.
    """

    prompt: str
    answer: str
    cells_GG: Cells  # noqa: N815
    ignore_GG: CellMask  # noqa: N815
    labels: tuple[str, ...]
    kind: str


@dataclass(frozen=True)
class QuestionMix:
    """Which questions a photo gives.

    Attributes:
        num_absent: questions for classes that are not there, at most.
        instance_share: of expressions for single instances, how many are asked.
        absent_expression_share: of questions for what is not there, how many say more than a name ("the leftmost dog").
        multi_class_share: of photos with a complete class or a known absent one, how many give a multi-class question.
        everything_share: of photos, how many give a question for everything.
        max_absent_listed: absent classes in a multi-class question.
        max_ignored: the largest share of unknown cells with which a question is still asked.
        max_questions: of one photo, chosen at random; None for all.
        varies_templates: a random sentence of the kind instead of its canonical one. The answer's preamble is always
            the canonical one.
    """

    num_absent: int = 2
    instance_share: float = 1.0
    absent_expression_share: float = 0.25
    multi_class_share: float = 0.5
    everything_share: float = 0.25
    max_absent_listed: int = 3
    max_ignored: float = 0.5
    max_questions: int | None = None
    varies_templates: bool = True

    def __post_init__(self) -> None:
        for name in (
            "instance_share",
            "absent_expression_share",
            "multi_class_share",
            "everything_share",
            "max_ignored",
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise RelayModelsError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        for name in ("num_absent", "max_absent_listed"):
            if getattr(self, name) < 0:
                raise RelayModelsError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.max_questions is not None and self.max_questions < 1:
            raise RelayModelsError(f"max_questions must be at least 1, got {self.max_questions}")


def questions_of(photo: Photo, grid: int, rng: np.random.Generator, mix: QuestionMix | None = None) -> list[Question]:
    """Questions about ``photo``, in random order.

    Args:
        photo: what is known.
        grid: cells of a side.
        rng: makes every choice.
        mix: which kinds, and how many; by default `QuestionMix()`.
    """
    mix = mix or QuestionMix()
    found = [
        *_class_questions(photo, grid, rng, mix),
        *_expression_questions(photo, grid, rng, mix),
        *_absent_questions(photo, grid, rng, mix),
    ]
    if rng.random() < mix.multi_class_share:
        found += _multi_class_question(photo, grid, rng, mix)
    if rng.random() < mix.everything_share:
        found += _everything_question(photo, grid, rng, mix)
    found = [item for item in found if item.ignore_GG.mean() <= mix.max_ignored]
    order = rng.permutation(len(found))[: mix.max_questions]
    return [found[index] for index in order]


def questions_of_map(
    map_GG: npt.NDArray[np.int64],
    classes: Sequence[str],
    absent: Sequence[int],
    rng: np.random.Generator,
    mix: QuestionMix | None = None,
) -> list[Question]:
    """Questions about a map of classes, of which everything is known, in random order.

    Args:
        map_GG: [G, G] for each cell 1 + the index of a class, or 0.
        classes: the names.
        absent: numbers of classes to ask for as well, each once, those that are not on the map.
        rng: makes every choice.
        mix: see there; of it `multi_class_share` and `varies_templates` count here.
    """
    mix = mix or QuestionMix()
    grid = len(map_GG)
    present = [int(number) for number in np.unique(map_GG) if number]
    absent = [number for number in dict.fromkeys(absent) if number not in present]
    found = [
        _refer(_called(classes[number - 1], rng), map_GG == number, _nowhere(grid), kind, rng, mix)
        for kind, numbers in (("class", present), ("absent", absent))
        for number in numbers
    ]
    if present and rng.random() < mix.multi_class_share:
        listed = [number for number in (*present, *absent) if rng.random() < 0.8][: MAX_LABELS - 1] or present[:1]
        listed = [listed[index] for index in rng.permutation(len(listed))]
        cells_GG = np.zeros_like(map_GG, dtype=np.uint8)
        for place, number in enumerate(listed, start=1):
            cells_GG[map_GG == number] = place
        names = [classes[number - 1] for number in listed]
        found.append(
            _asked(Subject.classes(names), cells_GG, _nowhere(grid), (BACKGROUND, *names), "classes", rng, mix)
        )
    return [found[index] for index in rng.permutation(len(found))]


def _called(name: str, rng: np.random.Generator) -> str:
    """All of a class, in one of the ways that people ask for it."""
    names = (name, f"the {name}", f"all {plural(name)}", f"the {plural(name)}")
    return str(rng.choice(names, p=_SHARES_OF_NAMES))


def class_question(label: str) -> str:
    """The one sentence with which evaluations ask for a class."""
    return question(Subject.refer(label))


def instance_cells(instance: Instance, grid: int) -> CellMask:
    """[G, G] the cells of one instance. Nearest reduction picks pixels, so the cells of a union are their union."""
    return _instance_cells(instance, grid)


@lru_cache(maxsize=1 << 16)
def _instance_cells(instance: Instance, grid: int) -> CellMask:
    cells_GG = reduce_to_grid(instance.mask_HW, grid, grid)
    cells_GG.flags.writeable = False
    return cells_GG


def union_cells(instances: Iterable[Instance], grid: int) -> CellMask:
    """[G, G] the cells of their union; all False for none."""
    cells_GG = np.zeros((grid, grid), dtype=np.bool_)
    for instance in instances:
        cells_GG |= instance_cells(instance, grid)
    return cells_GG


# ---------------------------------------------------------------- what is unknown, in characters


def ignored_spans(question: Question) -> tuple[Span, ...]:
    """The stretches [start, end) of ``question.answer`` whose loss says nothing, sorted and apart from one another.

    A run `label *count` is two statements. Its label speaks of its first cell alone. Its count speaks of all of its
    cells, and of the next one in the row, where the run ends: it is unknown if any of them is.
    """
    if not question.ignore_GG.any():
        return ()
    body_start = question.answer.index(OPEN_TAG) + len(OPEN_TAG)
    at = body_start
    spans: list[Span] = []
    for row, cells_G in enumerate(question.cells_GG.tolist()):
        at += 1 if row else 0  # the space after the line break
        column = 0
        for index, run in groupby(cells_G):
            length = len(list(run))
            label, count = question.labels[index], f" *{length}"
            at += 2 if column else 0  # the separator
            if question.ignore_GG[row, column]:
                spans.append((at, at + len(label)))
            at += len(label)
            if question.ignore_GG[row, column : column + length + 1].any():
                spans.append((at, at + len(count)))
            at += len(count)
            column += length
        at += 1  # the line break
    assert question.answer[at:] == CLOSE_TAG, "the answer is not the descriptor of its cells"
    return _joined(spans)


def _joined(spans: list[Span]) -> tuple[Span, ...]:
    joined: list[Span] = []
    for start, end in spans:
        if joined and joined[-1][1] == start:
            joined[-1] = joined[-1][0], end
        else:
            joined.append((start, end))
    return tuple(joined)


# ---------------------------------------------------------------- the kinds


def _class_questions(photo: Photo, grid: int, rng: np.random.Generator, mix: QuestionMix) -> list[Question]:
    return [
        _refer(label, cells_GG, _nowhere(grid), "class", rng, mix)
        for label, cells_GG in _complete_classes(photo, grid).items()
    ]


def _expression_questions(photo: Photo, grid: int, rng: np.random.Generator, mix: QuestionMix) -> list[Question]:
    by_id = {instance.id: instance for instance in photo.instances}
    found = []
    for expression in photo.expressions:
        if not expression.ids:
            found.append(_refer(expression.text, _nowhere(grid), _nowhere(grid), "absent", rng, mix))
            continue
        meant = [by_id[number] for number in expression.ids]
        if expression.kind == "class" and not all(photo.is_complete(instance.label) for instance in meant):
            continue
        if expression.kind != "class" and mix.instance_share < 1 and rng.random() >= mix.instance_share:
            continue
        cells_GG = union_cells(meant, grid)
        if cells_GG.any():
            ignore_GG = _untold(photo, expression, meant, grid) & ~cells_GG
            found.append(_refer(expression.text, cells_GG, ignore_GG, expression.kind, rng, mix))
    return found


def _untold(photo: Photo, expression: Expression, meant: Sequence[Instance], grid: int) -> CellMask:
    """Where an expression for single instances meets some of their class that nobody told apart."""
    if expression.kind == "class":
        return _nowhere(grid)
    labels = {instance.label for instance in meant}
    return union_cells(
        (instance for instance in photo.instances if instance.label in labels and not instance.is_one_object),
        grid,
    )


def _absent_questions(photo: Photo, grid: int, rng: np.random.Generator, mix: QuestionMix) -> list[Question]:
    absent = known_absent(photo)
    found = []
    for index in rng.permutation(len(absent))[: mix.num_absent]:
        says_more = rng.random() < mix.absent_expression_share
        names = _ABSENT_EXPRESSIONS if says_more else _ABSENT_NAMES
        text = names[rng.integers(len(names))].format(absent[index])
        found.append(_refer(text, _nowhere(grid), _nowhere(grid), "absent", rng, mix))
    return found


def known_absent(photo: Photo) -> tuple[str, ...]:
    """The classes that the photo lists in `absent`, in that order, be they among its `labelled_classes` or not.

    Left out are those that are also in `unsure`, or have a mask. A complete class without a mask is not added.
    """
    present = set(photo.labels)
    return tuple(label for label in photo.absent if label not in photo.unsure and label not in present)


def _multi_class_question(photo: Photo, grid: int, rng: np.random.Generator, mix: QuestionMix) -> list[Question]:
    present = _complete_classes(photo, grid)
    # Now and then not all that is there is asked for: the rest is `others` then, and that is certain.
    wanted = [label for label in present if len(present) == 1 or rng.random() < 0.8]
    absent = known_absent(photo)
    most = min(len(absent), mix.max_absent_listed, MAX_LABELS - 1 - len(wanted))
    chosen = rng.permutation(len(absent))[: rng.integers(most + 1) if most > 0 else 0]
    names = [*wanted, *(absent[index] for index in chosen)]
    if not names:
        return []
    names = [names[index] for index in rng.permutation(len(names))]
    cells_GG = label_map([(names.index(label) + 1, present[label]) for label in wanted], grid)
    return [_asked(Subject.classes(names), cells_GG, _nowhere(grid), (BACKGROUND, *names), "classes", rng, mix)]


def _everything_question(photo: Photo, grid: int, rng: np.random.Generator, mix: QuestionMix) -> list[Question]:
    by_label = {label: _class_cells(photo, label, grid) for label in photo.labels[: MAX_LABELS - 1]}
    shown = [label for label, cells_GG in by_label.items() if cells_GG.any()]
    cells_GG = label_map([(number, by_label[label]) for number, label in enumerate(shown, start=1)], grid)
    is_all_known = not photo.unsure and photo.labelled_classes is None
    ignore_GG = _nowhere(grid) if is_all_known else cells_GG == 0
    return [_asked(Subject.everything(), cells_GG, ignore_GG, (BACKGROUND, *shown), "everything", rng, mix)]


# ---------------------------------------------------------------- cells


def label_map(masks: Sequence[tuple[int, CellMask]], grid: int) -> Cells:
    """[G, G] from (index, cells) pairs. Where two meet, the one of fewer cells is in front."""
    cells_GG = np.zeros((grid, grid), dtype=np.uint8)
    for index, mask_GG in sorted(masks, key=lambda pair: -int(pair[1].sum())):
        cells_GG[mask_GG] = index
    return cells_GG


def _complete_classes(photo: Photo, grid: int) -> dict[str, CellMask]:
    """The classes that may be asked for by name, those that vanish on the grid left out."""
    by_label = {label: _class_cells(photo, label, grid) for label in photo.labels if photo.is_complete(label)}
    return {label: cells_GG for label, cells_GG in by_label.items() if cells_GG.any()}


def _class_cells(photo: Photo, label: str, grid: int) -> CellMask:
    return union_cells((instance for instance in photo.instances if instance.label == label), grid)


def _nowhere(grid: int) -> CellMask:
    return np.zeros((grid, grid), dtype=np.bool_)


# ---------------------------------------------------------------- sentences


def _refer(
    text: str, cells_GG: CellMask, ignore_GG: CellMask, kind: str, rng: np.random.Generator, mix: QuestionMix
) -> Question:
    return _asked(Subject.refer(text), cells_GG.astype(np.uint8), ignore_GG, (BACKGROUND, text), kind, rng, mix)


def _asked(
    subject: Subject,
    cells_GG: Cells,
    ignore_GG: CellMask,
    labels: tuple[str, ...],
    kind: str,
    rng: np.random.Generator,
    mix: QuestionMix,
) -> Question:
    template = _template(subject.kind, rng) if mix.varies_templates else None
    answer = f"{answer_preamble(subject)}\n{OPEN_TAG}{encode(cells_GG, labels)}{CLOSE_TAG}"
    return Question(question(subject, index=template), answer, cells_GG, ignore_GG, labels, kind)


def _template(kind: PromptKind, rng: np.random.Generator) -> int:
    return int(rng.integers(num_questions(kind)))
