"""Pictures of a request: fetched under vLLM's own media rules, opened once, under our limits.

Which hosts may be asked, whether redirects are followed, how long and how much is read, and which local files may be
named are vLLM's settings (`--allowed-media-domains`, `--allowed-local-media-path`, `VLLM_IMAGE_FETCH_TIMEOUT`, …).
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import requests
from PIL import Image
from vllm.exceptions import VLLMError
from vllm.multimodal.media.base import MediaIO

from relay_models.errors import ImageError
from relay_models.images import ImageLimits, open_image
from relay_serving.segmentation.errors import BodyTooLargeError, RequestError, UnreachableMediaError

LONGEST_URL = 8192  # characters, but for data URLs: as much as web servers take
_SHOWN = 64  # characters of a URL in a message
_TOLD = 400  # of what others say about it


@dataclass(frozen=True)
class Picture:
    """A picture of a request, once it has been read.

    Attributes:
        square: what the model sees of it.
        id: the same for the same bytes shown in the same way: vLLM's caches may then reuse the encoder's work.
        width, height: of the upright original, in pixels.
        view: what a refiner sees of it; None where there is none.
    """

    square: Image.Image
    id: str
    width: int
    height: int
    view: Image.Image | None = None


class PictureReader:
    """Reads pictures for one server.

    Args:
        connector: vLLM's MediaConnector with the server's settings.
        limits: what a picture may be.
        fetch_timeout: seconds.
        squash: an upright picture as the model is to see it.
        refiner_view: an upright picture as the refiner is to see it, if there is one.
    """

    def __init__(
        self,
        connector: Any,
        limits: ImageLimits,
        fetch_timeout: int,
        squash: Callable[[Image.Image], Image.Image],
        refiner_view: Callable[[Image.Image], Image.Image] | None = None,
    ) -> None:
        self._connector = connector
        self._squash = squash
        self._refiner_view = refiner_view
        self._media_io = BytesIO(limits.max_bytes)
        self._limits = limits
        self._fetch_timeout = fetch_timeout
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="relay-pictures")

    async def read_url(self, url: str, field: str) -> Picture:
        """Raises RequestError naming `field`."""
        return await self.read_bytes(await self._fetch(url, field), field)

    async def read_bytes(self, data: bytes, field: str) -> Picture:
        """Raises RequestError naming `field`."""
        if len(data) > self._limits.max_bytes:
            raise BodyTooLargeError(
                f"{field} holds {len(data)} bytes; at most {self._limits.max_bytes} are read", param=field
            )
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, self._open, data, field)
        except ImageError as error:
            raise RequestError(str(error), param=field) from error

    def _open(self, data: bytes, field: str) -> Picture:
        opened = open_image(data, limits=self._limits, name=field)
        square = self._squash(opened.rgb)
        view = None if self._refiner_view is None else self._refiner_view(opened.rgb)
        return Picture(square, f"{opened.sha256}-{square.width}x{square.height}", opened.width, opened.height, view)

    async def _fetch(self, url: str, field: str) -> bytes:
        if url[:5].lower() == "data:":
            return self._decode_data_url(url, field)
        if not url.lower().startswith(("http://", "https://", "file:")):
            raise RequestError(f"{field} must be a data, http, https or file URL, got {_shown(url)}", param=field)
        if len(url) > LONGEST_URL:
            raise RequestError(
                f"{field} is a URL of {len(url)} characters; at most {LONGEST_URL} are read: {_shown(url)}", param=field
            )
        try:
            data: bytes = await self._connector.load_from_url_async(
                url, self._media_io, fetch_timeout=self._fetch_timeout
            )
            return data
        except (RuntimeError, ValueError) as error:  # vLLM's own refusals: domains, local paths, malformed URLs
            raise RequestError(f"{field}: {str(error)[:_TOLD]}", param=field) from error
        except (VLLMError, aiohttp.ClientError, requests.RequestException, OSError) as error:
            raise UnreachableMediaError(
                f"{field}: {_shown(url)} could not be fetched: {str(error)[:_TOLD] or type(error).__name__}",
                param=field,
            ) from error

    def _decode_data_url(self, url: str, field: str) -> bytes:
        head, comma, payload = url.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise RequestError(f"{field} must be a data URL with ;base64, got {_shown(url)}", param=field)
        if len(payload) > self._limits.max_bytes * 4 // 3 + 4:
            raise BodyTooLargeError(
                f"{field} holds {len(payload)} characters of base64; at most {self._limits.max_bytes} bytes are read",
                param=field,
            )
        try:
            return base64.b64decode(payload, validate=True)
        except (binascii.Error, ValueError) as error:
            raise RequestError(f"{field} is not valid base64: {error}", param=field) from error


class BytesIO(MediaIO):  # type: ignore[misc]
    """Hands vLLM's connector's bytes out undecoded: pictures are opened once, and by us."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes

    def get_max_bytes(self) -> int:
        return self._max_bytes

    def load_bytes(self, data: bytes) -> bytes:
        return data

    def load_base64(self, media_type: str, data: str) -> bytes:
        return base64.b64decode(data, validate=True)

    def load_file(self, filepath: Path) -> bytes:
        with filepath.open("rb") as file:
            return file.read(self._max_bytes + 1)


def _shown(url: str) -> str:
    return repr(url if len(url) <= _SHOWN else f"{url[:_SHOWN]}…")
