"""The three forms of a data set: what is read, and that each fault is named with its place and value."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from relay_models.masks import coco_rle, from_coco_rle
from relay_models.recipes.text4seg import dataset
from relay_models.recipes.text4seg.dataset import (
    DatasetError,
    Expression,
    Instance,
    Photo,
    load_coco,
    load_jsonl,
    load_png_masks,
    withhold_pseudo,
)

SEG_TINY = Path(__file__).parents[4] / "shared/data/seg-tiny"
WIDTH, HEIGHT = 9, 7


def rectangle(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    mask_HW = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask_HW[y0:y1, x0:x1] = True
    return mask_HW


CAT, DOG = rectangle(0, 1, 3, 5), rectangle(4, 2, 8, 7)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (WIDTH, HEIGHT), (9, 90, 200)).save(tmp_path / "images" / name)
    return tmp_path


# ---------------------------------------------------------------- JSON lines


def line(**changes):
    return {
        "file": "images/a.png",
        "width": WIDTH,
        "height": HEIGHT,
        "instances": [
            {"id": 3, "label": "cat", "mask": coco_rle(CAT)},
            {"id": 5, "label": "dog", "mask": coco_rle(DOG), "provenance": "pseudo", "crowd": True, "group": False},
        ],
        "expressions": [{"text": "the cat on the left", "ids": [3], "kind": "position"}],
        "absent": ["zebra"],
        "unsure": ["wine glass"],
        **changes,
    }


def write(folder: Path, *lines) -> Path:
    path = folder / "set.jsonl"
    path.write_text("\n".join(item if isinstance(item, str) else json.dumps(item) for item in lines))
    return path


def test_a_line_becomes_a_photo(folder):
    (photo,) = load_jsonl(write(folder, "", line(source="here", labelled_classes=["cat", "dog"]), "  "), folder)
    assert (photo.file, photo.width, photo.height, photo.source) == ("images/a.png", WIDTH, HEIGHT, "here")
    assert photo.expressions == (Expression("the cat on the left", (3,), "position"),)
    assert (photo.absent, photo.unsure, photo.labelled_classes) == (("zebra",), ("wine glass",), ("cat", "dog"))
    cat, dog = photo.instances
    assert (cat.id, cat.label, cat.is_crowd, cat.is_group, cat.is_pseudo) == (3, "cat", False, False, False)
    assert (dog.id, dog.label, dog.is_crowd, dog.is_group, dog.is_pseudo) == (5, "dog", True, False, True)
    np.testing.assert_array_equal(cat.mask_HW, CAT)
    np.testing.assert_array_equal(photo.class_mask("dog"), DOG)
    np.testing.assert_array_equal(photo.union([3, 5]), CAT | DOG)
    assert not photo.class_mask("zebra").any()
    assert photo.open().size == (WIDTH, HEIGHT)
    assert not photo.is_negative


def test_which_classes_are_complete(folder):
    without, with_limit = load_jsonl(
        write(folder, line(), line(file="images/b.png", labelled_classes=["cat", "wine glass"])), folder
    )
    assert [without.is_complete(label) for label in ("cat", "dog", "wine glass")] == [True, True, False]
    assert [with_limit.is_complete(label) for label in ("cat", "dog", "wine glass")] == [True, False, False]


def test_who_marked_a_photo_decides_what_it_surely_lacks(folder):
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "images/c.png")
    by_hand, mixed, said = load_jsonl(
        write(
            folder,
            line(instances=line()["instances"][:1]),
            line(file="images/b.png"),
            line(file="images/c.png", marked_by_hand=True),
        ),
        folder,
    )
    assert [photo.is_all_by_hand for photo in (by_hand, mixed, said)] == [True, False, True]
    assert [photo.surely_lacks("bus") for photo in (by_hand, mixed, said)] == [True, False, True]
    assert [mixed.surely_lacks(label) for label in ("zebra", "cat", "wine glass")] == [True, False, False]
    assert not by_hand.surely_lacks("wine glass")


def changed(path: str, value) -> dict:
    """The line with the value at a path such as `instances.0.label` replaced."""
    record = copy.deepcopy(line())
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place = record
    for part in parents:
        place = place[part]
    place[last] = value
    return record


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("file", "../secret.png", ["file", "without '..'", "'../secret.png'"]),
        ("file", "/etc/passwd", ["file", "must be a relative path", "'/etc/passwd'"]),
        ("file", "images/none.png", ["file", "'images/none.png'"]),
        ("file", "images/" + "a" * 300 + ".png", ["file", "'images/aaa", "File name too long"]),
        ("file", 7, ["file", "7"]),
        ("width", 0, ["width", "0"]),
        ("width", True, ["width", "True"]),
        ("height", 7.0, ["height", "7.0"]),
        ("height", HEIGHT + 1, ["instances[0].mask.size", f"[{HEIGHT}, {WIDTH}]"]),
        ("instances", {}, ["instances", "{}"]),
        ("instances.1", None, ["instances[1]", "None"]),
        ("instances.1.id", 3, ["instances[1].id", "3", "instances[0].id"]),
        ("instances.0.label", "", ["instances[0].label", "''"]),
        ("instances.0.label", "a|b", ["instances[0].label", "'a|b'"]),
        ("instances.0.label", "Others", ["instances[0].label", "'Others'"]),
        ("instances.0.mask", "abc", ["instances[0].mask", "'abc'"]),
        ("instances.0.mask.counts", "0", ["instances[0].mask", "counts"]),
        ("instances.0.crowd", "yes", ["instances[0].crowd", "'yes'"]),
        ("instances.0.provenance", "guess", ["instances[0].provenance", "'guess'"]),
        ("expressions.0.ids", [4], ["expressions[0].ids", "4"]),
        ("expressions.0.ids", None, ["expressions[0].ids", "None"]),
        ("expressions.0.ids", ["3"], ["expressions[0].ids", "['3']"]),
        ("expressions.0.ids", [3, 3], ["expressions[0].ids", "[3, 3]"]),
        ("expressions.0.kind", "colour", ["expressions[0].kind", "'colour'"]),
        ("expressions.0.text", "a\nb", ["expressions[0].text", "a\\nb"]),
        ("absent", ["cat"], ["absent", "'cat'"]),
        ("absent", ["wine glass"], ["absent", "'wine glass'", "unsure"]),
        ("absent", "zebra", ["absent", "'zebra'"]),
        ("unsure", ["a", "a"], ["unsure", "['a', 'a']"]),
        ("negative", True, ["negative", "2 instances"]),
    ],
)
def test_a_fault_in_a_line_is_named(folder, path, value, named):
    with pytest.raises(DatasetError) as caught:
        load_jsonl(write(folder, line(file="images/b.png"), changed(path, value)), folder)
    message = str(caught.value)
    assert "set.jsonl:2: " in message, message
    for part in named:
        assert part in message, message


@pytest.mark.parametrize("field", ["file", "width", "height"])
def test_a_missing_field_is_named(folder, field):
    record = line()
    del record[field]
    with pytest.raises(DatasetError, match=rf"set\.jsonl:1: {field} is missing"):
        load_jsonl(write(folder, record), folder)


@pytest.mark.parametrize(
    ("text", "problem"),
    [("{", "not JSON"), ("[" * 100_000, "not JSON"), ('{"width": ' + "9" * 5000 + "}", "not JSON"), ("[]", "object")],
)
def test_a_line_that_is_no_object_is_named(folder, text, problem):
    with pytest.raises(DatasetError, match=problem) as caught:
        load_jsonl(write(folder, line(), text), folder)
    assert "set.jsonl:2" in str(caught.value)


def test_a_line_that_is_no_text_is_named(folder):
    path = write(folder, line())
    path.write_bytes(path.read_bytes() + b"\n\xff{}")
    with pytest.raises(DatasetError, match=r"set\.jsonl:2: is not UTF-8"):
        load_jsonl(path, folder)


def test_the_same_photo_twice_is_refused(folder):
    with pytest.raises(DatasetError, match=r"photo 2 is 'images/a\.png', as photo 1"):
        load_jsonl(write(folder, line(), line()), folder)


def test_a_class_spelt_in_two_ways_is_refused(folder):
    with pytest.raises(DatasetError, match=r"images/b\.png has the class 'Zebra', spelt 'zebra' before"):
        load_jsonl(write(folder, line(), line(file="images/b.png", absent=["Zebra"])), folder)


def test_a_file_that_is_not_there_or_empty_is_named(folder):
    with pytest.raises(DatasetError, match=r"nowhere\.jsonl: cannot be read"):
        load_jsonl(folder / "nowhere.jsonl", folder)
    with pytest.raises(DatasetError, match="holds no photo"):
        load_jsonl(write(folder, ""), folder)


def test_a_picture_of_another_size_or_none_is_named_when_opened(folder):
    (photo,) = load_jsonl(write(folder, line()), folder)
    Image.new("RGB", (WIDTH, HEIGHT + 1)).save(folder / "images/a.png")
    with pytest.raises(DatasetError, match=r"a\.png: is 9x8 upright, but is annotated as 9x7"):
        photo.open()
    (folder / "images/a.png").write_bytes(b"nothing to see")
    with pytest.raises(DatasetError, match=r"a\.png is text"):
        photo.open()


def test_instances_are_told_apart_by_value():
    assert Instance.of(0, "cat", CAT) == Instance.of(0, "cat", CAT.astype(np.uint8))
    assert Instance.of(0, "cat", CAT) != Instance.of(0, "cat", DOG)


# ---------------------------------------------------------------- COCO JSON


def plain_counts(mask_HW: np.ndarray) -> list[int]:
    """COCO's uncompressed run lengths: column by column, background first."""
    counts, value = [0], False
    for pixel in mask_HW.ravel(order="F").tolist():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return counts


