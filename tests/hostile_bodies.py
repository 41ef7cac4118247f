"""Bodies of /v1/segmentations that must be refused with a 4xx that names the field: broken pictures and bad JSON.

Each has one thing wrong and says which field that is, so that an error about another one is seen.
"""

from __future__ import annotations

import base64
import json
from typing import Any, NamedTuple

from hostile_images import hostile_images

JSON = {"content-type": "application/json"}
_PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
GOOD_IMAGE = f"data:image/png;base64,{_PIXEL}"


class Body(NamedTuple):
    """A request that must be refused.

    Attributes:
        param: the field to blame. Its refusal may say which part of it is meant, `image.url` or `expressions.0`.
    """

    name: str
    param: str
    headers: dict[str, str]
    content: bytes

    def is_named_by(self, param: object) -> bool:
        """Whether a refusal's `param` is this body's, or a part of it."""
        return isinstance(param, str) and (param == self.param or param.startswith(f"{self.param}."))


def hostile_bodies() -> list[Body]:
    return [*_pictures_in_json(), *_pictures_uploaded(), *_bad_fields(), *_bad_json(), *_bad_forms()]


def _pictures_in_json() -> list[Body]:
    return [
        Body(f"json {name}", "image", JSON, _json(image=f"data:image/png;base64,{base64.b64encode(data).decode()}"))
        for name, data in hostile_images()
    ]


def _pictures_uploaded() -> list[Body]:
    return [
        Body(f"upload {name}", "image", *_form({"expressions": b"a"}, data)) for name, data in hostile_images()[:40]
    ]


def _bad_fields() -> list[Body]:
    values: dict[str, list[Any]] = {
        "expressions": [3, {}, [], ["x"] * 65, True],
        "expressions.0": [[[]], [None], [""], ["x" * 401], [{"text": "a"}], "", "x" * 401],
        "expressions.2": [["a", "b", 3, "d"]],
        "classes": [3, [], {}, True, ["x"] * 257],
        "classes.0": [[""], [3], ["x" * 401]],
        "classes.1": [["a|b", ""], ["a", None]],
        "everything": ["perhaps", 3, [], {}],
        "image": [
            3,
            [],
            {},
            {"url": 3},
            {"url": ""},
            {"link": "x"},
            {"url": GOOD_IMAGE, "detail": "high"},
            "x",
            "http//x",
            "javascript:alert(1)",
            "file:///x",
            "http://[::1",
            "http://127.0.0.1:99999/x",
            "http:///x",
            "data:image/png;base64,\u2603",
        ],
        "images": [[], [GOOD_IMAGE] * 9, "x", {}],
        "images.0": [[3], [{}], ["x"], [{"url": ""}]],
        "images.1": [[GOOD_IMAGE, "x"], [GOOD_IMAGE, {"url": 3}], [GOOD_IMAGE, "data:image/png;base64,AAAA"]],
        "mask_format": ["", "bmp", 3, None, ["png"], {}],
        "components": ["perhaps", 3, []],
        "grammar": ["", "auto", 3, None],
        "on_refusal": ["", "laugh", 3],
        "score": ["perhaps", []],
        "stream": ["perhaps", []],
        "refiner": ["sam", 3, [], "x" * 401],
        "temperature": [-1, 3, "hot", None, [], 1e400, float("nan")],
        "seed": ["x", 1.5, []],
        "max_tokens": [0, -1, "x", 1.5, []],
        "model": [3, [], {}, "nobody", "x" * 2000],
        "coco": ["perhaps", 3],
        "unheard_of": [1],
        "__proto__": [1],
        "str": [1],
        "ImageUrl": [1],
        "Expressions": [["a"]],
        "x" * 100: [1],
    }
    single = [
        Body(f"{param}: {name}={value!r:.40}", param, JSON, _json(**_instead_of_others(name), **{name: value}))
        for param, several in values.items()
        for name in [param.partition(".")[0]]
        for value in several
    ]
    nothing_to_look_for = [
        Body(f"nothing to look for: {fields}", "body", JSON, _json(**{"expressions": None, **fields}))
        for fields in ({}, {"everything": False}, {"classes": None})
    ]
    too_much = [
        Body("expressions and classes", "body", JSON, _json(classes=["a"])),
        Body("expressions and everything", "body", JSON, _json(everything=True)),
        Body("image and images", "body", JSON, _json(images=[GOOD_IMAGE])),
    ]
    return [*single, *nothing_to_look_for, *too_much]


def _instead_of_others(name: str) -> dict[str, None]:
    """Without the fields that exclude a field, so that only its value is wrong."""
    if name in ("classes", "everything"):
        return {"expressions": None}
    return {"image": None} if name == "images" else {}


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
        "a field without a name": b'{"": 1}',
    }
    wrong_types = ["", "text/plain", "application/xml", "image/png", "application/x-www-form-urlencoded"]
    return [
        *(Body(f"body: {name}", "body", JSON, text) for name, text in texts.items()),
        *(Body(f"content type {name!r}", "Content-Type", {"content-type": name}, _json()) for name in wrong_types),
    ]


def _bad_forms() -> list[Body]:
    head, _ = _form({"expressions": b"a"}, b"x")
    boundary = head["content-type"].partition("boundary=")[2].encode()
    good = base64.b64decode(_PIXEL)
    return [
        Body("form without a boundary", "body", {"content-type": "multipart/form-data"}, b"x"),
        Body("form of noise", "body", head, b"\0\xff" * 500),
        Body("form that is cut", "body", head, b"--" + boundary + b"\r\nContent-Disposition: form-data; na"),
        Body("form without a picture", "image", *_form({"expressions": b"a"}, None)),
        Body("form with an empty picture", "image", *_form({"expressions": b"a"}, b"")),
        Body("form with a file elsewhere", "mask", *_form({"expressions": b"a"}, good, name="mask")),
        Body("form with a field twice", "mask_format", head, _twice(boundary)),
        Body("form with a bad field", "mask_format", *_form({"expressions": b"a", "mask_format": b"bmp"}, good)),
        Body("form with an unknown field", "colour", *_form({"expressions": b"a", "colour": b"red"}, good)),
        Body("form with an empty expression", "expressions.0", *_form({"expressions": b""}, good)),
        Body("form with a bad URL", "images.0", *_form({"expressions": b"a", "images": b"x"}, good)),
        Body("form with nothing to look for", "body", *_form({}, good)),
        Body("form with a field that is no text", "expressions", *_form({"expressions": b"\xff\xfe"}, good)),
        Body("form with an expression in Latin-1", "expressions", *_form({"expressions": b"caf\xe9"}, good)),
        Body("form that ends in a picture", "body", head, _form({"expressions": b"a"}, good)[1][:-30]),
        Body("form without its last boundary", "body", head, _form({"expressions": b"a"}, good)[1][: -len("--\r\n")]),
        Body("form of nine pictures", "images", head, _pictures(boundary, good, 9)),
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


def _pictures(boundary: bytes, picture: bytes, count: int) -> bytes:
    _, one = _form({"expressions": b"a"}, picture)
    parts = one.removesuffix(b"--%s--\r\n" % boundary).partition(b"--" + boundary + b"\r\n")[2]
    words, _, file = parts.partition(b"--" + boundary + b"\r\n")
    return b"".join(b"--%s\r\n%s" % (boundary, part) for part in [words, *[file] * count]) + b"--%s--\r\n" % boundary


def _twice(boundary: bytes) -> bytes:
    part = b'--%s\r\nContent-Disposition: form-data; name="mask_format"\r\n\r\npng\r\n' % boundary
    return part + part + b"--%s--\r\n" % boundary
