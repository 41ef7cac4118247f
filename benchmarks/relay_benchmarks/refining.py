"""What a refiner does to coarse masks: gIoU and cIoU before and after, for each way to prompt it, by area.

    vllm-relay bench refining val.jsonl
    vllm-relay bench refining val.jsonl --predictions masks.jsonl

Truth is a JSON-lines file of photos such as seg-tiny's val.jsonl. A question is a set of instances: all of a class in a
photo, or those an expression means; a set asked for twice counts once. Questions whose truth nobody knows are left out
and counted: about classes that may lack masks (`unsure`, `labelled_classes`), or about pseudo-labelled masks, be it one
of several. Coarse masks are
    grids         the truth reduced to the grid and back, which is what a perfect model would write
    predictions   what a model wrote, where its IoU with the truth is at least 0.3 (a refiner cannot find lost things)

`--predictions` names a JSON-lines file with a line for each answered question:
    {"file": "images/x.jpg", "ids": [0, 3], "mask": {"size": [H, W], "counts": "..."}}      the instances meant, or
    {"file": "images/x.jpg", "label": "dog", "mask": {"size": [H, W], "counts": "..."}}     all instances of a class
`file` is the photo's in the truth; `mask` is a COCO RLE of the photo's size. Other fields are ignored, and so are lines
with empty `ids`, of questions for what is not there. `vllm-relay eval text4seg --output FOLDER` writes such a file.

gIoU is the mean IoU over questions, cIoU the sum of intersections over the sum of unions. The intervals, of the gain
over coarse masks and of the lead over the best other way to prompt, are paired bootstraps over photos: 95 %,
percentiles.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from relay_benchmarks.errors import BenchArgumentError
from relay_benchmarks.machine import Machine, commit, installed
from relay_benchmarks.results_file import ResultsFile
from relay_benchmarks.summary import table
from relay_models.errors import RelayModelsError
from relay_models.masks import from_coco_rle
from relay_models.recipes.text4seg.dataset import Photo, load_jsonl
from relay_models.refine.frame import Frame
from relay_models.refine.interface import DEFAULT_STYLE, LEAST_AGREEMENT, finish, iou, prompt_all
from relay_models.refine.prompts import Style
from relay_models.text4seg.geometry import reduce_to_grid, upsample

if TYPE_CHECKING:
    from relay_models.refine.sam import Sam

BoolMask = npt.NDArray[np.bool_]

LEAST_MODEL_IOU = 0.3
RESAMPLES = 2000
BUCKETS = (("all", 0.0, 1.0), ("< 1 %", 0.0, 0.01), ("1-5 %", 0.01, 0.05), ("5-20 %", 0.05, 0.2), (">= 20 %", 0.2, 1.0))

LEAD_COLUMNS = (
    *("best_other", "other_giou", "giou_lead_low", "giou_lead_high"),
    *("other_ciou", "ciou_lead_low", "ciou_lead_high"),
)
REFINING_COLUMNS = (
    *("time", "machine", "cpu", "cores", "threads", "commit", "relay_version", "torch_version", "transformers_version"),
    *(
        "data",
        "photos",
        "refiner",
        "coarse",
        "grid",
        "prompts",
        "passes",
        "least_agreement",
        "seed",
        "area",
        "questions",
    ),
    *("coarse_giou", "refined_giou", "giou_gain_low", "giou_gain_high"),
    *("coarse_ciou", "refined_ciou", "ciou_gain_low", "ciou_gain_high"),
    *("kept_coarse", "embed_seconds", "predict_seconds"),
    *LEAD_COLUMNS,
)


@dataclass(frozen=True)
class Question:
    """A mask to refine, and the truth about it."""

    photo: int
    truth_HW: BoolMask  # noqa: N815
    coarse_HW: BoolMask  # noqa: N815


@dataclass(frozen=True)
class Picture:
    """A photo, and at least one question about it."""

    photo: Photo
    questions: tuple[Question, ...]


class Unscored(StrEnum):
    """What questions are about of which nobody knows the truth."""

    UNSURE = "classes that may lack masks"
    PSEUDO = "pseudo-labelled masks"


@dataclass(frozen=True)
class Asked:
    """What is measured, and how many questions are not."""

    pictures: tuple[Picture, ...]
    left_out: Mapping[Unscored, int]


@dataclass(frozen=True)
class Score:
    """One question under one way to prompt, in pixels."""

    photo: int
    area: float
    coarse: tuple[int, int]  # intersection, union
    refined: tuple[int, int]
    is_refined: bool


# ---------------------------------------------------------------- the questions


def read_photos(path: Path) -> list[Photo]:
    """Raises BenchArgumentError."""
    try:
        return load_jsonl(path, path.parent)
    except RelayModelsError as error:
        raise BenchArgumentError(f"{error}; name a file like seg-tiny's val.jsonl") from error


def instance_sets(photo: Photo) -> list[tuple[int, ...]]:
    """What is asked of a photo: whole classes, then what its expressions mean, each set once."""
    sets = [_ids_of_class(photo, label) for label in photo.labels]
    sets += [tuple(sorted(expression.ids)) for expression in photo.expressions if expression.ids]
    return list(dict.fromkeys(sets))


def why_unscored(photo: Photo, ids: Collection[int]) -> Unscored | None:
    """Why the union of these instances is no truth; None if it is."""
    meant = [instance for instance in photo.instances if instance.id in ids]
    if not all(photo.is_complete(instance.label) for instance in meant):
        return Unscored.UNSURE
    return Unscored.PSEUDO if any(instance.is_pseudo for instance in meant) else None


def _ids_of_class(photo: Photo, label: str) -> tuple[int, ...]:
    return tuple(sorted(instance.id for instance in photo.instances if instance.label == label))


def ask_of_grids(photos: Sequence[Photo], grid: int) -> Asked:
    """Coarse masks made from the truth."""
    pictures, left_out = [], Counter[Unscored]()
    for index, photo in enumerate(photos):
        questions = []
        for ids in instance_sets(photo):
            if reason := why_unscored(photo, ids):
                left_out[reason] += 1
                continue
            truth_HW = photo.union(ids)
            if truth_HW.any():
                cells = reduce_to_grid(truth_HW, grid, grid)
                questions.append(Question(index, truth_HW, upsample(cells, *truth_HW.shape)))
        if questions:
            pictures.append(Picture(photo, tuple(questions)))
    return Asked(tuple(pictures), left_out)


def ask_of_predictions(photos: Sequence[Photo], predictions: Path, num_photos: int | None = None) -> Asked:
    """Coarse masks that a model wrote of the first photos, where they are near the truth. Raises BenchArgumentError.

    Of several answers about the same instances of a photo, the first counts: in other words they were asked for again.
    """
    place = {photo.file: index for index, photo in enumerate(photos)}
    questions: dict[int, list[Question]] = {index: [] for index in range(len(photos[:num_photos]))}
    left_out = Counter[Unscored]()
    answered: set[tuple[int, tuple[int, ...]]] = set()
    for number, line in enumerate(_lines(predictions), start=1):
        if not line.strip():
            continue
        try:
            answer = json.loads(line)
            index = _place_of(answer, place)
            ids, reason = _meant(answer, photos[index])
            coarse_HW = _predicted_mask(answer, photos[index])
        except (TypeError, ValueError) as error:
            raise BenchArgumentError(f"line {number} of {predictions} is no mask of these photos: {error}") from error
        if index not in questions or (ids and (index, ids) in answered):
            continue
        answered.add((index, ids))
        if reason:
            left_out[reason] += 1
            continue
        truth_HW = photos[index].union(ids)
        if truth_HW.any() and iou(truth_HW, coarse_HW) >= LEAST_MODEL_IOU:
            questions[index].append(Question(index, truth_HW, coarse_HW))
    return Asked(
        tuple(Picture(photos[index], tuple(of_photo)) for index, of_photo in questions.items() if of_photo), left_out
    )


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise BenchArgumentError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BenchArgumentError(f"{path} is no text: {error}") from error


def _place_of(answer: Any, place: Mapping[str, int]) -> int:
    if not isinstance(answer, dict):
        raise TypeError(f"it must be an object, got {type(answer).__name__}")
    if answer.get("file") not in place:
        raise ValueError(f"it names {answer.get('file')!r}")
    return place[answer["file"]]


def _meant(answer: Mapping[str, Any], photo: Photo) -> tuple[tuple[int, ...], Unscored | None]:
    """The instances that an answer is about, and why it is not scored."""
    if ids := answer.get("ids"):
        if not {instance.id for instance in photo.instances}.issuperset(ids):
            raise ValueError(f"{photo.file} has no such instances: {ids}")
        return tuple(sorted(ids)), why_unscored(photo, ids)
    if ids == []:  # asked for in vain
        return (), None
    label = answer.get("label")
    if not isinstance(label, str):
        raise TypeError(f"ids or label must say what is meant, got {ids!r} and {label!r}")
    if not photo.is_complete(label):
        return (), Unscored.UNSURE
    if not (of_class := _ids_of_class(photo, label)):
        raise ValueError(f"{photo.file} has no instance of {label!r}")
    return of_class, why_unscored(photo, of_class)


def _predicted_mask(answer: Mapping[str, Any], photo: Photo) -> BoolMask:
    if not isinstance(answer.get("mask"), dict):
        raise TypeError(f"mask must be a COCO RLE, got {answer.get('mask')!r:.80}")
    mask_HW = from_coco_rle(answer["mask"])
    if mask_HW.shape != (photo.height, photo.width):
        height, width = mask_HW.shape
        raise ValueError(f"mask is {width}x{height}, {photo.file} is {photo.width}x{photo.height}")
    return mask_HW


# ---------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Measured:
    """All questions, for each way to prompt and least agreement, and the seconds they took.

    `num_photos` had something to refine.
    """

    scores: dict[tuple[Style, float], list[Score]]
    num_photos: int
    embed_seconds: float  # a picture
    predict_seconds: dict[Style, float]  # a mask


def measure(
    sam: Sam,
    pictures: Sequence[Picture],
    styles: Sequence[Style],
    agreements: Sequence[float],
    seed: int,
    report: Callable[[str], None],
) -> Measured:
    scores: dict[tuple[Style, float], list[Score]] = {(style, least): [] for style in styles for least in agreements}
    embed_seconds, asked = 0.0, 0
    predict_seconds = dict.fromkeys(styles, 0.0)
    for number, picture in enumerate(pictures, 1):
        coarse = [question.coarse_HW for question in picture.questions]
        image = picture.photo.open()
        frame = Frame(image.height, image.width, sam.side)
        start = time.perf_counter()
        embedding = sam.embed(frame.view(image))
        embed_seconds += time.perf_counter() - start
        asked += sum(1 for mask in coarse if mask.any())
        for style in styles:
            prompts = prompt_all(coarse, frame, style, seed=seed, mask_side=sam.mask_side)
            start = time.perf_counter()
            found = iter(sam.predict(embedding, [prompt for prompt in prompts if prompt is not None]))
            predict_seconds[style] += time.perf_counter() - start
            predictions = [None if prompt is None else next(found) for prompt in prompts]
            for least in agreements:
                refined = finish(coarse, predictions, frame, least_agreement=least)
                scores[style, least] += [
                    Score(
                        question.photo,
                        float(question.truth_HW.mean()),
                        _overlap(question.truth_HW, question.coarse_HW),
                        _overlap(question.truth_HW, mask.mask_HW),
                        mask.outcome == "refined",
                    )
                    for question, mask in zip(picture.questions, refined, strict=True)
                ]
        report(f"{number} of {len(pictures)} photos")
    return Measured(
        scores,
        len(pictures),
        embed_seconds / max(1, len(pictures)),
        {style: seconds / max(1, asked) for style, seconds in predict_seconds.items()},
    )


def _overlap(first_HW: BoolMask, second_HW: BoolMask) -> tuple[int, int]:
    return int(np.count_nonzero(first_HW & second_HW)), int(np.count_nonzero(first_HW | second_HW))


@dataclass(frozen=True)
class Gain:
    """Both measures before and after, with the interval of the difference."""

    coarse: float
    refined: float
    low: float
    high: float


def gains(scores: Sequence[Score], *, resamples: int = RESAMPLES, seed: int = 0) -> tuple[Gain, Gain]:
    """Of gIoU and of cIoU, over the coarse masks."""
    return _differences([(*score.coarse, *score.refined) for score in scores], scores, resamples, seed)


def leads(
    scores: Sequence[Score], others: Sequence[Score], *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[Gain, Gain]:
    """Of gIoU and of cIoU, over the same questions under another way to prompt."""
    pairs = zip(scores, others, strict=True)
    return _differences([(*other.refined, *score.refined) for score, other in pairs], scores, resamples, seed)


def _differences(
    counted: Sequence[tuple[int, ...]], scores: Sequence[Score], resamples: int, seed: int
) -> tuple[Gain, Gain]:
    """From intersection and union before and after. Photos are drawn with repetition, each with all its questions."""
    overlaps = np.array(counted, dtype=np.float64)  # [questions, 4]
    ious = overlaps[:, [0, 2]] / overlaps[:, [1, 3]]
    _, photo = np.unique([score.photo for score in scores], return_inverse=True)
    num_photos = int(photo.max()) + 1
    sums = np.zeros((num_photos, 7))  # of a photo: questions, IoUs, intersections and unions
    np.add.at(sums, photo, np.column_stack([np.ones(len(scores)), ious, overlaps]))
    drawn = np.random.default_rng(seed).integers(0, num_photos, (resamples, num_photos))
    totals = np.concatenate([sums.sum(axis=0)[None], sums[drawn].sum(axis=1)])
    g_iou = totals[:, 1:3] / totals[:, :1]
    c_iou = totals[:, [3, 5]] / totals[:, [4, 6]]
    return _gain(g_iou), _gain(c_iou)


def _gain(measured: npt.NDArray[np.float64]) -> Gain:
    """From [1 + resamples, 2]: the figure itself first, (coarse, refined) each."""
    low, high = np.percentile(measured[1:, 1] - measured[1:, 0], [2.5, 97.5])
    return Gain(float(measured[0, 0]), float(measured[0, 1]), float(low), float(high))


@dataclass(frozen=True)
class Line:
    """One row of the table."""

    style: Style
    least_agreement: float
    area: str
    scores: Sequence[Score]
    g_iou: Gain
    c_iou: Gain
    lead: Lead | None  # where there is another way to prompt


@dataclass(frozen=True)
class Lead:
    """Over the other way to prompt that has the best gIoU; its figures are the `coarse` ones of the gains."""

    other: Style
    g_iou: Gain
    c_iou: Gain


def lines_of(measured: Measured) -> list[Line]:
    lines = []
    for name, low, high in BUCKETS:
        met = {
            key: [score for score in scores if low <= score.area < high or (high == 1.0 and score.area == 1.0)]
            for key, scores in measured.scores.items()
        }
        for (style, least), chosen in met.items():
            others = {other[0]: found for other, found in met.items() if other[1] == least and other[0] is not style}
            if chosen:
                lines.append(Line(style, least, name, chosen, *gains(chosen), _lead(chosen, others)))
    return sorted(lines, key=lambda line: list(measured.scores).index((line.style, line.least_agreement)))


def _lead(scores: Sequence[Score], others: Mapping[Style, Sequence[Score]]) -> Lead | None:
    if not others:
        return None
    best = max(
        others, key=lambda style: float(np.mean([score.refined[0] / score.refined[1] for score in others[style]]))
    )
    return Lead(best, *leads(scores, others[best]))


# ---------------------------------------------------------------- the command


def result_table(lines: Sequence[Line]) -> str:
    header = (
        *("prompts", "agreement", "area", "n", "gIoU", "refined", "gain", "cIoU", "refined", "gain", "kept coarse"),
        *("best other", "gIoU lead", "cIoU lead"),
    )
    return table(header, [_shown(line) for line in lines])


def _shown(line: Line) -> tuple[str, ...]:
    head = (line.style.label, f">= {line.least_agreement:g}", line.area, f"{len(line.scores)}")
    figures = [
        word
        for gain in (line.g_iou, line.c_iou)
        for word in (f"{gain.coarse:.3f}", f"{gain.refined:.3f}", f"[{gain.low:+.3f}, {gain.high:+.3f}]")
    ]
    if line.lead is None:
        return (*head, *figures, f"{_kept(line)}", "", "", "")
    leading = [f"[{gain.low:+.3f}, {gain.high:+.3f}]" for gain in (line.lead.g_iou, line.lead.c_iou)]
    return (*head, *figures, f"{_kept(line)}", line.lead.other.label, *leading)


def _kept(line: Line) -> int:
    return sum(1 for score in line.scores if not score.is_refined)


def result_rows(measured: Measured, lines: Sequence[Line], options: argparse.Namespace) -> list[dict[str, object]]:
    """Rows of REFINING_COLUMNS."""
    import torch

    machine = Machine.here()
    common = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "machine": machine.name, "cpu": machine.cpu,
        "cores": machine.cores, "threads": torch.get_num_threads(), "commit": commit(),
        "relay_version": installed("vllm-relay"), "torch_version": installed("torch"),
        "transformers_version": installed("transformers"), "data": options.data.name, "photos": measured.num_photos,
        "refiner": Path(options.refiner).name, "coarse": "predictions" if options.predictions else "grids",
        "grid": options.grid, "seed": options.seed, "embed_seconds": round(measured.embed_seconds, 3),
    }  # fmt: skip
    return [
        {
            **common, "prompts": line.style.label, "passes": line.style.passes,
            "least_agreement": line.least_agreement, "area": line.area, "questions": len(line.scores),
            "coarse_giou": round(line.g_iou.coarse, 5), "refined_giou": round(line.g_iou.refined, 5),
            "giou_gain_low": round(line.g_iou.low, 5), "giou_gain_high": round(line.g_iou.high, 5),
            "coarse_ciou": round(line.c_iou.coarse, 5), "refined_ciou": round(line.c_iou.refined, 5),
            "ciou_gain_low": round(line.c_iou.low, 5), "ciou_gain_high": round(line.c_iou.high, 5),
            "kept_coarse": _kept(line), "predict_seconds": round(measured.predict_seconds[line.style], 4),
            **_lead_columns(line.lead),
        }
        for line in lines
    ]  # fmt: skip


def _lead_columns(lead: Lead | None) -> dict[str, object]:
    if lead is None:
        return dict.fromkeys(LEAD_COLUMNS, "")
    return {
        "best_other": lead.other.label, "other_giou": round(lead.g_iou.coarse, 5),
        "giou_lead_low": round(lead.g_iou.low, 5), "giou_lead_high": round(lead.g_iou.high, 5),
        "other_ciou": round(lead.c_iou.coarse, 5), "ciou_lead_low": round(lead.c_iou.low, 5),
        "ciou_lead_high": round(lead.c_iou.high, 5),
    }  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    styles = ", ".join(style.label for style in Style)
    add("data", type=Path, help="JSON lines of photos with masks, such as seg-tiny's val.jsonl; photos lie beside it")
    add("--predictions", type=Path, metavar="JSONL", help="refine these masks of a model instead of ground-truth grids")
    add("--refiner", default="mobile-sam", help="mobile-sam, or hub id or folder of a SAM (%(default)s)")
    add("--grid", type=int, default=16, metavar="N", help="rows and columns of the grid (%(default)s)")
    add("--prompts", action="append", metavar="STYLE", help=f"may be given again; default all of: {styles}")
    add("--photos", type=int, metavar="N", help="the first N photos only")
    add("--seed", type=int, default=0, metavar="N", help="of the points (%(default)s)")
    add("--threads", type=int, metavar="N", help="of PyTorch (default: its own)")
    add("--output", type=Path, metavar="CSV", help="append rows to this file")


@dataclass(frozen=True)
class Outcome:
    measured: Measured
    lines: list[Line]
    left_out: Mapping[Unscored, int]


def run(options: argparse.Namespace) -> Outcome:
    """Measure, and append to the output file if there is one."""
    styles = _styles(options.prompts)
    output = ResultsFile(options.output, REFINING_COLUMNS) if options.output else None
    if output:
        output.prepare()
    photos = read_photos(options.data)
    asked = (
        ask_of_predictions(photos, options.predictions, options.photos)
        if options.predictions
        else ask_of_grids(photos[: options.photos], options.grid)
    )
    if not asked.pictures:
        reasons = _told(asked.left_out)
        raise BenchArgumentError(
            f"{options.predictions or options.data} holds nothing to refine" + (f"; {reasons}" if reasons else "")
        )
    sam = _load(options)
    agreements = (0.0, LEAST_AGREEMENT)
    measured = measure(sam, asked.pictures, styles, agreements, options.seed, lambda text: print(text, file=sys.stderr))
    lines = lines_of(measured)
    if output:
        output.append(result_rows(measured, lines, options))
    return Outcome(measured, lines, asked.left_out)


def _load(options: argparse.Namespace) -> Sam:
    import torch

    from relay_models.refine import weights
    from relay_models.refine.sam import Sam
    from relay_serving.settings import REFINER_MOBILE_SAM, cache_folder

    if options.threads:
        torch.set_num_threads(options.threads)
    if options.refiner != REFINER_MOBILE_SAM:
        return Sam.from_pretrained(options.refiner)
    return Sam.mobile(weights.prepare(cache_folder() / "models", lambda text: print(text, file=sys.stderr)))


def _styles(labels: Sequence[str] | None) -> list[Style]:
    known = {style.label: style for style in Style}
    for label in labels or ():
        if label not in known:
            raise BenchArgumentError(f"--prompts is {label!r}; it must be one of {', '.join(known)}")
    return [known[label] for label in labels] if labels else list(Style)


def report(outcome: Outcome) -> str:
    """The table, what it cost and what it leaves out, for a person."""
    measured = outcome.measured
    costs = ", ".join(f"{style.label} {seconds:.2f} s" for style, seconds in measured.predict_seconds.items())
    return "\n".join(
        [
            result_table(outcome.lines),
            "",
            f"{measured.num_photos} photos; {measured.embed_seconds:.2f} s to encode one; a mask: {costs}",
            f"served by default: {DEFAULT_STYLE.label}, agreement >= {LEAST_AGREEMENT:g}",
            *filter(None, [_told(outcome.left_out)]),
        ]
    )


def _told(left_out: Mapping[Unscored, int]) -> str:
    counts = [f"{count} of {reason}" for reason, count in sorted(left_out.items())]
    return f"questions left out: {', '.join(counts)}" if counts else ""