def coco(**changes) -> dict:
    return {
        "images": [
            {"id": 10, "file_name": "images/a.png", "width": WIDTH, "height": HEIGHT},
            {"id": 11, "file_name": "images/b.png", "width": WIDTH, "height": HEIGHT},
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 7, "name": "dog"}, {"id": 90, "name": "zebra"}],
        "annotations": [
            {"id": 1, "image_id": 10, "category_id": 1, "segmentation": [[0, 1, 3, 1, 3, 5, 0, 5]], "iscrowd": 0},
            {"id": 2, "image_id": 10, "category_id": 7, "segmentation": coco_rle(DOG), "iscrowd": 0},
            {
                "id": 3,
                "image_id": 10,
                "category_id": 7,
                "segmentation": {"size": [HEIGHT, WIDTH], "counts": plain_counts(CAT)},
                "iscrowd": 1,
            },
        ],
        **changes,
    }


def write_coco(folder: Path, value) -> Path:
    path = folder / "instances.json"
    path.write_text(json.dumps(value))
    return path


def test_coco_polygons_and_both_rles_are_read(folder):
    full, empty = load_coco(write_coco(folder, coco()), folder)
    assert [(item.id, item.label, item.is_crowd) for item in full.instances] == [
        (1, "cat", False),
        (2, "dog", False),
        (3, "dog", True),
    ]
    np.testing.assert_array_equal(full.instances[0].mask_HW, CAT)
    np.testing.assert_array_equal(full.instances[1].mask_HW, DOG)
    np.testing.assert_array_equal(full.instances[2].mask_HW, CAT)
    assert full.absent == ("zebra",)
    assert empty.absent == ("cat", "dog", "zebra")
    assert (full.is_negative, empty.is_negative) == (False, True)


