"""Changed copies of photos in which everything that is said of them is still true.

Legend: H rows and W columns of the picture; x and y are fractions of its width and height.

The changes: `flip`, `crop`, `mosaic` of four, `copy_paste`; `Augmentation` draws them at random. What becomes of
    masks: changed with the picture; what is covered or cut off is taken away, and an instance without pixels is gone.
    expressions: kept only where they can be shown to hold; what they say is read as English.
        class: names what is there of its class in the new picture. It is dropped where singular and plural no longer
            fit, where the class is no longer complete, and where it does not name its class ("the animal") while other
            classes came in. What says more than the class ("brown dogs") is dropped where others of the class joined,
            and what counts ("both dogs") also where some may be gone.
        position, size, relation: any change but a flip keeps an expression only if it is one of the sentences
            understood here (`holds`), and it holds in the new picture by a margin.
        A flip swaps left and right in the words of every kind, and drops an expression in which a word for a side
            cannot be told from something else ("the dog that left", "the topleft dog"), or has no mirrored form here
            ("at 3 o'clock", "starboard").
    classes that are sides ("left lung"): a photo that names one is not flipped.
    `absent`: only what no part of the new picture may show. A class of which a crop cut everything off becomes absent.
    `unsure`, `labelled_classes`: a class is complete in a picture made of several only where it is in each of them, be
        it just one object that is pasted: its mask may hold part of something else.
    `is_crowd`, `is_group`, `is_pseudo`: stay with their masks.

Equal photos and state of the generator give equal results.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
from PIL import Image

from relay_models.errors import RelayModelsError
from relay_models.masks import BoolMask, box
from relay_models.recipes.text4seg.dataset import Expression, Instance, Photo
from relay_models.text4seg.geometry import upsample

# By how much an expression must hold. The first three are those with which seg-tiny's own expressions were made.
ORDER_MARGIN_X = 0.08
ORDER_MARGIN_Y = 0.12
SIZE_MARGIN = 1.5
THIRD = 0.36  # "on the left" ends here when there is one only; the rest by symmetry
MIDDLE = 0.15  # "in the middle" is at most this far from the centre line, and the others are further

MIN_CROP_AREA = 0.3
CROP_ASPECTS = (3 / 4, 4 / 3)  # of the crop's shape to the picture's
CUT_OFF_MARGIN = 0.02  # a class is gone if its masks end this far outside of a crop
PASTE_SIZES = (0.15, 0.6)  # the longer side of what is pasted, as a share of the picture's
MIN_VISIBLE = 0.3  # of an instance, below which a paste that covers it is not made

_SWAPPED = {"left": "right", "right": "left"}
_SIDE = re.compile(r"\b(left|right)(?=(?:most|wards?|hand|handed|side)?\b)", re.IGNORECASE)
# What tells a side and has no mirrored form here: "guy on lft", "at 3 o'clock", "port side", "the east end".
_OTHER_SIDE = re.compile(
    r"\b(?:lft|lt|letf|rt|rgh?t|rigth|righ|o['’ ]?clock|(?:anti|counter)?-?clockwise|port(?:side)?|starboard"
    r"|(?:north|south)?-?(?:east|west)(?:ern(?:most)?|wards?|bound)?)\b",
    re.IGNORECASE,
)
# Whatever may say a side: "left", "topleft", "left_hand", "lung L"; and those of such words that never do.
_WORD_WITH_SIDE = re.compile(r"\w*(?:left|right)\w*|(?<![^\W_])[lr](?![^\W_])", re.IGNORECASE)
_NEVER_A_SIDE = re.compile(r"(?:al|b|copy|f|up|(?:play|ship|wheel)?w)right[a-z]*|leftovers?|clefts?", re.IGNORECASE)
# A bare "left" or "right" is a side after one of these words, or before one of those. Elsewhere it may be a verb.
_BEFORE_SIDE = re.compile(
    r"(?:\A|\b(?:the|an?|no|to|on|in|at|from|with|his|her|its|their|our|your|my|very|far|near|first|second|third|fourth"
    r"|top|bottom|upper|lower|middle|front|back|rear|facing|looking|turning|turned|pointing|leaning|heading)[ -]"
    r"|\b(?!(?:all|everything|he|it|one|she|that|there|what|who)['’])\w+['’]s )\Z",
    re.IGNORECASE,
)
_AFTER_SIDE = re.compile(r"[ -](?:of|hand|handed|side|most|edge|corner)\b", re.IGNORECASE)
# What is no side: "right behind the car", "the cup left on the table", "what is left of it", "the right angle".
_NO_SIDE = re.compile(
    r"(?<!at the )(?<!from the )(?<!in the )(?<!on the )(?<!to the )"
    r"(?<!far )(?<!upper )(?<!lower )(?<!top )(?<!bottom )\b(?:left|right)[ -]"
    r"(?:above|after|alone|at|away|before|behind|below|beside|by|here|in|next|now|on|out|over|there|under|up)\b"
    r"|(?:['’]s|\b(?:are|has|have|is|was|were)) left of\b|\bright[ -](?:angle|triangle|whale)",
    re.IGNORECASE,
)

_IRREGULAR_PLURALS = {"person": "people", "mouse": "mice", "sheep": "sheep", "skis": "skis", "scissors": "scissors"}
_SINGULAR_ONLY = re.compile(r"\bonly\b", re.IGNORECASE)
_COUNTED = re.compile(
    r"\b(?:\d+|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w+teen|twenty|dozens?|hundreds?|both|few"
    r"|several|many|numerous|pairs?|couples?|duo|twins|trio|triplets|quartet|quintet)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, eq=False)
class Sample:
    """A picture, RGB of the photo's size, and what is known about it."""

    image: Image.Image
    photo: Photo

    def __post_init__(self) -> None:
        if self.image.size != (self.photo.width, self.photo.height) or self.image.mode != "RGB":
            raise RelayModelsError(
                f"image of {self.photo.file} must be RGB {self.photo.width}x{self.photo.height}, got "
                f"{self.image.mode} {self.image.width}x{self.image.height}"
            )


