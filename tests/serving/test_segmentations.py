"""/v1/segmentations on a real vLLM with a tiny random model: what it sees is noise, what it returns must be right."""

from __future__ import annotations

import base64
import io
import json
import re
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from relay_models import masks
from relay_models.text4seg.codec import decode
from relay_models.text4seg.geometry import upsample
from tiny_server import GRID, data_url, picture_bytes

pytestmark = pytest.mark.e2e

WIDTH, HEIGHT = 61, 43


def picture(width: int = WIDTH, height: int = HEIGHT, *, seed: int = 0) -> bytes:
    return picture_bytes(seed=seed, width=width, height=height)


@pytest.fixture(scope="module")
def client(segmenting_server: Any) -> Any:
    with httpx.Client(base_url=segmenting_server.url, timeout=120) as client:
        yield client


def ask(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/segmentations", json={"image": data_url(picture()), **fields})
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def mask_of(result: dict[str, Any]) -> np.ndarray:
    mask = result["mask"]
    assert mask["format"] == "coco_rle"
    return masks.from_coco_rle({"size": mask["size"], "counts": mask["counts"]})


def expected_mask(result: dict[str, Any]) -> np.ndarray:
    descriptor = decode(result["text"], height=GRID, width=GRID)
    return upsample(descriptor.mask(result["label"]), HEIGHT, WIDTH)


def test_an_expression_gets_the_mask_that_its_descriptor_says(client: httpx.Client) -> None:
    body = ask(client, expressions=["the dog"])
    (result,) = body["results"]
    assert result["status"] == "complete"
    assert result["grid"] == [GRID, GRID]
    assert result["kind"] == "semantic"
    assert (result["expression"], result["label"]) == ("the dog", "the dog")
    np.testing.assert_array_equal(mask_of(result), expected_mask(result))
    assert result["area"] == int(expected_mask(result).sum())
    assert body["images"] == [{"index": 0, "width": WIDTH, "height": HEIGHT}]
    assert body["model"] == "tiny-llava"
    assert body["usage"]["completion_tokens"] > 0


def test_every_expression_gets_a_result_in_order(client: httpx.Client) -> None:
    expressions = [f"thing number {i}, left" for i in range(6)]
    body = ask(client, expressions=expressions)
    assert [result["expression"] for result in body["results"]] == expressions
    assert {result["status"] for result in body["results"]} == {"complete"}
    for result in body["results"]:
        np.testing.assert_array_equal(mask_of(result), expected_mask(result))


def test_the_formats_agree_on_the_pixels(client: httpx.Client) -> None:
    rle, png, polygons, label_map = (
        ask(client, expressions=["the dog"], mask_format=name) for name in ("coco_rle", "png", "polygons", "label_map")
    )
    expected = mask_of(rle["results"][0])
    decoded = np.asarray(Image.open(io.BytesIO(base64.b64decode(png["results"][0]["mask"]["png"]))))
    np.testing.assert_array_equal(decoded > 0, expected > 0)
    assert polygons["results"][0]["mask"]["lossy"] is True
    (whole,) = label_map["label_maps"]
    values = np.asarray(Image.open(io.BytesIO(base64.b64decode(whole["png"]))))
    np.testing.assert_array_equal(values == whole["labels"].index("the dog"), expected > 0)


def test_classes_get_a_result_each_and_nothing_else(client: httpx.Client) -> None:
    body = ask(client, classes=["sky", "grass", "zebra"])
    assert [result["label"] for result in body["results"]] == ["sky", "grass", "zebra"]
    covered = sum(mask_of(result).astype(int) for result in body["results"])
    assert covered.max() <= 1
    for result in body["results"]:
        np.testing.assert_array_equal(mask_of(result), expected_mask(result))


def test_everything_names_what_it_finds(client: httpx.Client) -> None:
    body = ask(client, everything=True)
    assert body["results"]
    for result in body["results"]:
        if not result["empty"]:
            np.testing.assert_array_equal(mask_of(result), expected_mask(result))


def test_components_cover_the_mask(client: httpx.Client) -> None:
    body = ask(client, expressions=["the dog"], components=True)
    (result,) = body["results"]
    assert sum(part["area"] for part in result["components"]) == result["area"]
    boxes = np.array([part["box"] for part in result["components"]])
    if len(boxes):
        assert result["box"] == [*boxes[:, :2].min(0), *boxes[:, 2:].max(0)]


def test_the_box_is_half_open_and_tight(client: httpx.Client) -> None:
    for seed in range(4):
        body = ask(client, image=data_url(picture(seed=seed)), expressions=["a cat"])
        (result,) = body["results"]
        mask = mask_of(result)
        if result["empty"]:
            assert not mask.any()
            assert result["box"] is None
            continue
        x0, y0, x1, y1 = result["box"]
        assert mask[y0:y1, x0:x1].sum() == mask.sum() == result["area"]
        assert mask[y0].any()
        assert mask[y1 - 1].any()
        assert mask[:, x0].any()
        assert mask[:, x1 - 1].any()


def test_an_upload_is_the_same_as_a_data_url(client: httpx.Client) -> None:
    from_url = ask(client, expressions=["the dog", "a cat"])
    answer = client.post(
        "/v1/segmentations",
        files={"image": ("photo.png", picture(), "image/png")},
        data={"expressions": ["the dog", "a cat"]},
    )
    assert answer.status_code == 200, answer.text
    uploaded = answer.json()
    assert [r["text"] for r in uploaded["results"]] == [r["text"] for r in from_url["results"]]


def test_a_turned_photo_is_segmented_upright(client: httpx.Client) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.open(io.BytesIO(picture())).save(buffer, "PNG", exif=exif)
    body = ask(client, image=data_url(buffer.getvalue()), expressions=["the dog"])
    assert body["images"] == [{"index": 0, "width": HEIGHT, "height": WIDTH}]
    assert body["results"][0]["mask"]["size"] == [WIDTH, HEIGHT]


def test_several_pictures_are_each_asked(client: httpx.Client) -> None:
    pictures = [data_url(picture(20, 10)), data_url(picture(30, 50, seed=1))]
    answer = client.post("/v1/segmentations", json={"images": pictures, "expressions": ["a", "b"]})
    body = answer.json()
    assert [(r["image_index"], r["query_index"]) for r in body["results"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [r["mask"]["size"] for r in body["results"]] == [[10, 20], [10, 20], [50, 30], [50, 30]]


def test_a_stream_tells_rows_then_results_then_the_rest(client: httpx.Client) -> None:
    whole = ask(client, expressions=["the dog"])
    fields = {"image": data_url(picture()), "expressions": ["the dog"], "stream": True}
    with client.stream("POST", "/v1/segmentations", json=fields) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    events = [json.loads(line) for line in lines[:-1]]
    rows = [event for event in events if event["object"] == "segmentation.row"]
    assert [row["row"] for row in rows] == list(range(GRID))
    assert all(sum(run["count"] for run in row["runs"]) == GRID for row in rows)
    assert [event["object"] for event in events[GRID:]] == ["segmentation.results", "segmentation.completed"]
    (result,) = events[GRID]["results"]
    assert result == whole["results"][0]
    assert events[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]


def test_a_refusal_is_forced_unless_asked_otherwise(client: httpx.Client) -> None:
    """With two tokens left for its answer the model cannot finish a descriptor: it is cut, never lost."""
    body = ask(client, expressions=["the dog"], max_tokens=200, on_refusal="return")
    assert body["results"][0]["status"] in ("complete", "truncated", "none")
    forced = ask(client, expressions=["the dog"])
    assert forced["results"][0]["status"] == "complete"


def test_an_answer_cut_short_keeps_its_rows(client: httpx.Client) -> None:
    whole = ask(client, expressions=["the dog"])["usage"]["completion_tokens"]
    (result,) = ask(client, expressions=["the dog"], max_tokens=whole - 8)["results"]
    assert result["status"] == "truncated"
    assert "truncated" in result["repairs"]
    assert result["mask"]["size"] == [HEIGHT, WIDTH]


def test_a_budget_that_may_not_suffice_is_said(client: httpx.Client) -> None:
    """The longest descriptor of one label is a checkerboard, of which a plain grid is a small part."""
    (result,) = ask(client, expressions=["the dog"], max_tokens=200)["results"]
    (warning,) = result["warnings"]
    assert re.match(r"max_tokens leaves (1\d\d|200) tokens", warning)
    most = int(re.search(r"takes (\d+)", warning).group(1))
    assert 2 * GRID * GRID < most < 8 * GRID * GRID
    (result,) = ask(client, expressions=["the dog"], max_tokens=most - 1)["results"]
    assert result["warnings"]
    (result,) = ask(client, expressions=["the dog"], max_tokens=most + 600)["results"]
    assert not result["warnings"], "room for a sentence of the model's own as well"
    (result,) = ask(client, everything=True, max_tokens=200)["results"][:1]
    assert not result["warnings"], "any label may stand there, so no longest one is known"


def test_without_the_grammar_noise_is_no_mask(client: httpx.Client) -> None:
    (result,) = ask(client, expressions=["the dog"], grammar="off", max_tokens=64)["results"]
    assert result["status"] == "none"
    assert result["mask"] is None
    assert result["answer"]


def test_the_score_is_a_probability_and_null_unless_asked(client: httpx.Client) -> None:
    assert ask(client, expressions=["the dog"])["results"][0]["score"] is None
    score = ask(client, expressions=["the dog"], score=True)["results"][0]["score"]
    assert 0 < score < 1


def test_one_bad_expression_is_an_error_of_its_own_field(client: httpx.Client) -> None:
    answer = client.post(
        "/v1/segmentations", json={"image": data_url(picture()), "expressions": ["a dog", "an <image> of it"]}
    )
    assert answer.status_code == 200, answer.text
    first, second = answer.json()["results"]
    assert first["status"] == "complete"
    assert second["status"] == "error"
    assert second["error"]["param"] == "expressions.1"
    assert "<image>" in second["error"]["message"]


def test_a_coco_export_holds_the_same_pixels(client: httpx.Client, tmp_path: Any) -> None:
    from pycocotools.coco import COCO

    body = ask(client, expressions=["the dog", "a cat", "grass"], coco=True)
    file = tmp_path / "export.json"
    file.write_text(json.dumps(body["coco"]))
    dataset = COCO(str(file))
    names = {category["id"]: category["name"] for category in dataset.dataset["categories"]}
    found = {r["label"]: mask_of(r) for r in body["results"] if not r["empty"]}
    assert {names[a["category_id"]] for a in dataset.dataset["annotations"]} == set(found)
    for annotation in dataset.dataset["annotations"]:
        mask = found[names[annotation["category_id"]]]
        np.testing.assert_array_equal(dataset.annToMask(annotation), mask)
        x0, y0, width, height = annotation["bbox"]
        assert (x0, y0, x0 + width, y0 + height) == masks.box(mask)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "body"),
        ({"expressions": []}, "expressions"),
        ({"expressions": [""]}, "expressions.0"),
        ({"expressions": ["x" * 1000]}, "expressions.0"),
        ({"expressions": ["a"], "classes": ["b"]}, "body"),
        ({"expressions": ["a"], "mask_format": "bmp"}, "mask_format"),
        ({"expressions": ["a"], "temperature": -1}, "temperature"),
        ({"expressions": ["a"], "refiner": "sam"}, "refiner"),
        ({"expressions": ["a"], "colour": "red"}, "colour"),
        ({"expressions": [1]}, "expressions.0"),
        ({"expressions": ["a"], "max_tokens": 0}, "max_tokens"),
        ({"expressions": ["a"] * 41}, "expressions"),
        ({"expressions": ["a"], "image": "ftp://example.com/a.png"}, "image"),
        ({"expressions": ["a"], "image": "file:///etc/passwd"}, "image"),
        ({"expressions": ["a"], "image": "data:image/png;base64,!!!"}, "image"),
        ({"expressions": ["a"], "image": "data:image/png,abc"}, "image"),
        ({"expressions": ["a"], "image": {"url": ""}}, "image.url"),
        ({"expressions": ["a"], "images": [], "image": None}, "images"),
        ({"expressions": ["a"], "image": None}, "image"),
    ],
)
def test_bad_fields_are_named(client: httpx.Client, fields: dict[str, Any], param: str) -> None:
    answer = client.post("/v1/segmentations", json={"image": data_url(picture()), **fields})
    assert answer.status_code in (400, 413, 422), answer.text
    error = answer.json()["error"]
    assert error["param"] == param, error
    assert error["code"] == answer.status_code


def test_an_unknown_model_is_a_404(client: httpx.Client) -> None:
    answer = client.post(
        "/v1/segmentations", json={"image": data_url(picture()), "expressions": ["a"], "model": "gpt-none"}
    )
    assert answer.status_code == 404
    assert answer.json()["error"]["param"] == "model"
    assert "gpt-none" in answer.json()["error"]["message"]