@pytest.mark.parametrize("number", range(1, 8))
def test_several_polygons_are_one_instance(folder, number):
    value = coco()
    value["annotations"] = [
        {
            "id": 1,
            "image_id": 10,
            "category_id": 1,
            "segmentation": [[x, 0, x + 1, 0, x + 1, x + 1, x, x + 1] for x in range(number)],
        }
    ]
    (instance,) = load_coco(write_coco(folder, value), folder)[0].instances
    staircase_HW = np.arange(HEIGHT)[:, None] <= np.where(np.arange(WIDTH) < number, np.arange(WIDTH), -1)
    np.testing.assert_array_equal(instance.mask_HW, staircase_HW)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("images.1.id", 10, ["images[1].id", "10", "images[0].id"]),
        ("images.0.file_name", "a/../../b.png", ["images[0].file_name", "without '..'", "a/../../b.png"]),
        ("images.0.width", "9", ["images[0].width", "'9'"]),
        ("categories.1.id", 1, ["categories[1].id", "1"]),
        ("categories.1.name", "CAT", ["categories[1].name", "'cat'"]),
        ("annotations.1.id", 1, ["annotations[1].id", "1"]),
        ("annotations.0.image_id", 12, ["annotations[0].image_id", "12", "image"]),
        ("annotations.0.category_id", 2, ["annotations[0].category_id", "2", "category"]),
        ("annotations.0.segmentation", [[0, 0, 1, 1, 2, 2, 3]], ["annotations[0].segmentation[0]"]),
        ("annotations.0.segmentation", [[0, 0, 1e9, 0, 5, 5]], ["annotations[0].segmentation[0][2]", "1000000000.0"]),
        ("annotations.0.segmentation", [[0, 0, "1", 0, 5, 5]], ["annotations[0].segmentation[0][2]", "'1'"]),
        ("annotations.0.segmentation", [[0, 0, 10**400, 0, 5, 5]], ["annotations[0].segmentation[0][2]", "10000"]),
        ("annotations.0.segmentation", [[0, 0, 1e999, 0, 5, 5]], ["annotations[0].segmentation[0][2]", "inf"]),
        ("images.0.file_name", "images/" + "a" * 300, ["images[0].file_name", "'images/aaa", "File name too long"]),
        ("annotations.1.segmentation.size", [WIDTH, HEIGHT], ["annotations[1].segmentation.size", "[9, 7]"]),
        ("annotations.2.segmentation.counts", [1, 2], ["annotations[2].segmentation", "counts adds up to 3"]),
        ("annotations.2.iscrowd", 2, ["annotations[2].iscrowd", "2"]),
    ],
)
def test_a_fault_in_coco_json_is_named(folder, path, value, named):
    record = coco()
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place = record
    for part in parents:
        place = place[part]
    place[last] = value
    with pytest.raises(DatasetError) as caught:
        load_coco(write_coco(folder, record), folder)
    for part in ["instances.json: ", *named]:
        assert part in str(caught.value), caught.value


