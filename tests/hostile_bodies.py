"""Bodies of /v1/segmentations that must be refused with a 4xx that names the field: broken pictures and bad JSON."""

from __future__ import annotations

import base64
import json
from typing import Any

from hostile_images import hostile_images

Body = tuple[str, dict[str, str], bytes]
JSON = {"content-type": "application/json"}
_PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
GOOD_IMAGE = f"data:image/png;base64,{_PIXEL}"


def hostile_bodies() -> list[Body]:
    """(name, headers, content); each with something wrong, and for those with pictures nothing else."""
    return [*_pictures_in_json(), *_pictures_uploaded(), *_bad_fields(), *_bad_json(), *_bad_forms()]


def _pictures_in_json() -> list[Body]:
    return [
        (f"json {name}", JSON, _json(image=f"data:image/png;base64,{base64.b64encode(data).decode()}"))
        for name, data in hostile_images()
    ]


def _pictures_uploaded() -> list[Body]:
    return [(f"upload {name}", *_form({"expressions": b"a"}, data)) for name, data in hostile_images()[:40]]


def _bad_fields() -> list[Body]:
    values: dict[str, list[Any]] = {
        "expressions": [None, 3, {}, [], [[]], [None], [""], ["x" * 401], ["a"] * 65, [{"text": "a"}], True],
        "classes": [3, [], [""], ["a|b", ""], ["x"] * 257],
        "everything": ["perhaps", 3, [], {}],
        "image": [
            3,
            [],
            {},
            {"url": 3},
            {"url": ""},
            {"link": "x"},
            "x",
            "http//x",
            "javascript:alert(1)",
            "file:///x",
        ],
        "images": [[], [3], [{}], ["x"], [GOOD_IMAGE] * 9, "x"],
        "mask_format": ["", "bmp", 3, None, ["png"], {}],
        "components": ["perhaps", 3, []],
        "grammar": ["", "auto", 3, None],
        "on_refusal": ["", "laugh", 3],
        "score": ["perhaps", []],
        "stream": ["perhaps", []],
        "refiner": ["sam", 3, []],
        "temperature": [-1, 3, "hot", None, [], 1e400],
        "seed": ["x", 1.5, []],
        "max_tokens": [0, -1, "x", 1.5, []],
        "model": [3, [], {}],
        "coco": ["perhaps", 3],
        "unheard_of": [1],
        "__proto__": [1],
    }
    exclusive = ("expressions", "classes", "everything")
    return [
        (f"{name}={value!r:.40}", JSON, _json(**{**({"expressions": None} if name in exclusive else {}), name: value}))
        for name, several in values.items()
        for value in several
    ]


def _bad_json() -> list[Body]:
    texts = {
        "nothing": b"",
        "null": b"null",
        "a number": b"3",
        "a list": b"[]",
        "a string": b'"x"',
        "cut": b'{"image": "',
        "not UTF-8": b"\xff\xfe{",
        "deep": b"[" * 100_000,
        "deep objects": b'{"a":' * 50_000,
        "NaN": b"NaN",
        "trailing": b"{} {}",
        "a huge number": b'{"temperature": ' + b"9" * 10_000 + b"}",
        "nulls": b"\0" * 1000,
        "HTML": b"<html></html>",
    }
    wrong_types = ["", "text/plain", "application/xml", "image/png", "application/x-www-form-urlencoded"]
    return [
        *((f"body: {name}", JSON, text) for name, text in texts.items()),
        *((f"content type {name!r}", {"content-type": name}, _json()) for name in wrong_types),
    ]


def _bad_forms() -> list[Body]:
    head, _ = _form({"expressions": b"a"}, b"x")
    boundary = head["content-type"].partition("boundary=")[2].encode()
    return [
        ("form without a boundary", {"content-type": "multipart/form-data"}, b"x"),
        ("form of noise", head, b"\0\xff" * 500),
        ("form that is cut", head, b"--" + boundary + b"\r\nContent-Disposition: form-data; na"),
        ("form without a picture", *_form({"expressions": b"a"}, None)),
        ("form with an empty picture", *_form({"expressions": b"a"}, b"")),
        ("form with a file elsewhere", *_form({"expressions": b"a"}, base64.b64decode(_PIXEL), name="mask")),
        ("form with a field twice", head, _twice(boundary)),
        ("form with a bad field", *_form({"expressions": b"a", "mask_format": b"bmp"}, base64.b64decode(_PIXEL))),
        ("form with nothing to look for", *_form({}, base64.b64decode(_PIXEL))),
        ("form with a field that is no UTF-8", *_form({"expressions": b"\xff\xfe"}, base64.b64decode(_PIXEL)[:20])),
    ]


def _json(**fields: Any) -> bytes:
    whole = {"image": GOOD_IMAGE, "expressions": ["a"], **fields}
    return json.dumps({name: value for name, value in whole.items() if value is not None or name in fields}).encode()


def _form(fields: dict[str, bytes], picture: bytes | None, *, name: str = "image") -> tuple[dict[str, str], bytes]:
    boundary = b"frontier"
    parts = [
        b'--%s\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (boundary, key.encode(), value)
        for key, value in fields.items()
    ]
    if picture is not None:
        parts.append(
            b'--%s\r\nContent-Disposition: form-data; name="%s"; filename="x.png"\r\n'
            b"Content-Type: image/png\r\n\r\n%s\r\n" % (boundary, name.encode(), picture)
        )
    return {"content-type": "multipart/form-data; boundary=frontier"}, b"".join(parts) + b"--%s--\r\n" % boundary


def _twice(boundary: bytes) -> bytes:
    part = b'--%s\r\nContent-Disposition: form-data; name="mask_format"\r\n\r\npng\r\n' % boundary
    return part + part + b"--%s--\r\n" % boundary
