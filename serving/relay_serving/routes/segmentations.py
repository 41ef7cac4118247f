"""`POST /v1/segmentations`: JSON or a multipart upload in, masks out, whole or as server-sent events.

The body is read by hand, because its size is capped before it is read and a file may stand beside the fields.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import ValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from vllm.entrypoints.serve.utils.api_utils import with_cancellation

from relay_serving.schemas.segmentation import SegmentationRequest
from relay_serving.segmentation.errors import BodyTooLargeError, BusyError, NotSegmentingError, RequestError
from relay_serving.segmentation.service import (
    RETRY_AFTER_SECONDS,
    AllDone,
    Event,
    QueryDone,
    RowReady,
    SegmentationService,
)

LARGEST_BODY = 128 << 20
LARGEST_BODIES = 512 << 20  # of all requests whose pictures are not opened yet, together
LARGEST_FIELD = 1 << 20
# What makes a parsed body larger than its text: pictures hold next to none of these, and 256 classes of 400 characters
# no more than half as many.
MOST_SEPARATORS = 1 << 18
_SEPARATORS = (b",", b":", b"[", b"{")
MOST_FIELDS = 1024
MOST_FILES = 64  # read to be counted: fewer are answered
_SHOWN = 200  # characters of a value, in a message
_LISTS = ("expressions", "classes", "images")
_FILES = ("image", "images", "file")

router = APIRouter()


class _Json(JSONResponse):
    """In ASCII: half a surrogate pair, which JSON can say and UTF-8 cannot, comes back as it was said."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