@pytest.mark.parametrize(
    "segmentation", [None, [], [[0, 0, 5, 5]], [[]], [[0, 0, 0, 0, 0, 0]], {"size": [HEIGHT, WIDTH], "counts": [63]}]
)
def test_an_annotation_without_a_pixel_is_left_out_and_its_class_is_unsure(folder, caplog, segmentation):
    """COCO's own train2017 has such."""
    value = coco()
    value["annotations"][0]["segmentation"] = segmentation
    shown, empty = load_coco(write_coco(folder, value), folder)
    assert [instance.id for instance in shown.instances] == [2, 3]
    assert (shown.unsure, shown.absent) == (("cat",), ("zebra",))
    assert (empty.unsure, empty.absent) == ((), ("cat", "dog", "zebra"))
    assert "1 of 3 annotations cover no pixel, the first is that with id 1" in caplog.text


def test_a_photo_with_nothing_but_a_lost_mask_is_not_negative(folder):
    value = coco()
    value["annotations"].append({"id": 4, "image_id": 11, "category_id": 7, "segmentation": []})
    photo = load_coco(write_coco(folder, value), folder)[1]
    assert (photo.is_negative, photo.unsure, photo.absent) == (False, ("dog",), ("cat", "zebra"))


def test_boxes_without_masks_are_refused(folder):
    value = coco()
    for annotation in value["annotations"]:
        annotation["segmentation"] = []
    with pytest.raises(DatasetError, match=r"instances\.json: none of its 3 annotations covers a pixel"):
        load_coco(write_coco(folder, value), folder)


def test_a_polygon_that_is_not_a_number_is_refused(folder):
    text = json.dumps(coco()).replace("[[0, 1, 3,", "[[0, NaN, 3,")
    path = folder / "instances.json"
    path.write_text(text)
    with pytest.raises(DatasetError, match=r"annotations\[0\]\.segmentation\[0\]\[1\].*nan"):
        load_coco(path, folder)


