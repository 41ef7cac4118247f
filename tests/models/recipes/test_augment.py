"""What is still said of a changed picture must be true of it, and masks must move with the pixels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from relay_models.errors import RelayModelsError
from relay_models.recipes.text4seg.augment import (
    MIN_CROP_AREA,
    Augmentation,
    Geometry,
    Sample,
    copy_paste,
    crop,
    flip,
    mirrored,
    mosaic,
    names_class,
    opened,
    plural,
    random_window,
)
from relay_models.recipes.text4seg.dataset import Expression, Instance, Photo, load_jsonl

SEG_TINY = Path(__file__).parents[4] / "shared/data/seg-tiny"
WIDTH, HEIGHT = 100, 80
COLOURS = {"person": (200, 10, 10), "dog": (10, 200, 10), "kite": (10, 10, 200)}
GREY = (90, 90, 90)


def instance(id: int, label: str, x0: int, y0: int, x1: int, y1: int, **flags: bool) -> Instance:
    mask_HW = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask_HW[y0:y1, x0:x1] = True
    return Instance.of(id, label, mask_HW, **flags)


def expression(text: str, *ids: int) -> Expression:
    kinds = {"left": "position", "right": "position", "top": "position", "second": "position", "middle": "position"}
    kind = "relation" if " of the " in text else "size" if "est " in text else "class"
    return Expression(text, ids, next((value for word, value in kinds.items() if word in text), kind))


def sample(*instances: Instance, says: tuple[Expression, ...] = (), **fields) -> Sample:
    """A picture in which each instance is painted in the colour of its class, so that masks can be checked by eye."""
    pixels = np.full((HEIGHT, WIDTH, 3), GREY, dtype=np.uint8)
    for item in instances:
        pixels[item.mask_HW] = COLOURS[item.label]
    photo = Photo("a.jpg", WIDTH, HEIGHT, instances, says, **fields)
    return Sample(Image.fromarray(pixels), photo)


def check_masks_lie_on_their_colours(changed: Sample) -> None:
    pixels = np.asarray(changed.image).astype(int)
    for label in changed.photo.labels:
        is_colour = np.abs(pixels - COLOURS[label]).sum(axis=2) < 60
        mask_HW = changed.photo.class_mask(label)
        assert (is_colour & mask_HW).sum() >= 0.9 * mask_HW.sum()
        assert (is_colour & ~mask_HW).sum() <= 0.1 * mask_HW.sum()


def texts(changed: Sample) -> dict[str, tuple[int, ...]]:
    return {item.text: item.ids for item in changed.photo.expressions}


LEFT = instance(0, "person", 5, 20, 25, 70)
RIGHT = instance(1, "person", 70, 30, 90, 50)
DOG = instance(2, "dog", 40, 50, 55, 75)
SCENE = sample(
    LEFT,
    RIGHT,
    DOG,
    says=(
        expression("all people", 0, 1),
        expression("the dog", 2),
        expression("the animal", 2),
        expression("the leftmost person", 0),
        expression("the largest person", 0),
        expression("the person to the right of the dog", 1),
    ),
    absent=("kite",),
    unsure=("chair",),
)


# ---------------------------------------------------------------- flip


def test_a_flip_moves_masks_and_swaps_words():
    changed = flip(SCENE)
    check_masks_lie_on_their_colours(changed)
    np.testing.assert_array_equal(changed.photo.instances[0].mask_HW, LEFT.mask_HW[:, ::-1])
    assert texts(changed) == {
        "all people": (0, 1),
        "the dog": (2,),
        "the animal": (2,),
        "the rightmost person": (0,),
        "the largest person": (0,),
        "the person to the left of the dog": (1,),
    }
    assert (changed.photo.absent, changed.photo.unsure) == (("kite",), ("chair",))
    assert np.array_equal(np.asarray(flip(changed).image), np.asarray(SCENE.image))
    assert flip(changed).photo == SCENE.photo


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the second cup from the left", "the second cup from the right"),
        ("the Leftmost dog to the RIGHT of the car", "the Rightmost dog to the LEFT of the car"),
        ("left-hand cup", "right-hand cup"),
        ("the leftover pizza on a bright plate", "the leftover pizza on a bright plate"),
        ("the upright clock", "the upright clock"),
        ("left dog", "right dog"),
        ("the top-left cup", "the top-right cup"),
        ("the far left one", "the far right one"),
        ("the left-handed player", "the right-handed player"),
        ("his left arm, at the woman's right shoulder", "his right arm, at the woman's left shoulder"),
        ("the bag left of the chair facing right", "the bag right of the chair facing left"),
        ("the cup in the lower left corner", "the cup in the lower right corner"),
    ],
)
def test_words_for_the_mirror_image(text, expected):
    assert mirrored(text) == expected
    assert mirrored(expected) == text


@pytest.mark.parametrize("text", ["the dog right behind the car", "the cup left on the table", "Right next to him"])
def test_a_right_that_is_no_side_is_dropped(text):
    shown = sample(DOG, says=(Expression(text, (2,), "relation"),))
    assert texts(flip(shown)) == {}


@pytest.mark.parametrize(
    "text",
    [
        "the topleft dog",
        "guy on lft",
        "rt guy",
        "the dog at 3 o'clock",
        "the boat on the port side",
        "the starboard one",
        "the eastern gate",
        "the dog at his left_hand",
        "the leftish dog",
        "the dog that left",
        "the sandwich left uneaten",
        "what's left of the cake",
        "the right angle",
        "the dog at side L",
    ],
)
def test_a_side_that_cannot_be_told_from_something_else_is_dropped(text):
    assert mirrored(text) is None
    shown = sample(DOG, says=(Expression(text, (2,), "position"), expression("the dog", 2)))
    assert texts(flip(shown)) == {"the dog": (2,)}


@pytest.mark.parametrize("name", ["left lung", "Right-hand glove", "lung_left", "upperRightMolar", "lung L", "eye.r"])
@pytest.mark.parametrize("field", ["absent", "unsure", "labelled_classes", "instances"])
def test_a_photo_with_a_class_that_is_a_side_is_not_flipped(name, field):
    shown = sample(DOG, LEFT, says=(expression("the leftmost dog", 2),))
    named = (DOG, replace(LEFT, label=name)) if field == "instances" else ("person", name)
    shown = Sample(shown.image, replace(shown.photo, **{field: named}))
    assert flip(shown) is shown


def test_a_class_that_only_sounds_like_a_side_is_flipped():
    shown = sample(DOG, absent=("bright star", "leftovers", "upright piano", "playwright", "L4 vertebra"))
    np.testing.assert_array_equal(flip(shown).photo.instances[0].mask_HW, DOG.mask_HW[:, ::-1])


def test_a_side_before_a_place_is_kept():
    shown = sample(DOG, says=(Expression("the one on the left behind the car", (2,), "relation"),))
    assert list(texts(flip(shown))) == ["the one on the right behind the car"]


# ---------------------------------------------------------------- crop


def test_a_crop_keeps_what_still_holds():
    changed = crop(SCENE, (0, 0, 60, 80))
    assert (changed.photo.width, changed.photo.height, changed.image.size) == (60, 80, (60, 80))
    check_masks_lie_on_their_colours(changed)
    assert [item.id for item in changed.photo.instances] == [0, 2]
    # One person is left: "all people" is no way to say so, and nobody is the leftmost or the largest alone.
    assert texts(changed) == {"the dog": (2,), "the animal": (2,)}
    assert changed.photo.unsure == ("chair",)


def test_a_crop_that_cuts_nothing_off_keeps_everything():
    changed = crop(SCENE, (0, 0, WIDTH, HEIGHT))
    assert texts(changed) == texts(SCENE)
    assert changed.photo == SCENE.photo


def test_a_class_of_which_a_crop_leaves_nothing_is_absent():
    assert crop(SCENE, (0, 0, 30, 80)).photo.absent == ("kite", "dog")


def test_a_class_that_ends_at_the_edge_of_the_crop_or_is_incomplete_is_not_absent():
    assert "dog" not in crop(SCENE, (0, 0, 39, 80)).photo.absent
    unsure = Sample(SCENE.image, replace(SCENE.photo, unsure=("dog",)))
    assert "dog" not in crop(unsure, (0, 0, 30, 80)).photo.absent
    unlabelled = Sample(SCENE.image, replace(SCENE.photo, labelled_classes=("person",)))
    assert "dog" not in crop(unlabelled, (0, 0, 30, 80)).photo.absent


def test_a_crop_may_make_another_one_the_largest():
    """Of the person who was the largest only a strip is left."""
    changed = crop(SCENE, (24, 0, 100, 80))
    assert [item.id for item in changed.photo.instances] == [0, 1, 2]
    assert "the largest person" not in texts(changed)
    assert texts(changed)["the leftmost person"] == (0,)


def test_a_crop_drops_what_it_cannot_check():
    says = (expression("the leftmost person", 0), Expression("the tall person", (0,), "size"))
    for flag in ({}, {"unsure": ("person",)}, {"labelled_classes": ("dog",)}):
        changed = crop(sample(LEFT, RIGHT, DOG, says=says, **flag), (0, 0, 99, 80))
        assert ("the leftmost person" in texts(changed)) == (not flag)
        assert "the tall person" not in texts(changed)
    group = replace(RIGHT, is_group=True)
    assert not texts(crop(sample(LEFT, group, says=says), (0, 0, 99, 80)))


def test_the_only_one_stays_the_only_one():
    says = (expression("the only person", 0),)
    assert texts(crop(sample(LEFT, says=says), (0, 0, 50, 80)))
    assert not texts(crop(sample(replace(LEFT, is_group=True), says=says), (0, 0, 50, 80)))


@pytest.mark.parametrize(
    ("text", "is_kept"),
    [
        ("all people", True),
        ("the brown people", True),
        ("all three people", False),
        ("the trio", False),
        ("3 people in the picture", False),
        ("a dozen people", False),
    ],
)
def test_a_crop_that_cuts_one_off_drops_a_number(text, is_kept):
    middle = instance(3, "person", 40, 5, 50, 40)
    says = (Expression(text, (0, 1, 3), "class"),)
    shown = sample(LEFT, RIGHT, middle, says=says)
    assert texts(crop(shown, (0, 0, 60, 80))) == ({text: (0, 3)} if is_kept else {})
    assert texts(crop(shown, (0, 0, 95, 80))) == {text: (0, 1, 3)}


@pytest.mark.parametrize("window", [(0, 0, 101, 80), (-1, 0, 5, 5), (5, 5, 5, 9)])
def test_a_window_outside_is_refused(window):
    with pytest.raises(RelayModelsError, match="window"):
        crop(SCENE, window)


def test_random_windows_are_inside_and_large_enough():
    rng = np.random.default_rng(0)
    for _ in range(200):
        x0, y0, x1, y1 = random_window(WIDTH, HEIGHT, rng)
        assert 0 <= x0 < x1 <= WIDTH
        assert 0 <= y0 < y1 <= HEIGHT
        assert (x1 - x0) * (y1 - y0) >= (MIN_CROP_AREA - 0.05) * WIDTH * HEIGHT
    assert random_window(1, 1, rng) == (0, 0, 1, 1)


# ---------------------------------------------------------------- mosaic


def four(*samples: Sample) -> Sample:
    """A mosaic of them and, where there are fewer than four, of photos in which people found nothing."""
    return mosaic([*samples, *[sample(marked_by_hand=True)] * (4 - len(samples))], 200)


def test_a_mosaic_puts_four_pictures_side_by_side():
    parts = [sample(LEFT), sample(RIGHT), sample(DOG), sample(instance(0, "kite", 40, 30, 60, 50))]
    changed = mosaic(parts, 201)
    assert changed.image.size == (201, 201)
    check_masks_lie_on_their_colours(changed)
    assert [(item.id, item.label) for item in changed.photo.instances] == [
        (0, "person"),
        (1, "person"),
        (2, "dog"),
        (3, "kite"),
    ]
    rows, columns = np.nonzero(changed.photo.instances[2].mask_HW)
    assert rows.min() >= 100
    assert columns.max() < 100


def test_a_mosaic_names_all_of_a_class_or_nothing():
    one = sample(LEFT, says=(expression("the person", 0), expression("the only person", 0)))
    two = sample(LEFT, RIGHT, says=(expression("all people", 0, 1), expression("the leftmost person", 0)))
    assert texts(four(one, sample(DOG))) == {"the person": (0,), "the only person": (0,)}
    # In the second picture to the right nobody is the leftmost any more, and "the person" is one of three.
    assert texts(four(one, two)) == {"all people": (0, 1, 2)}


def test_a_crop_drops_the_number_of_a_group():
    says = (Expression("two people", (0,), "class"), Expression("people", (0,), "class"))
    one = sample(LEFT, says=says)
    assert list(texts(crop(one, (0, 0, 15, 80)))) == ["two people", "people"]
    group = sample(replace(LEFT, is_group=True), says=says)
    assert list(texts(crop(group, (0, 0, 15, 80)))) == ["people"]


PLAIN = ("all people", "people", "The People", "all of the persons in the photo", "the people in this picture")
SAYS_MORE = ("both people", "two people", "all two people", "tall people", "the people on the sofa", "the humans")


def test_where_others_join_only_the_class_alone_still_names_all():
    says = tuple(Expression(text, (0, 1), "class") for text in (*PLAIN, *SAYS_MORE))
    two = sample(LEFT, RIGHT, says=says)
    assert texts(four(two, sample(LEFT))) == dict.fromkeys(PLAIN, (0, 1, 2))
    # No other person joins: what is said of these two stays true, but for a kind of thing.
    assert texts(four(two, sample(DOG))) == dict.fromkeys((*PLAIN, *SAYS_MORE[:-1]), (0, 1))

    donor = sample(instance(4, "person", 40, 30, 60, 50))
    changed = [copy_paste(two, donor, 4, np.random.default_rng(seed)) for seed in range(10)]
    pasted = [item for item in changed if item is not two]
    assert pasted
    assert all(texts(item) == dict.fromkeys(PLAIN, (0, 1, 2)) for item in pasted)


def test_words_for_some_of_a_class_do_not_become_words_for_all():
    """What is annotated as a class but means only some of it says more than the class."""
    shown = sample(
        LEFT, RIGHT, instance(3, "person", 40, 5, 50, 40), says=(Expression("tall people", (0, 3), "class"),)
    )
    assert texts(crop(shown, (0, 0, 95, 80))) == {}


def test_a_mosaic_keeps_an_order_that_still_holds():
    two = sample(LEFT, RIGHT, says=(expression("the leftmost person", 0), expression("the largest person", 0)))
    assert texts(four(two, sample(DOG))) == {"the leftmost person": (0,), "the largest person": (0,)}
    # A second one of equal size and place: neither is the leftmost, nor the largest.
    assert texts(mosaic([two, sample(), two, sample()], 200)) == {}


def test_a_mosaic_drops_kinds_of_things():
    shown = sample(DOG, says=(expression("the dog", 2), expression("the animal", 2)))
    assert texts(four(shown, sample(LEFT))) == {"the dog": (0,)}


def test_in_a_mosaic_absent_is_what_no_part_may_show():
    one = sample(DOG, absent=("kite", "person", "bus", "boat"), unsure=("cup",))
    by_hand = {"marked_by_hand": True}
    assert four(one, sample(absent=("cup",), **by_hand)).photo.absent == ("kite", "person", "bus", "boat")
    assert four(one, sample(LEFT)).photo.absent == ("kite", "bus", "boat")
    assert four(one, sample(unsure=("bus",), **by_hand)).photo.absent == ("kite", "person", "boat")
    assert four(one, sample(labelled_classes=("bus",), absent=("boat",), **by_hand)).photo.absent == ("bus", "boat")


def test_what_a_model_did_not_find_is_not_absent_in_a_mosaic():
    one = sample(DOG, absent=("kite", "bus"))
    found_by_model = sample(replace(LEFT, is_pseudo=True), absent=("bus",))
    assert four(one, found_by_model).photo.absent == ("bus",)
    assert four(one, sample(is_negative=True, absent=("kite",))).photo.absent == ("kite",)
    assert not four(one, found_by_model).photo.is_all_by_hand
    assert four(one, sample(LEFT)).photo.is_all_by_hand


def test_in_a_mosaic_a_class_is_complete_where_it_is_in_every_part():
    changed = four(
        sample(DOG, labelled_classes=("dog", "person"), unsure=("kite",), says=(expression("the dog", 2),)),
        sample(LEFT, labelled_classes=("person",), says=(expression("the person", 0),)),
        sample(replace(RIGHT, is_crowd=True, is_pseudo=True)),
    )
    assert changed.photo.labelled_classes == ("person",)
    assert changed.photo.unsure == ("kite",)
    assert [(item.is_crowd, item.is_pseudo) for item in changed.photo.instances] == [(False,) * 2] * 2 + [(True,) * 2]
    assert texts(changed) == {}


def test_a_mosaic_of_negatives_is_one():
    negative = sample(is_negative=True)
    assert four(negative, negative, negative, negative).photo.is_negative
    assert not four(negative, sample(DOG)).photo.is_negative


def test_a_mosaic_takes_four():
    with pytest.raises(RelayModelsError, match="4 pictures"):
        mosaic([SCENE] * 3, 100)


# ---------------------------------------------------------------- copy and paste


def pasted(shown: Sample, donor: Sample, id: int) -> Photo:
    changes = (copy_paste(shown, donor, id, np.random.default_rng(seed)) for seed in range(20))
    return next(changed for changed in changes if changed is not shown).photo


def test_what_a_paste_may_bring_along_is_not_absent():
    """A donor in which only people are marked may hold a tie, and one that is unsure about cups, a cup."""
    shown = sample(DOG, absent=("kite", "tie", "cup"))
    assert pasted(shown, sample(RIGHT), 1).absent == ("kite", "tie", "cup")
    assert pasted(shown, sample(replace(RIGHT, is_pseudo=True), absent=("kite",)), 1).absent == ("kite",)
    unsure = pasted(shown, sample(RIGHT, unsure=("cup",)), 1)
    assert (unsure.absent, unsure.unsure) == (("kite", "tie"), ("cup",))
    people_only = pasted(shown, sample(RIGHT, labelled_classes=("person",), absent=("kite",)), 1)
    assert (people_only.absent, people_only.labelled_classes) == (("kite",), ("person",))


def test_a_paste_into_what_people_did_not_mark_proves_nothing():
    assert pasted(sample(DOG), sample(RIGHT), 1).is_all_by_hand
    negative = pasted(sample(is_negative=True, absent=("kite",)), sample(RIGHT), 1)
    assert not negative.is_all_by_hand
    assert not negative.surely_lacks("bus")
    assert negative.surely_lacks("kite")


def test_donors_in_which_only_some_classes_are_marked_give_nothing():
    augmentation = Augmentation(flip=0, crop=0, copy_paste=1, mosaic=0)
    shown, donor = sample(DOG), sample(RIGHT, labelled_classes=("person",))
    for seed in range(10):
        assert augmentation.apply(shown, lambda: donor, np.random.default_rng(seed)) is shown


def test_a_paste_adds_an_instance_and_checks_what_is_said():
    donor = sample(instance(7, "kite", 40, 30, 60, 50))
    is_pasted = 0
    for seed in range(20):
        changed = copy_paste(SCENE, donor, 7, np.random.default_rng(seed))
        if changed is SCENE:
            continue
        is_pasted += 1
        check_masks_lie_on_their_colours(changed)
        new = changed.photo.instances[-1]
        assert (new.id, new.label) == (3, "kite")
        assert changed.photo.absent == ()
        assert not any((new.mask_HW & other.mask_HW).any() for other in changed.photo.instances[:-1])
        assert "the animal" not in texts(changed)
        assert texts(changed)["all people"] == (0, 1)
    assert is_pasted > 10


def test_a_paste_of_a_class_that_is_there_changes_what_its_name_means():
    shown = sample(LEFT, says=(expression("the person", 0), expression("the only person", 0)))
    both = sample(LEFT, RIGHT, says=(expression("all people", 0, 1), expression("the rightmost person", 1)))
    donor = sample(instance(4, "person", 40, 30, 60, 50))
    seen = set()
    for seed in range(20):
        assert not texts(copy_paste(shown, donor, 4, np.random.default_rng(seed)))
        changed = copy_paste(both, donor, 4, np.random.default_rng(seed))
        if changed is not both:
            assert texts(changed)["all people"] == (0, 1, 2)
            centres = [np.nonzero(item.mask_HW)[1].mean() for item in changed.photo.instances]
            is_rightmost = texts(changed).get("the rightmost person") == (1,)
            assert not is_rightmost or centres[1] == max(centres)
            seen.add(is_rightmost)
    assert seen == {True, False}


def test_a_paste_does_not_hide_another():
    dots = tuple(instance(n, "dog", 10 * n, 8 * n, 10 * n + 6, 8 * n + 6) for n in range(10))
    full = sample(*dots)
    outcomes = set()
    for seed in range(30):
        changed = copy_paste(full, sample(LEFT), 0, np.random.default_rng(seed))
        outcomes.add("refused" if changed is full else "pasted")
        left = [item.mask_HW.sum() for item in changed.photo.instances[:10]]
        assert min(left) >= 0.3 * 36
        if min(left) < 36:
            outcomes.add("covers a part")
    assert outcomes == {"refused", "pasted", "covers a part"}


def test_a_paste_of_what_is_not_there_is_refused():
    with pytest.raises(RelayModelsError, match="no instance 9"):
        copy_paste(SCENE, SCENE, 9, np.random.default_rng(0))


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("text", "label", "expected"),
    [
        ("all people", "person", True),
        ("the knives", "knife", True),
        ("all wine glasses", "wine glass", True),
        ("the teddy bears", "teddy bear", True),
        ("the animal", "dog", False),
        ("the hot dog", "dog", True),
        ("the carpet", "car", False),
    ],
)
def test_names_of_classes(text, label, expected):
    assert names_class(text, label) is expected


@pytest.mark.parametrize(
    ("text", "id", "expected"),
    [
        ("the leftmost person", 0, True),
        ("the leftmost person", 1, False),
        ("the second person from the left", 1, False),
        ("the person on the left", 0, True),
        ("the person on the right", 1, True),
        ("the person on the right", 0, False),
        ("the largest person", 0, True),
        ("the smallest person", 1, True),
        ("the dog in the middle", 2, True),
        ("the leftmost dog", 2, False),
        ("the person to the left of the dog", 0, True),
        ("the person to the left of the dog", 1, False),
        ("the dog to the left of the person", 2, False),
        ("the friendly dog", 2, False),
    ],
)
def test_which_sentences_hold(text, id, expected):
    assert Geometry(SCENE.photo).holds(Expression(text, (id,), "position")) is expected


# ---------------------------------------------------------------- at random


def test_equal_seeds_change_alike_and_others_do_not():
    augmentation = Augmentation(flip=0.5, crop=0.5, copy_paste=0.5, mosaic=0.3, mosaic_side=64)

    def changed(seed: int) -> Sample:
        return augmentation.apply(SCENE, lambda: flip(SCENE), np.random.default_rng(seed))

    first, second = changed(5), changed(5)
    assert first.photo == second.photo
    np.testing.assert_array_equal(np.asarray(first.image), np.asarray(second.image))
    assert len({changed(seed).photo for seed in range(20)}) > 10


def test_no_change_where_none_is_wanted():
    augmentation = Augmentation(flip=0, crop=0, copy_paste=0, mosaic=0)
    assert augmentation.apply(SCENE, lambda: SCENE, np.random.default_rng(0)) is SCENE


@pytest.mark.parametrize(("field", "value"), [("flip", 1.5), ("mosaic", -1), ("mosaic_side", 1)])
def test_an_augmentation_that_cannot_be_is_refused(field, value):
    with pytest.raises(RelayModelsError, match=f"{field} must.*{value}"):
        Augmentation(**{field: value})


def test_a_sample_needs_a_picture_of_the_annotated_size():
    with pytest.raises(RelayModelsError, match=r"a\.jpg must be RGB 100x80, got RGB 99x80"):
        Sample(Image.new("RGB", (99, 80)), SCENE.photo)


# ---------------------------------------------------------------- the real set


def test_what_is_said_of_changed_real_photos_is_true():
    if not SEG_TINY.exists():
        pytest.skip("needs ../shared/data/seg-tiny")
    photos = load_jsonl(SEG_TINY / "train.jsonl", SEG_TINY)
    rng = np.random.default_rng(1)
    augmentation = Augmentation(crop=0.7, copy_paste=0.4, mosaic=0.3)

    def draw() -> Sample:
        return opened(photos[rng.integers(len(photos))])

    kinds = {"class": 0, "position": 0, "size": 0, "relation": 0}
    for _ in range(80):
        shown = augmentation.apply(draw(), draw, rng).photo
        geometry = Geometry(shown)
        by_id = {item.id: item for item in shown.instances}
        assert len(by_id) == len(shown.instances)
        assert all(item.size == (shown.height, shown.width) and item.mask_HW.any() for item in shown.instances)
        assert not set(shown.absent) & {*shown.labels, *shown.unsure}
        for item in shown.expressions:
            kinds[item.kind] += 1
            label = by_id[item.ids[0]].label
            if item.kind == "class":
                assert set(item.ids) == {other.id for other in shown.instances if other.label == label}
            elif shown.is_complete(label) and "+" in shown.file:
                assert geometry.holds(item)
    assert min(kinds.values()) > 0, kinds


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("person", "people"),
        ("wine glass", "wine glasses"),
        ("knife", "knives"),
        ("couch", "couches"),
        ("sheep", "sheep"),
        ("dining table", "dining tables"),
        ("cherry", "cherries"),
        ("toy", "toys"),
    ],
)
def test_all_of_a_class_in_english(label: str, expected: str) -> None:
    assert plural(label) == expected
    assert names_class(f"all {expected}", label)
