"""Asking a model about photos whose masks are known, and the report of how it did.

Legend: H rows and W columns of a photo; G rows and columns of the grid.

What is asked, of each photo, all in one sentence (`class_question`):
    class             each class of which the photo has all masks, by its bare name; the truth is their union, crowds
                      and groups included
    absent            classes that are surely not there, by their bare name; the truth is nothing
    class expression  an expression of kind "class" ("all people"), where the photo has all masks of each class meant
    position, size, relation, other   an expression for single instances; crowds and groups of their classes are left
                      out of the count, because nobody knows whether they are among them
    absent expression   an expression that means nothing in the photo, as gRefCOCO has them

What it promises:
    - Whoever answers is behind one call (`Answerer`): a server, an engine, a module. `from_texts` makes one of
      whatever writes answers as text.
    - Every figure stands beside its n, its 95 % interval and, for masks, its ceiling: the score of the truth itself
      after it went through the grid.
    - What the answerer failed to answer is wrong by every figure, and the report says how often that was.
    - Masks are counted when they come, and none is kept.
    - Equal photos, settings and answers give an equal report.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from relay_models.errors import RelayModelsError
from relay_models.masks import AnyMask, BoolMask
from relay_models.recipes.text4seg.dataset import EXPRESSION_KINDS, Photo
from relay_models.recipes.text4seg.metrics import (
    AREA_BUCKETS,
    CIOU,
    GIOU,
    N_ACC,
    NUM_RESAMPLES,
    REC_ACC,
    T_ACC,
    T_ACC_ALL,
    VISIBLE_SHARE,
    ClassCounts,
    Counts,
    Outcome,
    Ratio,
    Score,
    area_bucket,
    ceiling_mask,
    compare,
    confusion,
    macro,
    score,
    score_of_ceiling,
)
from relay_models.recipes.text4seg.questions import class_question, known_absent
from relay_models.text4seg.codec import decode_answer
from relay_models.text4seg.geometry import upsample
from relay_models.text4seg.prompts import template_index

CLASS, ABSENT, CLASS_EXPRESSION, ABSENT_EXPRESSION = "class", "absent", "class expression", "absent expression"
QUERY_KINDS = (CLASS, ABSENT, CLASS_EXPRESSION, *EXPRESSION_KINDS[1:], ABSENT_EXPRESSION)
COMPLETE = "complete"
FAILED = "error"


@dataclass(frozen=True)
class Query:
    """One thing to ask about one photo.

    Attributes:
        text: what is asked for, a class or an expression.
        kind: one of `QUERY_KINDS`.
        label: the class it is about; of several, that of the first instance; the text itself for what is absent.
        ids: of the instances meant; none for what is absent.
    """

    text: str
    kind: str
    label: str
    ids: tuple[int, ...]

    @property
    def prompt(self) -> str:
        """The question as every model is asked it."""
        return class_question(self.text)


@dataclass(frozen=True, eq=False)
class Reply:
    """The answer to one query.

    Attributes:
        mask_HW: of the photo's size; bool or uint8.
        status: "complete", or what was wrong with the text (`DescriptorStatus`), or a word of the answerer's own. With
            `FAILED` there is no answer, and the mask does not count.
    """

    mask_HW: AnyMask  # noqa: N815
    status: str = COMPLETE


Answerer = Callable[[Photo, Sequence[Query]], Sequence[Reply]]
"""Answers queries about one photo, in their order."""

ClassesAnswerer = Callable[[Photo, Sequence[str]], npt.NDArray[np.integer]]
"""Answers one multi-class question: [H, W] of 0 for `others`, and 1 + the index of a class."""


@dataclass(frozen=True)
class EvaluationSettings:
    """What is asked and how it is counted.

    Attributes:
        grid: cells of a side, for ceilings.
        kinds: which of `QUERY_KINDS` are asked.
        max_absent: of one photo; chosen by the file name if there are more.
        min_photos: of a class, to be part of the macro mean.
        seed, resamples: of the bootstrap.
    """

    grid: int = 16
    kinds: tuple[str, ...] = QUERY_KINDS
    max_absent: int = 2
    min_photos: int = 8
    seed: int = 0
    resamples: int = NUM_RESAMPLES

    def __post_init__(self) -> None:
        if unknown := [kind for kind in self.kinds if kind not in QUERY_KINDS]:
            raise RelayModelsError(f"kinds must be of {', '.join(QUERY_KINDS)}, got {unknown[0]!r}")
        for name, least in (("grid", 1), ("max_absent", 0), ("min_photos", 1), ("resamples", 1)):
            if getattr(self, name) < least:
                raise RelayModelsError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.seed < 0:
            raise RelayModelsError(f"seed must not be negative, got {self.seed}")


@dataclass(frozen=True)
class Row:
    """The scores of a part of the queries, such as a class.

    Attributes:
        name: of the part.
        n: queries.
        ciou, giou, rec: of the answers.
        ceiling_ciou, ceiling_giou: of the truth through the grid.
        ciou_of_ceiling: ciou / ceiling_ciou, resampled together.
    """

    name: str
    n: int
    ciou: Score
    giou: Score
    rec: Score
    ceiling_ciou: float | None
    ceiling_giou: float | None
    ciou_of_ceiling: Score


@dataclass(frozen=True)
class EvaluationReport:
    """What a model did on a set of photos.

    Attributes:
        model, data: what was evaluated on what, as named by the caller.
        conditions: whatever else bears on the figures, such as ("grammar", "on").
        prompt: the sentence asked, with X for what is asked for.
        num_photos, num_queries: asked.
        settings: as given.
        macro_ciou: the mean over the classes of at least `settings.min_photos` photos.
        macro_ceiling: of their ceilings. macro_classes: which they are.
        n_acc, t_acc, t_acc_all: of absent and of class queries.
        expression_n_acc, expression_t_acc_all: of expressions that mean nothing and of the others, as gRefCOCO counts.
        totals: over all of several kinds, as the papers' own tables are: class queries, these and absent ones,
            expressions that mean something, all expressions.
        classes: by descending n. kinds: in the order of `QUERY_KINDS`. areas: of class queries, by area of the truth.
        mean_iou, mean_iou_as_published: of multi-class questions, without interval, or None where none was asked.
        statuses: how many replies had which status.
    """

    model: str
    data: str
    conditions: tuple[tuple[str, str], ...]
    prompt: str
    num_photos: int
    num_queries: int
    settings: EvaluationSettings
    macro_ciou: Score
    macro_ceiling: float | None
    macro_classes: tuple[str, ...]
    n_acc: Score
    t_acc: Score
    t_acc_all: Score
    expression_n_acc: Score
    expression_t_acc_all: Score
    totals: tuple[Row, ...]
    classes: tuple[Row, ...]
    kinds: tuple[Row, ...]
    areas: tuple[Row, ...]
    mean_iou: float | None
    mean_iou_as_published: float | None
    statuses: tuple[tuple[str, int], ...] = field(default=())

    def row(self, name: str) -> Row | None:
        """The row of this class."""
        return next((row for row in self.classes if row.name == name), None)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    def to_markdown(self) -> str:
        return _markdown(self)


# ---------------------------------------------------------------- asking


def evaluate(
    photos: Sequence[Photo],
    answer: Answerer,
    *,
    settings: EvaluationSettings | None = None,
    answer_classes: ClassesAnswerer | None = None,
    model: str = "",
    data: str = "",
    conditions: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    concurrency: int = 1,
) -> EvaluationReport:
    """Ask about all photos, and report.

    Args:
        photos: with their truth.
        answer: called once for each photo with something to ask; in order, unless several are asked about at a time.
        settings: by default `EvaluationSettings()`.
        answer_classes: where given, it is also asked one multi-class question a photo: for all classes that are
            complete there and those that `absent` queries are for.
        model, data, conditions: for the report.
        progress: called with the number of photos done and of all photos.
        concurrency: photos asked about at a time, each in a thread of its own.

    Raises:
        RelayModelsError: there is no photo, or a reply is missing or has another size than its photo.
    """
    settings = settings or EvaluationSettings()
    if not photos:
        raise RelayModelsError("photos must hold at least one photo")
    if concurrency < 1:
        raise RelayModelsError(f"concurrency must be at least 1, got {concurrency}")

    def asked_about(photo: Photo) -> _Answered:
        queries = queries_of(photo, settings)
        replies = answer(photo, queries) if queries else ()
        if answer_classes is None or not (classes := _classes_of(photo, settings)):
            return _Answered(photo, queries, replies, (), None)
        return _Answered(photo, queries, replies, classes, answer_classes(photo, classes))

    outcomes: list[Outcome] = []
    best: list[Outcome] = []
    statuses: Counter[str] = Counter()
    vocabulary = list(dict.fromkeys(label for photo in photos for label in (*photo.labels, *photo.absent)))
    place = {label: number for number, label in enumerate(vocabulary, start=1)}
    counts = ClassCounts(len(vocabulary) + 1)
    for number, (photo, queries, replies, classes, map_HW) in enumerate(
        _in_order(asked_about, photos, concurrency), start=1
    ):
        _check_replies(photo, queries, replies)
        statuses.update(reply.status for reply in replies)
        for query, reply in zip(queries, replies, strict=True):
            truth_HW, ignore_HW = truth_of(photo, query)
            mask_HW = _wrong_mask(truth_HW) if reply.status == FAILED else reply.mask_HW
            outcomes.append(_outcome(photo, query, mask_HW, truth_HW, ignore_HW))
            best.append(_outcome(photo, query, ceiling_mask(truth_HW, settings.grid), truth_HW, ignore_HW))
        if map_HW is not None:
            counts.add(_confusion(photo, classes, map_HW), [0, *(place[label] for label in classes)])
        if progress is not None:
            progress(number, len(photos))
    return _report(photos, outcomes, best, statuses, counts, settings, (model, data, conditions))


class _Answered(NamedTuple):
    """One photo, with what was asked about it and answered."""

    photo: Photo
    queries: Sequence[Query]
    replies: Sequence[Reply]
    classes: Sequence[str]  # of the multi-class question
    map_HW: npt.NDArray[np.integer] | None  # noqa: N815


def _in_order(work: Callable[[Photo], _Answered], photos: Sequence[Photo], concurrency: int) -> Iterator[_Answered]:
    """What ``work`` makes of each photo; no more than so many are worked on, or wait to be taken, at a time."""
    if concurrency == 1:
        yield from map(work, photos)
        return
    pool = ThreadPoolExecutor(concurrency)
    try:
        rest = iter(photos)
        begun = deque(pool.submit(work, photo) for photo in islice(rest, concurrency))
        while begun:
            answered = begun.popleft().result()
            begun.extend(pool.submit(work, photo) for photo in islice(rest, 1))
            yield answered
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def queries_of(photo: Photo, settings: EvaluationSettings | None = None) -> list[Query]:
    """What is asked about a photo; see the module."""
    settings = settings or EvaluationSettings()
    label_of = {instance.id: instance.label for instance in photo.instances}
    found = [
        Query(label, CLASS, label, tuple(number for number, other in label_of.items() if other == label))
        for label in photo.labels
        if photo.is_complete(label)
    ]
    found += [Query(label, ABSENT, label, ()) for label in _absent_asked(photo, settings)]
    for expression in photo.expressions:
        if not expression.ids:
            found.append(Query(expression.text, ABSENT_EXPRESSION, expression.text, ()))
            continue
        labels = [label_of[number] for number in expression.ids]
        kind = CLASS_EXPRESSION if expression.kind == "class" else expression.kind
        if kind != CLASS_EXPRESSION or all(map(photo.is_complete, labels)):
            found.append(Query(expression.text, kind, labels[0], expression.ids))
    return [query for query in found if query.kind in settings.kinds]


def _absent_asked(photo: Photo, settings: EvaluationSettings) -> list[str]:
    """At most ``max_absent`` of the absent classes, always the same ones for a photo."""
    absent = known_absent(photo)
    if len(absent) <= settings.max_absent:
        return list(absent)
    ranked = sorted(absent, key=lambda label: template_index(f"{photo.file}|{label}", 1 << 60))
    return ranked[: settings.max_absent]


def truth_of(photo: Photo, query: Query) -> tuple[BoolMask, BoolMask | None]:
    """[H, W] the mask asked for, and the pixels of which nobody knows whether they belong to it."""
    truth_HW = photo.union(query.ids)
    if query.kind in (CLASS, ABSENT, CLASS_EXPRESSION, ABSENT_EXPRESSION):
        return truth_HW, None
    labels = {instance.label for instance in photo.instances if instance.id in query.ids}
    untold = [instance.id for instance in photo.instances if instance.label in labels and not instance.is_one_object]
    return truth_HW, photo.union(untold) & ~truth_HW if untold else None


def from_texts(write: Callable[[Photo, Sequence[str]], Sequence[str]], grid: int) -> Answerer:
    """An answerer from whatever writes an answer to each prompt about a photo.

    The first descriptor of an answer is read, as the papers do, and only the label asked for counts. An answer without
    one is an empty mask with status "none".
    """

    def answer(photo: Photo, queries: Sequence[Query]) -> list[Reply]:
        texts = write(photo, [query.prompt for query in queries])
        if len(texts) != len(queries):
            raise RelayModelsError(f"{photo.file}: {len(queries)} prompts were given, {len(texts)} answers came back")
        return [_read(photo, query, text, grid) for query, text in zip(queries, texts, strict=True)]

    return answer


def _read(photo: Photo, query: Query, text: str, grid: int) -> Reply:
    answer = decode_answer(text, height=grid, width=grid, labels=[query.text])
    if not answer.descriptors:
        return Reply(np.zeros((photo.height, photo.width), dtype=np.uint8), answer.status.value)
    cells_GG = answer.descriptors[0].mask(query.text)
    return Reply(upsample(cells_GG, photo.height, photo.width), answer.status.value)


def _wrong_mask(truth_HW: BoolMask) -> BoolMask:
    """The mask that scores nothing by any figure."""
    return np.full_like(truth_HW, not truth_HW.any())


def _check_replies(photo: Photo, queries: Sequence[Query], replies: Sequence[Reply]) -> None:
    if len(replies) != len(queries):
        raise RelayModelsError(f"{photo.file}: {len(queries)} queries were asked, {len(replies)} replies came back")
    for query, reply in zip(queries, replies, strict=True):
        if reply.mask_HW.shape != (photo.height, photo.width):
            raise RelayModelsError(
                f"{photo.file}: the mask for {query.text!r} must be of shape [{photo.height}, {photo.width}], got "
                f"{list(reply.mask_HW.shape)}"
            )


def _outcome(photo: Photo, query: Query, mask_HW: AnyMask, truth_HW: BoolMask, ignore_HW: BoolMask | None) -> Outcome:
    return compare(mask_HW, truth_HW, photo=photo.file, label=query.label, kind=query.kind, ignore_HW=ignore_HW)


# ---------------------------------------------------------------- several classes at once


def _classes_of(photo: Photo, settings: EvaluationSettings) -> list[str]:
    present = [label for label in photo.labels if photo.is_complete(label)]
    return [*present, *_absent_asked(photo, settings)]


def _confusion(photo: Photo, asked: Sequence[str], answered_HW: npt.NDArray[np.integer]) -> Counts:
    """[A, A] pixels by truth and answer, 0 for `others` and 1 + the index of a class that was asked for.

    Where true masks meet, the smaller is in front.
    """
    if answered_HW.shape != (photo.height, photo.width) or answered_HW.min() < 0 or answered_HW.max() > len(asked):
        raise RelayModelsError(
            f"{photo.file}: the label map must be of shape [{photo.height}, {photo.width}] with values up to "
            f"{len(asked)}, got {list(answered_HW.shape)} and up to {answered_HW.max()}"
        )
    truth_HW = np.zeros((photo.height, photo.width), dtype=np.int64)
    masks = [(place, photo.class_mask(label)) for place, label in enumerate(asked, start=1) if label in photo.labels]
    for place, mask_HW in sorted(masks, key=lambda pair: -int(pair[1].sum())):
        truth_HW[mask_HW] = place
    return confusion(answered_HW, truth_HW, len(asked) + 1)


# ---------------------------------------------------------------- ceilings


@dataclass(frozen=True)
class Ceiling:
    """What a grid can reach for a class.

    Attributes:
        n: photos.
        num_vanished: of these, where nothing is left of the class on the grid.
        ciou, giou: of the truth through the grid.
    """

    label: str
    n: int
    num_vanished: int
    ciou: float
    giou: float


def ceilings(photos: Iterable[Photo], grid: int = 16) -> dict[str, Ceiling]:
    """For each class, by descending n: its masks through the grid against themselves.

    The questions are the class queries of an evaluation: the union of a class's masks in a photo, where it is complete.
    """
    settings = EvaluationSettings(grid=grid, kinds=(CLASS,))
    by_label: dict[str, list[Outcome]] = {}
    for photo in photos:
        for query in queries_of(photo, settings):
            truth_HW, _ = truth_of(photo, query)
            outcome = _outcome(photo, query, ceiling_mask(truth_HW, grid), truth_HW, None)
            by_label.setdefault(query.label, []).append(outcome)
    return {
        label: Ceiling(
            label,
            len(outcomes),
            sum(not outcome.prediction for outcome in outcomes),
            CIOU(outcomes) or 0.0,
            GIOU(outcomes) or 0.0,
        )
        for label, outcomes in sorted(by_label.items(), key=lambda item: (-len(item[1]), item[0]))
    }


def mean_ceiling(found: Mapping[str, Ceiling], labels: Iterable[str]) -> float:
    """The plain mean of the cIoU ceilings of these classes: each class counts once, however many photos it has.

    Raises:
        RelayModelsError: there is no ceiling of one of them, or no class is named.
    """
    labels = list(labels)
    if not labels or (missing := [label for label in labels if label not in found]):
        raise RelayModelsError(f"labels must name classes with a ceiling, got {labels if not labels else missing}")
    return sum(found[label].ciou for label in labels) / len(labels)


# ---------------------------------------------------------------- the report


def _report(
    photos: Sequence[Photo],
    outcomes: list[Outcome],
    best: list[Outcome],
    statuses: Counter[str],
    counts: ClassCounts,
    settings: EvaluationSettings,
    named: tuple[str, str, Mapping[str, str] | None],
) -> EvaluationReport:
    model, data, conditions = named
    pairs = list(zip(outcomes, best, strict=True))
    of_class = [pair for pair in pairs if pair[0].kind == CLASS]
    classes = sorted(
        _grouped(of_class, lambda outcome: outcome.label).items(), key=lambda item: (-len(item[1]), item[0])
    )
    kinds, areas = _grouped(pairs, lambda outcome: outcome.kind), _grouped(of_class, area_bucket)
    counted = {label: found for label, found in classes if len(found) >= settings.min_photos}

    def scored(ratio: Ratio, *kinds: str) -> Score:
        asked = [outcome for outcome in outcomes if outcome.kind in kinds]
        return score(ratio, asked, seed=settings.seed, resamples=settings.resamples)

    def averaged(place: int) -> Score:
        groups = {label: [pair[place] for pair in found] for label, found in counted.items()}
        return macro(CIOU, groups, seed=settings.seed, resamples=settings.resamples)

    return EvaluationReport(
        model=model,
        data=data,
        conditions=tuple((conditions or {}).items()),
        prompt=class_question("X"),
        num_photos=len(photos),
        num_queries=len(outcomes),
        settings=settings,
        macro_ciou=averaged(0),
        macro_ceiling=averaged(1).value,
        macro_classes=tuple(counted),
        n_acc=scored(N_ACC, ABSENT),
        t_acc=scored(T_ACC, CLASS),
        t_acc_all=scored(T_ACC_ALL, CLASS),
        expression_n_acc=scored(N_ACC, ABSENT_EXPRESSION),
        expression_t_acc_all=scored(T_ACC_ALL, *_EXPRESSIONS),
        totals=_totals(pairs, settings),
        classes=tuple(_row(label, found, settings) for label, found in classes),
        kinds=tuple(_row(kind, kinds[kind], settings) for kind in QUERY_KINDS if kind in kinds),
        areas=tuple(_row(name, areas[name], settings) for name, _ in AREA_BUCKETS if name in areas),
        mean_iou=counts.mean_iou(),
        mean_iou_as_published=counts.mean_iou(as_published=True),
        statuses=tuple(sorted(statuses.items())),
    )


Pair = tuple[Outcome, Outcome]

_EXPRESSIONS = (CLASS_EXPRESSION, *EXPRESSION_KINDS[1:])
_TOTALS = {
    "classes": (CLASS,),
    "classes, and absent ones": (CLASS, ABSENT),
    "expressions": _EXPRESSIONS,
    "expressions, and absent ones": (*_EXPRESSIONS, ABSENT_EXPRESSION),
}


def _totals(pairs: Sequence[Pair], settings: EvaluationSettings) -> tuple[Row, ...]:
    """Of each set of kinds of which something was asked; one with absent ones only where some of them were."""
    asked = {pair[0].kind for pair in pairs}
    absent = {ABSENT, ABSENT_EXPRESSION}
    return tuple(
        _row(name, [pair for pair in pairs if pair[0].kind in kinds], settings)
        for name, kinds in _TOTALS.items()
        if asked.intersection(kinds) and absent.intersection(kinds) <= asked
    )


def _grouped(pairs: Iterable[Pair], key: Callable[[Outcome], str]) -> dict[str, list[Pair]]:
    """By a property of the truth, which both of a pair share."""
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(key(pair[0]), []).append(pair)
    return groups


def _row(name: str, pairs: Sequence[Pair], settings: EvaluationSettings) -> Row:
    outcomes, best = [pair[0] for pair in pairs], [pair[1] for pair in pairs]

    def scored(ratio: Ratio) -> Score:
        return score(ratio, outcomes, seed=settings.seed, resamples=settings.resamples)

    of_ceiling = score_of_ceiling(CIOU, outcomes, best, seed=settings.seed, resamples=settings.resamples)
    return Row(name, len(pairs), scored(CIOU), scored(GIOU), scored(REC_ACC), CIOU(best), GIOU(best), of_ceiling)


def _markdown(report: EvaluationReport) -> str:
    settings = report.settings
    conditions = "".join(f", {name}: {value}" for name, value in report.conditions)
    least = f"classes with at least {settings.min_photos} photos"
    failed = dict(report.statuses).get(FAILED, 0)
    lines = [
        *([f"**{failed} questions were not answered, and count as wrong.**", ""] if failed else []),
        f"{report.model or 'The model'} on {report.data or 'the photos'}{conditions}. {report.num_photos} photos, "
        f"{report.num_queries} questions ({report.prompt!r}), {settings.grid}x{settings.grid} grid. In brackets: 95 % "
        f"intervals, bootstrapped over photos ({settings.resamples} resamples, seed {settings.seed}).",
        "",
        "| | n | value | ceiling |",
        "|---|---|---|---|",
        f"| macro cIoU, {least} | {report.macro_ciou.n} | {report.macro_ciou} | {_figure(report.macro_ceiling)} |",
        f"| N-acc | {report.n_acc.n} | {report.n_acc} | |",
        f"| T-acc, truth at least {VISIBLE_SHARE:.0%} of the frame | {report.t_acc.n} | {report.t_acc} | |",
        f"| T-acc, all | {report.t_acc_all.n} | {report.t_acc_all} | |",
    ]
    if report.expression_n_acc.n:
        lines += [
            f"| N-acc, expressions | {report.expression_n_acc.n} | {report.expression_n_acc} | |",
            f"| T-acc, expressions | {report.expression_t_acc_all.n} | {report.expression_t_acc_all} | |",
        ]
    if report.mean_iou is not None:
        lines.append(
            f"| mIoU (as published: {_figure(report.mean_iou_as_published)}) | | {_figure(report.mean_iou)} | |"
        )
    shown = [row for row in report.classes if row.n >= settings.min_photos]
    rest = [row for row in report.classes if row.n < settings.min_photos]
    lines += ["", *_table(f"class ({least})", shown)]
    lines += [
        "",
        *_table("all questions for", report.totals),
        "",
        *_table("kind of question", report.kinds),
        "",
        *_table("area of the truth, classes", report.areas),
    ]
    if rest:
        lines += ["", *_table("class (fewer photos)", rest)]
    if report.statuses:
        counts = ", ".join(f"{count} {name}" for name, count in report.statuses)
        lines += ["", f"Answers: {counts}."]
    return "\n".join(lines) + "\n"


def _table(title: str, rows: Sequence[Row]) -> list[str]:
    return [
        f"| {title} | n | ceiling cIoU | cIoU | cIoU / ceiling | gIoU | REC acc@0.5 |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {row.name} | {row.n} | {_figure(row.ceiling_ciou)} | {row.ciou} | {row.ciou_of_ceiling} | {row.giou} | "
            f"{row.rec} |"
            for row in rows
        ),
    ]


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