@pytest.mark.parametrize(
    "polygons", [[[0, 0, 60_000, 2_000] * 20], [[0, 0, 60_000, 2_000, 0, 2_000]] * 20, [[0, 0, 60_000.5, 2_000] * 17]]
)
def test_an_outline_that_runs_across_its_picture_too_often_is_refused(folder, polygons):
    value = coco()
    value["images"][0].update(width=60_000, height=2_000)
    value["annotations"] = [{"id": 1, "image_id": 10, "category_id": 1, "segmentation": polygons}]
    with pytest.raises(
        DatasetError, match=r"instances\.json: annotations\[0\]\.segmentation has outlines of 2\d{6} .*than 2000000"
    ):
        load_coco(write_coco(folder, value), folder)


@pytest.mark.parametrize(
    ("polygons", "length"),
    [([[0, 0, 9, 0, 9, 7]], 9 + 7 + 9), ([[0, 0, 9, 0, 9, 7], [1, 1] * 30], 25 + 30), ([[0, 0, 8.5, 6, 0, 7]] * 2, 50)],
)
def test_an_outline_is_as_long_as_its_edges_and_its_corners(folder, monkeypatch, polygons, length):
    value = coco()
    value["annotations"] = [{"id": 1, "image_id": 10, "category_id": 1, "segmentation": polygons}]
    monkeypatch.setattr(dataset, "MAX_OUTLINE", length)
    assert load_coco(write_coco(folder, value), folder)[0].instances
    monkeypatch.setattr(dataset, "MAX_OUTLINE", length - 1)
    with pytest.raises(DatasetError, match=f"outlines of {length} pixels in all, more than {length - 1}"):
        load_coco(write_coco(folder, value), folder)


@pytest.mark.parametrize("field", ["images", "categories", "annotations"])
def test_a_missing_list_is_named(folder, field):
    record = coco()
    del record[field]
    with pytest.raises(DatasetError, match=rf"instances\.json: {field} is missing"):
        load_coco(write_coco(folder, record), folder)


# ---------------------------------------------------------------- PNG masks


@pytest.fixture
def png_folder(folder):
    (folder / "masks").mkdir()
    save_mask(folder, "a.cat.png", CAT)
    save_mask(folder, "a.wine glass.2.png", DOG)
    save_mask(folder, "a.wine glass.10.png", rectangle(8, 0, 9, 1))
    save_mask(folder, "a.dog.png", np.zeros_like(CAT))
    return folder


def save_mask(folder: Path, name: str, mask_HW: np.ndarray, value: int = 255) -> None:
    Image.fromarray(mask_HW.astype(np.uint8) * np.uint8(value)).save(folder / "masks" / name)


def test_a_folder_of_masks(png_folder):
    first, second = load_png_masks(png_folder)
    assert [(item.label, item.is_group) for item in first.instances] == [
        ("cat", True),
        ("wine glass", False),
        ("wine glass", False),
    ]
    np.testing.assert_array_equal(first.class_mask("cat"), CAT)
    np.testing.assert_array_equal(first.instances[1].mask_HW, DOG)
    assert (first.labelled_classes, first.absent) == (("cat", "dog", "wine glass"), ("dog",))
    assert (second.file, second.labelled_classes, second.is_negative) == ("images/b.png", (), False)


def test_a_list_of_classes_makes_the_annotation_complete(png_folder):
    (png_folder / "classes.txt").write_text("zebra\n cat \n\nwine glass\ndog\n")
    first, second = load_png_masks(png_folder)
    assert (first.labelled_classes, first.absent) == (None, ("zebra", "dog"))
    assert (second.absent, second.is_negative) == (("zebra", "cat", "wine glass", "dog"), True)


