"""What a segmentation request is refused for, as vLLM's API reports it: a message, a type, the field, a status."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from relay_serving.errors import RelayServingError


class RequestError(RelayServingError):
    """A request that cannot be honoured.

    Attributes:
        param: the field at fault, as the client wrote it.
        status: the HTTP status.
        retry_after: seconds after which it may work, for 429 and 503.
    """

    status = HTTPStatus.BAD_REQUEST

    def __init__(self, message: str, *, param: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.retry_after = retry_after

    @property
    def type(self) -> str:
        return self.status.phrase.title().replace(" ", "").removesuffix("Error") + "Error"

    def body(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": self.type, "param": self.param, "code": self.status.value}}


class BodyTooLargeError(RequestError):
    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE


class NotSegmentingError(RequestError):
    """The served model answers with no masks."""

    status = HTTPStatus.NOT_IMPLEMENTED


class UnknownModelError(RequestError):
    status = HTTPStatus.NOT_FOUND


class UnreachableMediaError(RequestError):
    """A picture behind a URL that cannot be fetched."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY


class BusyError(RequestError):
    status = HTTPStatus.TOO_MANY_REQUESTS


class QueryFailedError(RequestError):
    """One query came to grief through no fault of the request."""

    status = HTTPStatus.INTERNAL_SERVER_ERROR