Draw = Callable[[], Sample]


def opened(photo: Photo) -> Sample:
    """The photo with its picture."""
    return Sample(photo.open(), photo)


# ---------------------------------------------------------------- flip


def flip(sample: Sample) -> Sample:
    """The mirror image, left and right swapped in the words. Unchanged where the photo names a class that is a side."""
    photo = sample.photo
    classes = (*photo.labels, *photo.absent, *photo.unsure, *(photo.labelled_classes or ()))
    if any(_sides(label) for label in classes):
        return sample
    instances = tuple(_with_mask(instance, instance.mask_HW[:, ::-1]) for instance in photo.instances)
    expressions = tuple(
        replace(expression, text=text)
        for expression in photo.expressions
        if (text := mirrored(expression.text)) is not None
    )
    image = sample.image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return Sample(image, replace(photo, instances=instances, expressions=expressions))


def mirrored(text: str) -> str | None:
    """The words for the mirror image: `leftmost` for `rightmost`, `to the Left of` for `to the Right of`.

    None where a word may be a side, or may not.
    """
    if _NO_SIDE.search(text) or _OTHER_SIDE.search(text) or not all(_is_surely_side(match) for match in _sides(text)):
        return None
    return _SIDE.sub(lambda match: _in_case_of(match.group(1), _SWAPPED[match.group(1).lower()]), text)


def _sides(text: str) -> list[re.Match[str]]:
    """The words that may say a side."""
    return [match for match in _WORD_WITH_SIDE.finditer(text) if not _NEVER_A_SIDE.fullmatch(match.group())]


def _is_surely_side(match: re.Match[str]) -> bool:
    if not _SIDE.match(match.group()):
        return False
    is_bare = match.group().lower() in _SWAPPED
    before, after = match.string[: match.start()], match.string[match.end() :]
    return not is_bare or bool(_BEFORE_SIDE.search(before) or _AFTER_SIDE.match(after))


def _in_case_of(model: str, word: str) -> str:
    if model.isupper():
        return word.upper()
    return word.capitalize() if model[0].isupper() else word


# ---------------------------------------------------------------- crop