def test_stems_with_dots(png_folder):
    Image.new("RGB", (WIDTH, HEIGHT)).save(png_folder / "images" / "a.cat.jpg")
    save_mask(png_folder, "a.cat.cat.png", DOG)
    photos = {photo.file: photo for photo in load_png_masks(png_folder)}
    np.testing.assert_array_equal(photos["images/a.cat.jpg"].class_mask("cat"), DOG)
    np.testing.assert_array_equal(photos["images/a.png"].class_mask("cat"), CAT)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_any_value_but_zero_is_foreground(png_folder, mode):
    """Masks of 0 and 1, as annotation tools write them, and coloured ones."""
    grey = Image.fromarray(CAT.astype(np.uint8) * np.uint8(255 if mode == "1" else 1))
    if mode == "P":
        grey.putpalette([0, 0, 0, 128, 0, 0] + [0, 0, 0] * 254)
        image = grey
    elif mode == "RGB":
        image = Image.merge("RGB", [Image.new("L", grey.size), grey, Image.new("L", grey.size)])
    else:
        image = grey.convert(mode)
    assert image.mode == mode
    image.save(png_folder / "masks" / "a.cat.png")
    np.testing.assert_array_equal(load_png_masks(png_folder)[0].class_mask("cat"), CAT)


@pytest.mark.parametrize(
    ("name", "image", "named"),
    [
        ("c.cat.png", Image.new("L", (WIDTH, HEIGHT)), "belongs to no picture"),
        ("a.png", Image.new("L", (WIDTH, HEIGHT)), "must be named"),
        ("a.x|y.png", Image.new("L", (WIDTH, HEIGHT)), "'x|y'"),
        ("a.others.png", Image.new("L", (WIDTH, HEIGHT)), "background"),
        ("a.cat.3.png", Image.new("L", (WIDTH, HEIGHT)), "beside numbered masks of 'cat'"),
        ("b.cat.png", Image.new("L", (WIDTH + 1, HEIGHT)), "is 10x7, but its picture is 9x7"),
        ("b.cat.png", Image.new("RGBA", (WIDTH, HEIGHT)), "transparency"),
        ("b.cat.png", Image.new("I;16", (WIDTH, HEIGHT)), "16 bits"),
        ("b.cat.jpg", Image.new("L", (WIDTH, HEIGHT)), "must end in .png"),
    ],
)
def test_a_mask_that_cannot_be_used_is_named(png_folder, name, image, named):
    image.save(png_folder / "masks" / name)
    with pytest.raises(DatasetError) as caught:
        load_png_masks(png_folder)
    assert named in str(caught.value)
    assert str(png_folder) in str(caught.value)


@pytest.mark.parametrize("palette", [[255, 255, 255, 0, 0, 0], [0, 0, 0, 0, 0, 0]], ids=["inverted", "black"])
def test_a_palette_whose_colours_deny_its_numbers_is_refused(png_folder, palette):
    """One in which 0 is white and 1 is black is the mask's complement, by colour."""
    image = Image.fromarray(CAT.astype(np.uint8))
    image.putpalette(palette)
    image.save(png_folder / "masks" / "a.cat.png")
    with pytest.raises(DatasetError, match=r"a\.cat\.png: has a palette in which index 0 is not black"):
        load_png_masks(png_folder)


@pytest.mark.parametrize("name", ["a\\b.png", "a\nb.png", "a\udcff.png"])
def test_a_picture_whose_name_cannot_be_written_down_is_refused(png_folder, name):
    Image.new("RGB", (WIDTH, HEIGHT)).save(png_folder / "images" / name, "PNG")
    with pytest.raises(DatasetError, match="cannot be shown in its name: rename it"):
        load_png_masks(png_folder)


def test_a_jpeg_called_png_and_a_palette_with_a_clear_colour_are_refused(png_folder):
    Image.new("L", (WIDTH, HEIGHT)).save(png_folder / "masks" / "b.cat.png", "JPEG")
    with pytest.raises(DatasetError, match=r"b\.cat\.png: is no PNG"):
        load_png_masks(png_folder)
    Image.new("P", (WIDTH, HEIGHT)).save(png_folder / "masks" / "b.cat.png", transparency=0)
    with pytest.raises(DatasetError, match=r"b\.cat\.png: has transparency"):
        load_png_masks(png_folder)


def test_a_folder_without_pictures_or_masks_is_named(tmp_path):
    with pytest.raises(DatasetError, match="images: cannot be listed"):
        load_png_masks(tmp_path)
    (tmp_path / "images").mkdir()
    with pytest.raises(DatasetError, match="images: holds no picture"):
        load_png_masks(tmp_path)
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "images" / "a.png")
    with pytest.raises(DatasetError, match="masks: cannot be listed"):
        load_png_masks(tmp_path)