class _Bodies:
    """What the bodies of an app's requests hold together until their pictures are opened, in bytes."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held = 0

    @contextlib.contextmanager
    def held(self) -> Iterator[Callable[[int], None]]:
        """Yields what takes the size of each piece of one body, and raises BusyError where there is no room for it."""
        mine = 0

        def hold(size: int) -> None:
            nonlocal mine
            if self._held + size > self._most:
                raise BusyError(
                    f"requests that are being read hold {self._held} bytes, of at most {self._most}: try again",
                    retry_after=RETRY_AFTER_SECONDS,
                )
            self._held += size
            mine += size

        try:
            yield hold
        finally:
            self._held -= mine


@router.post("/v1/segmentations", response_model=None)
async def create_segmentation(raw_request: Request) -> Response:
    """See SegmentationRequest and SegmentationResponse."""
    service: SegmentationService | None = getattr(raw_request.app.state, "segmentation", None)
    if service is None:
        raise NotSegmentingError(
            "the served model answers without masks; serve one that segments, or say its grid with --relay-segmentation"
        )
    with raw_request.app.state.segmentation_bodies.held() as hold:
        request, uploads = await _read(raw_request, hold)
        is_stream = request.stream
        events = service.events(request, uploads)
        del request, uploads  # the service lets the pictures' bytes go once they are opened
        # Waited for even by a stream, so that a request that cannot be honoured is a 4xx and not a broken stream.
        first = await _first(events, raw_request)
    if first is None:
        return Response(status_code=499)  # the client is gone
    if is_stream:
        return StreamingResponse(_as_sse(first, events), media_type="text/event-stream")
    response: Response | None = await _whole(events, raw_request)
    return response or Response(status_code=499)


@with_cancellation  # type: ignore[untyped-decorator]
async def _first(events: AsyncGenerator[Event, None], raw_request: Request) -> Event:
    return await anext(events)  # where it is cancelled, it ends the events


@with_cancellation  # type: ignore[untyped-decorator]
async def _whole(events: AsyncGenerator[Event, None], raw_request: Request) -> Response:
    try:
        async for event in events:
            if isinstance(event, AllDone):
                return _Json(event.response.model_dump(mode="json"))
    finally:
        await events.aclose()
    raise AssertionError("the service's events end with AllDone")


async def _as_sse(first: Event, events: AsyncGenerator[Event, None]) -> AsyncIterator[str]:
    try:
        yield _sse(_written(first))
        async for event in events:
            yield _sse(_written(event))
        yield "data: [DONE]\n\n"
    finally:
        await events.aclose()


def _written(event: Event) -> dict[str, Any]:
    if isinstance(event, RowReady):
        return {
            "object": "segmentation.row",
            "image_index": event.image_index,
            "query_index": event.query_index,
            "block": event.block,
            "row": event.row,
            "runs": [{"label": label, "count": count} for label, count in event.runs],
        }
    if isinstance(event, QueryDone):
        label_maps = [label_map.model_dump(mode="json") for label_map in event.label_maps]
        more = {"label_maps": label_maps} if len(label_maps) > 1 else {}
        return {
            "object": "segmentation.results",
            "results": [result.model_dump(mode="json") for result in event.results],
            "label_map": label_maps[0] if label_maps else None,
            **more,
        }
    whole = event.response.model_dump(mode="json", exclude={"results", "label_maps"})
    return {**whole, "object": "segmentation.completed"}


def _sse(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n"


# ---------------------------------------------------------------- reading the body


async def _read(raw_request: Request, hold: Callable[[int], None]) -> tuple[SegmentationRequest, list[bytes]]:
    media_type = raw_request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type not in ("application/json", "multipart/form-data"):
        raise RequestError(
            f"Content-Type must be application/json or multipart/form-data, got {media_type[:_SHOWN] or 'none'!r}",
            param="Content-Type",
        )
    body = await _capped(raw_request, hold)
    if media_type == "application/json":
        return _validated(_parsed_json(body)), []
    fields, uploads = await _read_form(raw_request, body)
    return _validated(fields), uploads


async def _capped(raw_request: Request, hold: Callable[[int], None]) -> bytes:
    """The body; refused by its declared length before a byte of it is read, and by its real one while reading.

    `hold` is told of every piece, and raises BusyError where the bodies of all requests are too much together.
    """
    declared = raw_request.headers.get("content-length", "")
    if declared.isdigit() and len(declared) < 20 and int(declared) > LARGEST_BODY:
        raise BodyTooLargeError(f"the body has {declared} bytes; at most {LARGEST_BODY} are read", param="body")
    pieces, size = [], 0
    async for piece in raw_request.stream():
        size += len(piece)
        if size > LARGEST_BODY:
            raise BodyTooLargeError(f"the body has more than {LARGEST_BODY} bytes", param="body")
        hold(len(piece))
        pieces.append(piece)
    return b"".join(pieces)


def _parsed_json(body: bytes) -> dict[str, Any]:
    if sum(body.count(separator) for separator in _SEPARATORS) > MOST_SEPARATORS:
        raise BodyTooLargeError("the body holds far more values than a request has", param="body")
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON: {error}", param="body") from error
    if not isinstance(fields, dict):
        raise RequestError(f"the body must be an object, got {type(fields).__name__}", param="body")
    return fields


async def _read_form(raw_request: Request, body: bytes) -> tuple[dict[str, Any], list[bytes]]:
    async def once() -> AsyncGenerator[bytes, None]:
        yield body

    try:
        form = await MultiPartParser(
            raw_request.headers, once(), max_files=MOST_FILES, max_fields=MOST_FIELDS, max_part_size=LARGEST_FIELD
        ).parse()
    except (MultiPartException, KeyError, ValueError) as error:
        message = getattr(error, "message", None) or str(error)
        raise RequestError(f"the multipart body cannot be read: {message}", param="body") from error
    try:
        _, options = parse_options_header(raw_request.headers["content-type"])
        if b"--" + options[b"boundary"] + b"--" not in body:  # the parser drops what is cut in silence
            raise RequestError("the multipart body is cut short: its last boundary is missing", param="body")
        return await _split_form(form, body)
    finally:
        await form.close()


async def _split_form(form: FormData, body: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """Fields as JSON would have them, and the files' bytes."""
    fields: dict[str, Any] = {}
    uploads: list[bytes] = []
    for key, value in form.multi_items():
        name = key.removesuffix("[]")
        if isinstance(value, UploadFile):
            if name not in _FILES:
                raise RequestError(f"{name}: a file must be sent as image", param=name)
            uploads.append(await value.read())
        elif not value.isascii() and value.encode("utf-8", "replace") not in body:  # read as something else in silence
            raise RequestError(f"{name} is not UTF-8", param=name)
        elif name in _LISTS:
            fields.setdefault(name, []).append(value)
        elif name in fields:
            raise RequestError(f"{name} is given twice", param=name)
        else:
            fields[name] = value
    return fields, uploads


def _validated(fields: dict[str, Any]) -> SegmentationRequest:
    unknown = next((name for name in fields if name not in SegmentationRequest.model_fields), None)
    if unknown is not None:  # said here, for pydantic would list them all
        raise RequestError(f"there is no field {unknown[:_SHOWN]!r}", param=unknown[:_SHOWN] or "body")
    try:
        return SegmentationRequest.model_validate(fields)
    except ValidationError as error:
        first = max(error.errors(include_url=False), key=lambda found: len(found["loc"]))  # the deepest of a union's
        path = [str(part) for part in first["loc"] if str(part) not in ("str", "ImageUrl", "constrained-str")]
        name = ".".join(path) or "body"
        message = first["msg"].removeprefix("Value error, ")
        raise RequestError(f"{name}: {message}{_shown(first.get('input'))}", param=name) from error


def _shown(value: object) -> str:
    if isinstance(value, str | int | float | bool) and len(str(value)) <= _SHOWN:
        return f", got {value!r}"
    return ""


def attach(app: FastAPI) -> None:
    """Add the route, and the way RequestError is reported on every route."""
    app.state.segmentation_bodies = _Bodies(LARGEST_BODIES)
    app.include_router(router)
    app.add_exception_handler(RequestError, _report)


async def _report(raw_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    return _Json(error.body(), status_code=HTTPStatus(error.status).value, headers=headers)