def crop(sample: Sample, window: tuple[int, int, int, int]) -> Sample:
    """The part of the picture in ``window``, x0, y0, x1, y1, half-open. It is not scaled: pictures are squashed later.

    Raises:
        RelayModelsError: the window is empty or leaves the picture.
    """
    photo = sample.photo
    x0, y0, x1, y1 = window
    if not (0 <= x0 < x1 <= photo.width and 0 <= y0 < y1 <= photo.height):
        raise RelayModelsError(f"window must lie in the {photo.width}x{photo.height} picture, got {window}")
    instances = _without_empty(_with_mask(instance, instance.mask_HW[y0:y1, x0:x1]) for instance in photo.instances)
    present = {instance.label for instance in instances}
    gone = [
        label
        for label in photo.labels
        if label not in present and photo.is_complete(label) and _is_outside(photo, label, window)
    ]
    cropped = replace(
        photo,
        width=x1 - x0,
        height=y1 - y0,
        instances=instances,
        absent=(*photo.absent, *gone),
        is_negative=photo.is_negative,
    )
    return Sample(sample.image.crop(window), replace(cropped, expressions=_kept(photo.expressions, photo, cropped)))


def random_window(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """A window of at least `MIN_CROP_AREA` of the picture, of about its shape, anywhere in it."""
    area = rng.uniform(MIN_CROP_AREA, 1)
    aspect = math.exp(rng.uniform(math.log(CROP_ASPECTS[0]), math.log(CROP_ASPECTS[1])))
    window_w = min(width, max(1, round(width * math.sqrt(area * aspect))))
    window_h = min(height, max(1, round(height * math.sqrt(area / aspect))))
    x0, y0 = int(rng.integers(width - window_w + 1)), int(rng.integers(height - window_h + 1))
    return x0, y0, x0 + window_w, y0 + window_h


def _is_outside(photo: Photo, label: str, window: tuple[int, int, int, int]) -> bool:
    x0, y0, x1, y1 = window
    margin_x, margin_y = math.ceil(photo.width * CUT_OFF_MARGIN), math.ceil(photo.height * CUT_OFF_MARGIN)
    around_HW = photo.class_mask(label)[max(0, y0 - margin_y) : y1 + margin_y, max(0, x0 - margin_x) : x1 + margin_x]
    return not around_HW.any()


# ---------------------------------------------------------------- mosaic


def mosaic(samples: Sequence[Sample], side: int) -> Sample:
    """Four pictures in a square of ``side`` pixels, each squashed into a quarter: row by row, as given.

    Raises:
        RelayModelsError: there are not four, or the side is below 2.
    """
    if len(samples) != 4 or side < 2:
        raise RelayModelsError(f"a mosaic takes 4 pictures and a side of at least 2, got {len(samples)} and {side}")
    half = side // 2
    image = Image.new("RGB", (side, side))
    instances: list[Instance] = []
    told: list[Expression] = []
    for index, sample in enumerate(samples):
        x0, y0 = (index % 2) * half, (index // 2) * half
        tile_w, tile_h = side - half if index % 2 else half, side - half if index // 2 else half
        image.paste(sample.image.resize((tile_w, tile_h), Image.Resampling.BICUBIC), (x0, y0))
        moved: dict[int, int] = {}
        for instance in sample.photo.instances:
            mask_HW = np.zeros((side, side), dtype=np.bool_)
            mask_HW[y0 : y0 + tile_h, x0 : x0 + tile_w] = upsample(instance.mask_HW, tile_h, tile_w)
            if mask_HW.any():
                moved[instance.id] = len(instances)
                instances.append(_with_mask(replace(instance, id=len(instances)), mask_HW))
        told += [
            replace(expression, ids=tuple(moved[number] for number in expression.ids))
            for expression in sample.photo.expressions
            if all(number in moved for number in expression.ids)
        ]
    photos = [sample.photo for sample in samples]
    whole = _joined(photos, Photo("+".join(photo.file for photo in photos), side, side, tuple(instances)))
    return Sample(image, replace(whole, expressions=_kept(told, None, whole)))


def _labelled_in_all(parts: Sequence[Photo]) -> tuple[str, ...] | None:
    limits = [set(part.labelled_classes) for part in parts if part.labelled_classes is not None]
    if not limits:
        return None
    in_all = set.intersection(*limits)
    return tuple(dict.fromkeys(label for part in parts for label in part.labelled_classes or () if label in in_all))


def _joined(parts: Sequence[Photo], whole: Photo) -> Photo:
    """``whole`` with what is known of the classes in a picture of these parts."""
    labelled = _labelled_in_all(parts)
    unsure = tuple(dict.fromkeys(label for part in parts for label in part.unsure))
    candidates = dict.fromkeys(label for part in parts for label in part.absent)
    present = set(whole.labels)
    absent = tuple(
        label for label in candidates if label not in present and all(part.surely_lacks(label) for part in parts)
    )
    return replace(
        whole,
        unsure=unsure,
        labelled_classes=labelled,
        absent=absent,
        is_negative=all(part.is_negative for part in parts),
        marked_by_hand=all(part.is_all_by_hand for part in parts),
        source="+".join(dict.fromkeys(part.source for part in parts)),
        folder=parts[0].folder,
    )


# ---------------------------------------------------------------- copy and paste


def copy_paste(sample: Sample, donor: Sample, id: int, rng: np.random.Generator) -> Sample:
    """The picture with the donor's instance ``id`` in front, at a random size and place.

    Unchanged where the instance is too small to paste, or would hide most of another.

    Raises:
        RelayModelsError: the donor has no such instance.
    """
    found = [instance for instance in donor.photo.instances if instance.id == id]
    if not found:
        raise RelayModelsError(f"{donor.photo.file} has no instance {id}")
    pasted = _placed(found[0], donor.image, sample.photo, rng)
    if pasted is None:
        return sample
    mask_HW, image_HW3 = pasted
    photo = sample.photo
    rest = []
    for instance in photo.instances:
        whole_HW = instance.mask_HW
        left_HW = whole_HW & ~mask_HW
        if left_HW.sum() < MIN_VISIBLE * whole_HW.sum():
            return sample
        rest.append(_with_mask(instance, left_HW))
    new = replace(found[0], id=max((instance.id for instance in rest), default=-1) + 1)
    instances = (*rest, _with_mask(new, mask_HW))
    # The mask of what is pasted may hold what the donor leaves unmarked: a person's tie, the cup in a hand.
    changed = replace(
        photo,
        instances=instances,
        absent=tuple(label for label in photo.absent if label != new.label and donor.photo.surely_lacks(label)),
        unsure=tuple(dict.fromkeys((*photo.unsure, *donor.photo.unsure))),
        labelled_classes=_labelled_in_all((photo, donor.photo)),
        is_negative=False,
        marked_by_hand=photo.is_all_by_hand and donor.photo.is_all_by_hand,
    )
    pixels_HW3 = np.where(mask_HW[:, :, None], image_HW3, np.asarray(sample.image))
    kept = _kept(photo.expressions, photo, changed)
    return Sample(Image.fromarray(pixels_HW3), replace(changed, expressions=kept))


def _placed(
    instance: Instance, image: Image.Image, photo: Photo, rng: np.random.Generator
) -> tuple[BoolMask, npt.NDArray[np.uint8]] | None:
    """The instance's mask and pixels on an empty picture of the photo's size, scaled without changing its shape."""
    size = rng.uniform(*PASTE_SIZES)
    place_x, place_y = rng.random(), rng.random()
    bounds = box(instance.mask_HW)
    if bounds is None:
        return None
    x0, y0, x1, y1 = bounds
    scale = size * min(photo.width / (x1 - x0), photo.height / (y1 - y0))
    width, height = round((x1 - x0) * scale), round((y1 - y0) * scale)
    if width < 1 or height < 1:
        return None
    left, top = round(place_x * (photo.width - width)), round(place_y * (photo.height - height))
    mask_HW = np.zeros((photo.height, photo.width), dtype=np.bool_)
    mask_HW[top : top + height, left : left + width] = upsample(instance.mask_HW[y0:y1, x0:x1], height, width)
    if not mask_HW.any():
        return None
    image_HW3 = np.zeros((photo.height, photo.width, 3), dtype=np.uint8)
    part = image.crop(bounds).resize((width, height), Image.Resampling.BICUBIC)
    image_HW3[top : top + height, left : left + width] = np.asarray(part)
    return mask_HW, image_HW3


# ---------------------------------------------------------------- what is still true


def _kept(expressions: Iterable[Expression], before: Photo | None, after: Photo) -> tuple[Expression, ...]:
    """The expressions that hold in ``after``, with the ids they mean there. ``before`` is None for several photos."""
    geometry = Geometry(after)
    kept = []
    for expression in expressions:
        if expression.kind == "class":
            found = _kept_class(expression, before, after)
        else:
            found = expression if geometry.holds(expression) else None
        if found is not None:
            kept.append(found)
    # Several parts of a mosaic may say the same, and then mean the same: what is kept is true of nothing else.
    return tuple({expression.text: expression for expression in kept}.values())


def _kept_class(expression: Expression, before: Photo | None, after: Photo) -> Expression | None:
    label_of = {instance.id: instance.label for instance in (*(before.instances if before else ()), *after.instances)}
    labels = {label_of[number] for number in expression.ids if number in label_of}
    if len(labels) != 1 or not all(after.is_complete(label) for label in labels):
        return None
    meant = [instance for instance in after.instances if instance.label in labels]
    if not meant:
        return None
    was_one = len(expression.ids) == 1
    if _SINGULAR_ONLY.search(expression.text) and not (len(meant) == 1 and meant[0].is_one_object):
        return None
    (label,) = labels
    if not names_class(expression.text, label) and (before is None or not set(after.labels) <= set(before.labels)):
        return None
    if was_one != (len(meant) == 1):
        return None
    ids = tuple(instance.id for instance in meant)
    if not names_only_class(expression.text, label):
        have_others_joined = not set(ids) <= set(expression.ids)
        # Of a group or a crowd some may be gone.
        may_be_fewer = len(ids) < len(expression.ids) or not all(instance.is_one_object for instance in meant)
        if have_others_joined or (may_be_fewer and _COUNTED.search(expression.text)):
            return None
    return replace(expression, ids=ids)


def names_class(text: str, label: str) -> bool:
    """Whether the text names this class, in the singular or in an English plural, and not just a kind of it."""
    words = text.lower().split()
    return any(_contains(words, name.split()) for name in _names(label))


def names_only_class(text: str, label: str) -> bool:
    """Whether the text names this class and says no more of it: "all dogs", "the dogs in the photo", "dog"."""
    names = "|".join(map(re.escape, _names(label)))
    all_of = r"(?:(?:all(?: of)?(?: the)?|the|every|each|any|an?) )?"
    in_picture = r"(?: in (?:the|this) (?:image|photo|picture|scene))?"
    return re.fullmatch(f"{all_of}(?:{names}){in_picture}", text.lower()) is not None


def _contains(words: list[str], name: list[str]) -> bool:
    return any(words[start : start + len(name)] == name for start in range(len(words)))


def _names(label: str) -> tuple[str, ...]:
    """The label in lower case, and its English plurals."""
    *first, last = label.lower().split()
    return tuple(" ".join([*first, form]) for form in (last, *_plurals(last)))


def plural(label: str) -> str:
    """All of a class in English: "people", "wine glasses", "knives", "cherries"."""
    *first, last = label.split()
    if last in _IRREGULAR_PLURALS:
        form = _IRREGULAR_PLURALS[last]
    elif last.endswith("fe"):
        form = f"{last.removesuffix('fe')}ves"
    elif last.endswith("y") and last[-2:-1] not in tuple("aeiou"):
        form = f"{last.removesuffix('y')}ies"
    else:
        form = f"{last}es" if last.endswith(("s", "x", "z", "ch", "sh")) else f"{last}s"
    return " ".join([*first, form])


def _plurals(word: str) -> tuple[str, ...]:
    found = [word + "s", word + "es", _IRREGULAR_PLURALS.get(word, word)]
    if word.endswith("fe"):
        found.append(word[:-2] + "ves")
    elif word.endswith("f"):
        found.append(word[:-1] + "ves")
    elif word.endswith("y"):
        found.append(word[:-1] + "ies")
    return tuple(found)


@dataclass(frozen=True)
class _Shape:
    """Where the centre of an instance is, and how much of the picture it covers."""

    x: float
    y: float
    area: float


class Geometry:
    """Which expressions of position, size and relation hold in a photo. Decodes each mask once."""

    def __init__(self, photo: Photo) -> None:
        self._photo = photo

    @cached_property
    def _shapes(self) -> dict[int, _Shape]:
        return {instance.id: _shape(instance) for instance in self._photo.instances}

    def holds(self, expression: Expression) -> bool:
        """Whether it is a sentence understood here, and surely true of its one instance and of no other.

        It is never so where its class may have masks missing, or a crowd or a group.
        """
        if len(expression.ids) != 1:
            return False
        by_id = {instance.id: instance for instance in self._photo.instances}
        target = by_id.get(expression.ids[0])
        if target is None or not self._is_told_apart(target.label):
            return False
        words = _as_words(expression.text, target.label)
        if words is None:
            return self._relation_holds(expression.text, target)
        rule = _RULES.get(words)
        if rule is None:
            return False
        rivals = [
            self._shapes[instance.id]
            for instance in self._photo.instances
            if instance.label == target.label and instance.id != target.id
        ]
        return rule(self._shapes[target.id], rivals)

    def _is_told_apart(self, label: str) -> bool:
        return self._photo.is_complete(label) and all(
            instance.is_one_object for instance in self._photo.instances if instance.label == label
        )

    def _relation_holds(self, text: str, target: Instance) -> bool:
        """ "the A to the left of the B", where there is one B, and no other A on that side of it."""
        match = _RELATION.fullmatch(text)
        if match is None or match["subject"] != target.label:
            return False
        references = [instance for instance in self._photo.instances if instance.label == match["reference"]]
        if len(references) != 1 or not self._is_told_apart(match["reference"]) or references[0].id == target.id:
            return False
        sign = 1 if match["side"] == "left" else -1
        x = self._shapes[references[0].id].x
        rivals = [
            self._shapes[instance.id].x
            for instance in self._photo.instances
            if instance.label == target.label and instance.id != target.id
        ]
        return sign * (x - self._shapes[target.id].x) >= ORDER_MARGIN_X and all(
            sign * (rival - x) >= ORDER_MARGIN_X for rival in rivals
        )


_RELATION = re.compile(r"the (?P<subject>.+) to the (?P<side>left|right) of the (?P<reference>.+)")


def _as_words(text: str, label: str) -> str | None:
    """The text with X for its class, or None if it does not name it just once."""
    pattern = rf"\b{re.escape(label)}\b"
    if len(re.findall(pattern, text)) != 1 or _RELATION.fullmatch(text):
        return None
    return re.sub(pattern, "X", text)


def _shape(instance: Instance) -> _Shape:
    mask_HW = instance.mask_HW
    height, width = mask_HW.shape
    rows, columns = np.nonzero(mask_HW)
    if not len(rows):
        return _Shape(0.5, 0.5, 0)
    return _Shape(float(columns.mean() + 0.5) / width, float(rows.mean() + 0.5) / height, len(rows) / mask_HW.size)


Rule = Callable[[_Shape, list[_Shape]], bool]


def _is_first(key: Callable[[_Shape], float], margin: float) -> Rule:
    """Before all others along an axis; of one alone nobody would say so."""
    return lambda one, rivals: bool(rivals) and min(key(rival) for rival in rivals) - key(one) >= margin


def _is_second(key: Callable[[_Shape], float], margin: float) -> Rule:
    def holds(one: _Shape, rivals: list[_Shape]) -> bool:
        gaps = sorted(key(rival) - key(one) for rival in rivals)
        return len(gaps) >= 2 and gaps[0] <= -margin and gaps[1] >= margin

    return holds


def _is_at(key: Callable[[_Shape], float], *, may_have_rivals: bool) -> Rule:
    """At the low end of an axis, and the only one in that half."""

    def holds(one: _Shape, rivals: list[_Shape]) -> bool:
        if rivals and not may_have_rivals:
            return False
        return key(one) <= THIRD and all(key(rival) >= 0.5 + ORDER_MARGIN_X for rival in rivals)

    return holds


def _is_in_the_middle(one: _Shape, rivals: list[_Shape]) -> bool:
    is_near = abs(one.x - 0.5) <= MIDDLE / 2 and abs(one.y - 0.5) <= 2 * MIDDLE
    return is_near and all(abs(rival.x - 0.5) >= MIDDLE / 2 + ORDER_MARGIN_X for rival in rivals)


def _is_largest(one: _Shape, rivals: list[_Shape]) -> bool:
    return bool(rivals) and one.area >= SIZE_MARGIN * max(rival.area for rival in rivals)


def _is_smallest(one: _Shape, rivals: list[_Shape]) -> bool:
    return bool(rivals) and one.area * SIZE_MARGIN <= min(rival.area for rival in rivals)


_RULES: dict[str, Rule] = {
    "the leftmost X": _is_first(lambda shape: shape.x, ORDER_MARGIN_X),
    "the rightmost X": _is_first(lambda shape: -shape.x, ORDER_MARGIN_X),
    "the topmost X": _is_first(lambda shape: shape.y, ORDER_MARGIN_Y),
    "the lowest X": _is_first(lambda shape: -shape.y, ORDER_MARGIN_Y),
    "the second X from the left": _is_second(lambda shape: shape.x, ORDER_MARGIN_X),
    "the second X from the right": _is_second(lambda shape: -shape.x, ORDER_MARGIN_X),
    "the X on the left": _is_at(lambda shape: shape.x, may_have_rivals=True),
    "the X on the right": _is_at(lambda shape: 1 - shape.x, may_have_rivals=True),
    "the X at the top": _is_at(lambda shape: shape.y, may_have_rivals=False),
    "the X at the bottom": _is_at(lambda shape: 1 - shape.y, may_have_rivals=False),
    "the X in the middle": _is_in_the_middle,
    "the largest X": _is_largest,
    "the biggest X": _is_largest,
    "the smallest X": _is_smallest,
}


# ---------------------------------------------------------------- at random


@dataclass(frozen=True)
class Augmentation:
    """How often each change is made; each is drawn by itself, a flip last.

    Attributes:
        flip, crop, copy_paste, mosaic: probabilities. A mosaic is made instead of crop and copy_paste.
        mosaic_side: in pixels.
    """

    flip: float = 0.5
    crop: float = 0.5
    copy_paste: float = 0.2
    mosaic: float = 0.15
    mosaic_side: int = 448

    def __post_init__(self) -> None:
        for name in ("flip", "crop", "copy_paste", "mosaic"):
            if not 0 <= getattr(self, name) <= 1:
                raise RelayModelsError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        if self.mosaic_side < 2:
            raise RelayModelsError(f"mosaic_side must be at least 2, got {self.mosaic_side}")

    def apply(self, sample: Sample, draw: Draw, rng: np.random.Generator) -> Sample:
        """A changed sample.

        Args:
            sample: the photo to begin with.
            draw: gives other samples, for mosaics and pastes; deterministic if the result is to be.
            rng: makes every choice.
        """
        if rng.random() < self.mosaic:
            sample = mosaic([sample, draw(), draw(), draw()], self.mosaic_side)
        else:
            if rng.random() < self.crop:
                sample = crop(sample, random_window(sample.photo.width, sample.photo.height, rng))
            if rng.random() < self.copy_paste:
                sample = _pasted_at_random(sample, draw(), rng)
        return flip(sample) if rng.random() < self.flip else sample


def _pasted_at_random(sample: Sample, donor: Sample, rng: np.random.Generator) -> Sample:
    """One object of the donor's, of a class that is complete in both, so that it can be asked for.

    None of a donor in which only some classes are marked: all others would be unknown in the whole picture.
    """
    if donor.photo.labelled_classes is not None:
        return sample
    fitting = [
        instance.id
        for instance in donor.photo.instances
        if instance.is_one_object
        and sample.photo.is_complete(instance.label)
        and donor.photo.is_complete(instance.label)
    ]
    if not fitting:
        return sample
    return copy_paste(sample, donor, fitting[rng.integers(len(fitting))], rng)


def _with_mask(instance: Instance, mask_HW: BoolMask) -> Instance:
    return Instance.of(
        instance.id,
        instance.label,
        mask_HW,
        is_crowd=instance.is_crowd,
        is_group=instance.is_group,
        is_pseudo=instance.is_pseudo,
    )


def _without_empty(instances: Iterable[Instance]) -> tuple[Instance, ...]:
    return tuple(instance for instance in instances if instance.mask_HW.any())