def test_a_mask_of_an_unlisted_class_is_refused(png_folder):
    (png_folder / "classes.txt").write_text("cat\n")
    with pytest.raises(DatasetError, match=r"a\.dog\.png: is of 'dog', which .*classes\.txt does not list"):
        load_png_masks(png_folder)


# ---------------------------------------------------------------- withholding


def test_the_same_pseudo_labelled_photos_are_withheld_in_any_order():
    photos = [
        Photo(f"{index}.jpg", WIDTH, HEIGHT, (Instance.of(0, label, CAT, is_pseudo=index % 2 == 0),))
        for index in range(200)
        for label in ["cat" if index < 80 else "dog" if index < 180 else "cup"]
    ]
    kept, withheld = withhold_pseudo(photos, ["cat", "dog"])
    assert [sum(photo.labels == (label,) for photo in withheld) for label in ("cat", "dog", "cup")] == [4, 5, 0]
    assert all(photo.instances[0].is_pseudo for photo in withheld)
    assert sorted(kept + withheld, key=photos.index) == photos
    again = withhold_pseudo(photos[::-1], ["dog", "cat"])[1]
    assert {photo.file for photo in again} == {photo.file for photo in withheld}
    assert withhold_pseudo(photos, ["cat", "dog"], seed=1)[1] != withheld
    assert withhold_pseudo(photos, ["cat"], share=0) == (photos, [])
    with pytest.raises(DatasetError, match="share must be from 0 to 1, got 2"):
        withhold_pseudo(photos, ["cat"], share=2)
    with pytest.raises(DatasetError, match="labels names 'bus'"):
        withhold_pseudo(photos, ["bus"])


@pytest.mark.parametrize(("num_photos", "expected"), [(1, 1), (4, 1), (14, 1), (15, 2), (25, 2), (35, 4)])
def test_a_class_of_few_pseudo_labelled_photos_has_one_withheld(num_photos, expected):
    photos = [
        Photo(f"{index}.jpg", WIDTH, HEIGHT, (Instance.of(0, "cat", CAT, is_pseudo=index < num_photos),))
        for index in range(num_photos + 10)
    ]
    withheld = withhold_pseudo(photos, ["cat"])[1]
    assert len(withheld) == expected
    assert all(photo.instances[0].is_pseudo for photo in withheld)
    assert withhold_pseudo(photos, ["cat"], share=0)[1] == []


# ---------------------------------------------------------------- the real one


def test_seg_tiny_is_read_as_its_readme_says():
    if not SEG_TINY.exists():
        pytest.skip("needs ../shared/data/seg-tiny")
    train = load_jsonl(SEG_TINY / "train.jsonl", SEG_TINY)
    val = load_jsonl(SEG_TINY / "val.jsonl", SEG_TINY)
    assert (len(train), len(val)) == (858, 100)
    instances = [instance for photo in train for instance in photo.instances]
    assert [sum(item.is_pseudo is pseudo for item in instances) for pseudo in (False, True)] == [962, 635]
    assert sum(len(photo.expressions) for photo in train) == 2398
    assert (sum(len(photo.instances) for photo in val), sum(len(photo.expressions) for photo in val)) == (712, 817)
    assert sum(photo.is_negative for photo in train) == 150
    assert sum(photo.labelled_classes == ("person",) for photo in train) == 216
    assert all(photo.open().size == (photo.width, photo.height) for photo in val[:10])
    withheld = withhold_pseudo(train, ["dog", "bird"])[1]
    assert len(withheld) == 15
    # relay-seg-tiny was trained without these and is evaluated on them.
    assert (
        hashlib.sha256("\n".join(photo.file for photo in withheld).encode()).hexdigest().startswith("5fc9f66a79ca5dc8")
    )
    for text in (SEG_TINY / "val.jsonl").read_text().splitlines()[:5]:
        row = json.loads(text)
        photo = next(photo for photo in val if photo.file == row["file"])
        for item, instance in zip(row["instances"], photo.instances, strict=True):
            np.testing.assert_array_equal(from_coco_rle(item["mask"]), instance.mask_HW)
