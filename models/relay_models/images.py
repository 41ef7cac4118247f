"""Opening pictures that strangers send: bytes in, an upright RGB picture and its size out, or an `ImageError`.

What it promises:
    - The size is known, and within the limits, before a pixel is decoded or a decoder allocates its canvas.
    - Whatever the bytes, the answer is a picture or an `ImageError` that names the picture, the value and the limit.
    - Time and memory are bounded by the limits: where a reader in Pillow is slower than the picture is large (a
      million chunks, a tag of a million fractions), `_inspect` counts first and refuses.
    - Threads may open pictures at the same time. No setting of Pillow is changed.

What becomes of a picture:
    - EXIF (or XMP) orientation is applied; metadata that cannot be read counts as none, as in a browser.
    - Transparency (alpha, a palette's or a colour key) is composited on white. Premultiplied alpha is undone first.
    - Of an animation or a file of several pages the first frame is taken.
    - 16-bit grey is scaled to 8 bits (65535, or what the sample's bits can hold, is white), never clipped. 32-bit and
      floating samples have no agreed white: it is the smallest of 1 (floating only), 255 (likewise) and 65535 that no
      sample exceeds, else the largest sample. Black is 0, or the smallest sample where that is negative.
    - Colour profiles are ignored: CMYK, YCbCr and Lab are converted by Pillow's formulas.
    - The result carries no metadata, so whoever reads it next cannot turn it a second time.

A JPEG whose damaged data still decodes is accepted, as it is everywhere, because libjpeg says nothing of it to us. A
cut file is refused, unless somebody else in the process has set Pillow's ``LOAD_TRUNCATED_IMAGES``.
"""

from __future__ import annotations

import hashlib
import io
import math
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

# The plugins of the six formats register themselves when imported. Imported here and not by Pillow on first use, so
# that threads do not race for it and no plugin of another format is ever loaded for a stranger's bytes.
from PIL import (  # noqa: F401
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageCms,
    ImageFile,
    JpegImagePlugin,
    MpoImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from relay_models.errors import ImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
WHITE = (255, 255, 255)

ORIENTATION_TAG = 0x0112
TRANSPOSE_BY_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# What Pillow's readers spend in Python on each of these is bounded to about a second of one core.
MAX_BLOCKS = 65_536  # chunks, segments or extension blocks of a file
MAX_EXIF_BYTES = 1 << 20  # sixteen times what one JPEG segment holds
MAX_TIFF_PAGES = 1_000
MAX_TIFF_TAGS = 4_096  # of one directory
MAX_TIFF_NUMBERS = 262_144  # in all tags together: more strips than any picture within the limits needs
MAX_RUN_LENGTH_BMP = 1 << 22  # pixels, and bytes: Pillow decodes these in Python
MAX_JPEG_SCANS = 100  # encoders write about ten
MAX_JPEG_SCAN_PIXELS = 1 << 31  # each scan visits every block again: a dozen scans of the largest picture
# A Huffman-coded JPEG spends at least one bit on each block of 64 pixels, so a smaller file lies about its size.
MAX_JPEG_PIXELS_PER_BYTE = 512

# What Pillow, its codecs and NumPy raise for bytes they cannot use, found by reading the plugins and by fuzzing. All of
# it is the sender's fault here, because nothing but the bytes varies; Warning is for processes that raise warnings.
_BAD_BYTES = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    EOFError,
    NotImplementedError,
    RecursionError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    ImageCms.PyCMSError,
    Warning,
)


@dataclass(frozen=True)
class ImageLimits:
    """What a picture may be at most. The smallest picture is 1x1, and any aspect ratio is taken.

    `max_pixels` is also the bound on memory: decoding takes 8 bytes a pixel for a moment (JPEG, PNG), 12 if the picture
    is turned, 13 to 21 with alpha, 24 for floating samples.

    Attributes:
        max_bytes: of the file.
        max_pixels: width times height; the default is vLLM's own, which is also where Pillow stops by itself.
        max_side: width, and height.
    """

    max_bytes: int = 64 << 20
    max_pixels: int = 178_956_970
    max_side: int = 65_535

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value < 1:
                raise ValueError(f"{field.name} must be at least 1, got {value}")


@dataclass(frozen=True, eq=False)
class OpenedImage:
    """A picture as a person sees it.

    Attributes:
        rgb: mode RGB, upright, in its own size, without metadata.
        sha256: of the bytes it was opened from, in hex.
        format: what they were, one of `FORMATS`.
    """

    rgb: Image.Image
    sha256: str
    format: str

    @property
    def width(self) -> int:
        return self.rgb.width

    @property
    def height(self) -> int:
        return self.rgb.height


def open_image(data: bytes, *, limits: ImageLimits, name: str = "image") -> OpenedImage:
    """Decode ``data`` into an upright RGB picture.

    Args:
        data: a whole file of one of `FORMATS`.
        limits: what is taken.
        name: what errors call the picture, such as the request's field.

    Raises:
        ImageError: anything is wrong with the bytes; the message names ``name``, the value and the limit.
    """
    _silence_pillow()
    try:
        return _open(data, limits)
    except _BAD_BYTES as error:
        reason = str(error) if isinstance(error, ImageError) else f"cannot be read: {_describe(error)}"
        raise ImageError(f"{name} {reason}") from error


def squash(
    image: Image.Image, side_w: int, side_h: int, resample: Image.Resampling = Image.Resampling.BICUBIC
) -> Image.Image:
    """The whole picture in ``side_w`` x ``side_h`` pixels, aspect ratio given up: no letterbox, no crop.

    A cell (r, c) of an n x n grid over the result then covers rows [r*H/n, (r+1)*H/n) of the picture, and columns
    likewise (arXiv 2410.09855 feeds its encoders this way).

    Raises:
        ValueError: a side is below 1. ImageError, which is one: the picture is not RGB.
    """
    for name, side in (("side_w", side_w), ("side_h", side_h)):
        if side < 1:
            raise ValueError(f"{name} must be at least 1, got {side}")
    if image.mode != "RGB":
        raise ImageError(f"image must have mode RGB, got {image.mode}")
    return image.resize((side_w, side_h), resample)


def _open(data: bytes, limits: ImageLimits) -> OpenedImage:
    if not data:
        raise ImageError(f"holds 0 bytes; send a file in one of {', '.join(FORMATS)}")
    if len(data) > limits.max_bytes:
        raise ImageError(f"holds {len(data)} bytes, more than max_bytes, {limits.max_bytes}; send a smaller file")
    format_name = _format_of(data)
    if format_name is None:
        raise ImageError(f"is {_name_foreign(data)}; send one of {', '.join(FORMATS)}")

    _inspect(format_name, data, limits)
    with Image.open(io.BytesIO(data), formats=[format_name]) as image:
        _check_size(*image.size, limits)
        if format_name == "TIFF":
            _check_coverage(image)
        image.load()
        rgb = _to_rgb(image)
        transpose = TRANSPOSE_BY_ORIENTATION.get(_orientation(image))
    if transpose is not None:
        rgb = rgb.transpose(transpose)
    rgb.info = {}
    return OpenedImage(rgb, hashlib.sha256(data).hexdigest(), format_name)


def _check_size(width: int, height: int, limits: ImageLimits) -> None:
    if min(width, height) < 1:
        raise ImageError(f"is {width}x{height}; each side must be at least 1 pixel")
    if max(width, height) > limits.max_side:
        raise ImageError(f"is {width}x{height}, a side above max_side, {limits.max_side}; scale it down")
    if width * height > limits.max_pixels:
        raise ImageError(
            f"is {width}x{height}, {width * height} pixels, more than max_pixels, {limits.max_pixels}; scale it down"
        )


def _check_coverage(image: ImageFile.ImageFile) -> None:
    """Pillow leaves black what no strip or tile of a TIFF holds."""
    covered = sum(
        (right - left) * (lower - upper) for left, upper, right, lower in (tile[1] for tile in image.tile if tile[1])
    )
    if covered < image.width * image.height:
        raise ImageError(f"says it is {image.width}x{image.height}, but its strips or tiles hold {covered} pixels")


# ---------------------------------------------------------------- warnings and errors

PILLOW_MODULES = r"PIL\."
_filters_lock = threading.Lock()


def _silence_pillow() -> None:
    """Keep strangers from writing to our log: drop what Pillow warns of, for good and in every thread.

    ``warnings.catch_warnings`` swaps the filters of the whole process, so two threads in it can leave the wrong ones
    behind. A filter for Pillow alone, put in front again whenever something displaced it, is safe.
    """
    ours = [Image.DecompressionBombWarning, UserWarning]
    with _filters_lock:
        front = [category for _, _, category, module, _ in warnings.filters[:2] if _pattern(module) == PILLOW_MODULES]
        if front != ours:
            for category in reversed(ours):
                warnings.filterwarnings("ignore", category=category, module=PILLOW_MODULES)


def _pattern(module: object) -> str | None:
    return getattr(module, "pattern", None)


def _describe(error: BaseException) -> str:
    """One line, printable, without the addresses of objects."""
    if isinstance(error, UnidentifiedImageError):
        return "its header is damaged or incomplete"
    if isinstance(error, MemoryError):
        return "there is not enough memory to decode it"
    text = "".join(letter if letter.isprintable() else "?" for letter in str(error)[:200])
    return f"{text} ({type(error).__name__})" if text else type(error).__name__


# ---------------------------------------------------------------- which format

_PREFIXES = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
}

_BMP_HEADER_BYTES = (12, 40, 52, 56, 64, 108, 124)  # "BM" alone may be the start of a sentence

# For the message only, so that a person sees at once what was sent.
_FOREIGN_PREFIXES = {
    b"%PDF": "a PDF",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\xff\x0a": "JPEG XL",
    b"MM\0+": "a big-endian BigTIFF",
    b"\0\0\1\0": "an icon (ICO)",
    b"\0\0\2\0": "a cursor (CUR) or TGA",
    b"icns": "an icon (ICNS)",
    b"8BPS": "a Photoshop document (PSD)",
    b"%!PS": "PostScript (EPS)",
    b"\xc5\xd0\xd3\xc6": "PostScript (EPS)",
    b"DDS ": "a DirectDraw surface (DDS)",
    b"qoif": "QOI",
    b"SIMPLE  =": "FITS",
    b"\x59\xa6\x6a\x95": "a Sun raster",
    b"\x01\xda": "SGI",
    b"\xd7\xcd\xc6\x9a": "a Windows metafile (WMF)",
    b"PK\x03\x04": "a ZIP archive",
    b"\x1f\x8b": "gzip data",
    b"BZh": "bzip2 data",
    b"\xfd7zXZ\0": "xz data",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"\x7fELF": "a program (ELF)",
    b"MZ": "a program (EXE)",
    b"\x93NUMPY": "a NumPy array",
    b"\x1aE\xdf\xa3": "a Matroska or WebM video",
    b"OggS": "Ogg media",
    b"ID3": "MP3 audio",
    b"fLaC": "FLAC audio",
    b"SQLite format 3\0": "an SQLite database",
    b"GGUF": "a GGUF model",
    **{b"P%d" % digit + space: "a Netpbm picture" for digit in range(1, 8) for space in (b"\n", b" ", b"\r", b"\t")},
}
_FOREIGN_TEXTS = {
    "data:": "a data URL, still to be decoded",
    "http:": "the address of something, as text",
    "https:": "the address of something, as text",
    "<!doctype html": "HTML",
    "<html": "HTML",
    "<svg": "SVG",
    "<?xml": "XML",
    "{": "JSON",
    "[": "JSON",
}


def _format_of(data: bytes) -> str | None:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[:2] == b"BM" and int.from_bytes(data[14:18], "little") in _BMP_HEADER_BYTES:
        return "BMP"
    return next((name for prefix, name in _PREFIXES.items() if data.startswith(prefix)), None)


def _name_foreign(data: bytes) -> str:
    """What bytes of no accepted format seem to be, for a person to read."""
    if data[4:8] == b"ftyp":
        brand = "".join(letter if letter.isalnum() else "?" for letter in data[8:12].decode("ascii", "replace"))
        return f"AVIF, HEIC or a video (ISO media of brand {brand})"
    if data[:4] == b"RIFF":
        return "a RIFF file other than WEBP"
    for prefix, name in _FOREIGN_PREFIXES.items():
        if data.startswith(prefix):
            return name
    head = data[:1024].decode("utf-8", "ignore").lstrip("\ufeff \t\r\n").lower()
    if head and len(head) > len(data[:1024]) // 2 and "".join(head.split()).isprintable():
        if "<svg" in head:
            return "SVG"
        return next((name for start, name in _FOREIGN_TEXTS.items() if head.startswith(start)), "text")
    return f"of no known format ({len(data)} bytes beginning {data[:8].hex(' ')})"


# ---------------------------------------------------------------- counting before Pillow reads


def _inspect(format_name: str, data: bytes, limits: ImageLimits) -> None:
    """Refuse what Pillow would read without bound or fill up with black; leave to it to name what is merely broken."""
    inspectors: dict[str, Callable[[bytes, ImageLimits], None]] = {
        "JPEG": _inspect_jpeg,
        "PNG": _inspect_png,
        "WEBP": _inspect_webp,
        "GIF": _inspect_gif,
        "BMP": _inspect_bmp,
        "TIFF": _inspect_tiff,
    }
    inspectors[format_name](data, limits)


def _check_blocks(count: int) -> None:
    if count > MAX_BLOCKS:
        raise ImageError(f"holds more than {MAX_BLOCKS} chunks, segments or blocks; save it anew")


def _check_exif(num_bytes: int) -> None:
    if num_bytes > MAX_EXIF_BYTES:
        raise ImageError(f"holds {num_bytes} bytes of EXIF, more than {MAX_EXIF_BYTES}; remove its metadata")


NO_PAYLOAD = ("", "", None)
JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
JPEG_HUFFMAN_FRAMES = (0xC0, 0xC1, 0xC2)


def _inspect_jpeg(data: bytes, limits: ImageLimits) -> None:
    """Segments and stray bytes up to the first scan; EXIF, which Pillow joins segment by segment; size; scans."""
    position, blocks, exif_bytes, pixels = 2, 0, 0, 0
    while 0 <= (start := data.find(b"\xff", position)) < len(data) - 3:
        blocks += 1 + start - position  # Pillow reads stray bytes one at a time
        _check_blocks(blocks)
        marker = data[start + 1]
        length = int.from_bytes(data[start + 2 : start + 4], "big")
        if marker == 0xDA:
            break
        position = start + (1 if marker == 0xFF else 2)
        if JpegImagePlugin.MARKER.get(0xFF00 | marker, NO_PAYLOAD)[2] is not None:
            position = start + 2 + max(length, 2)
            if marker == 0xE1 and data[start + 4 : start + 10] == b"Exif\0\0":
                exif_bytes += length
            if marker == 0xED:
                blocks += length // 12  # Photoshop's resources, of at least 12 bytes each
            if marker in JPEG_FRAMES:
                pixels = max(pixels, _jpeg_frame_pixels(data, start, limits))
    _check_exif(exif_bytes)
    scans = data.count(b"\xff\xda")
    if scans > MAX_JPEG_SCANS or scans * pixels > MAX_JPEG_SCAN_PIXELS:
        raise ImageError(
            f"holds {scans} scans of {pixels} pixels, more than {MAX_JPEG_SCANS} scans or {MAX_JPEG_SCAN_PIXELS} "
            f"pixels in all of them; save it anew"
        )


def _jpeg_frame_pixels(data: bytes, start: int, limits: ImageLimits) -> int:
    """The pixels that the frame header at ``start`` promises, within the limits and what the file can hold."""
    height, width = (int.from_bytes(data[start + at : start + at + 2], "big") for at in (5, 7))
    if min(width, height) > 0:
        _check_size(width, height, limits)
    can_hold = MAX_JPEG_PIXELS_PER_BYTE * len(data)
    if width * height > can_hold and data[start + 1] in JPEG_HUFFMAN_FRAMES:
        raise ImageError(
            f"says it is {width}x{height}, but its {len(data)} bytes cannot hold more than {can_hold} pixels"
        )
    return width * height


_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def _inspect_png(data: bytes, limits: ImageLimits) -> None:
    """Chunks; EXIF; the end, and as many rows as the header promises: Pillow leaves black those that are not there."""
    row_bytes = 0
    pixel_parts: list[tuple[int, int]] = []
    for blocks, (kind, length, start) in enumerate(_chunks(data, 8, order=">"), start=1):
        _check_blocks(blocks)
        if kind == b"IHDR" and length >= 13 and start + 13 <= len(data):
            width, height, bits, colour, _, _, interlace = struct.unpack_from(">IIBBBBB", data, start)
            _check_size(width, height, limits)
            row_bytes = _png_row_bytes(width, height, bits * _PNG_CHANNELS.get(colour, 0), bool(interlace))
        elif kind == b"eXIf":
            _check_exif(length)
        elif kind == b"IDAT":
            pixel_parts.append((start, start + length))
        elif kind == b"IEND":
            break
    else:
        raise ImageError(f"is cut short or damaged: {len(data)} bytes of PNG without an end")
    _check_png_rows(data, pixel_parts, row_bytes)


def _png_row_bytes(width: int, height: int, bits: int, is_interlaced: bool) -> int:
    """Bytes of all rows, inflated: each has a filter byte in front, and starts on a byte."""
    total = 0
    for left, top, right, down in _ADAM7 if is_interlaced else ((0, 0, 1, 1),):
        columns, rows = -(-(width - left) // right), -(-(height - top) // down)
        total += rows * (1 + -(-columns * bits // 8)) if columns > 0 and rows > 0 else 0
    return total


def _check_png_rows(data: bytes, parts: list[tuple[int, int]], row_bytes: int) -> None:
    inflater, inflated = zlib.decompressobj(), 0
    view = memoryview(data)
    for start, end in parts:
        rest: bytes | memoryview = view[start:end]
        while inflated < row_bytes and not inflater.eof and len(rest):
            inflated += len(inflater.decompress(rest, 1 << 20))
            rest = inflater.unconsumed_tail
    if inflated < row_bytes:
        raise ImageError(f"says its rows hold {row_bytes} bytes, but they hold {inflated}; it is cut short or damaged")


def _inspect_webp(data: bytes, limits: ImageLimits) -> None:
    """The length, which libwebp checks without a word; the canvas, which it allocates while Pillow opens the file."""
    if len(data) < (said := 8 + int.from_bytes(data[4:8], "little")):
        raise ImageError(f"is cut short: it says it holds {said} bytes, but holds {len(data)}")
    for blocks, (kind, length, start) in enumerate(_chunks(data, 12, order="<"), start=1):
        _check_blocks(blocks)
        if kind == b"EXIF":
            _check_exif(length)
        if size := _webp_size(kind, data[start : start + 10]):
            _check_size(*size, limits)


def _webp_size(kind: bytes, payload: bytes) -> tuple[int, int] | None:
    """Width and height that a chunk declares."""
    if len(payload) < 10:
        return None
    if kind == b"VP8X":
        return 1 + int.from_bytes(payload[4:7], "little"), 1 + int.from_bytes(payload[7:10], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(payload[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 " and payload[3:6] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", payload, 6)
        return width & 0x3FFF, height & 0x3FFF
    return None


def _chunks(data: bytes, position: int, *, order: str) -> Iterator[tuple[bytes, int, int]]:
    """(type, length, start of the payload) of the chunks of a PNG (">": length first, CRC last) or a RIFF file."""
    while position + 8 <= len(data):
        if order == ">":
            length, kind = struct.unpack_from(">I4s", data, position)
            following = position + 12 + length
        else:
            kind, length = struct.unpack_from("<4sI", data, position)
            following = position + 8 + length + length % 2
        yield kind, length, position + 8
        position = following


def _inspect_gif(data: bytes, limits: ImageLimits) -> None:
    """Extension blocks and stray bytes before the first frame, each of which Pillow reads by itself; its size."""
    if len(data) < 13:
        return
    width, height = struct.unpack_from("<HH", data, 6)
    _check_size(width, height, limits)
    position = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    blocks = 0
    while position < len(data) and data[position] not in b",;":
        is_extension = data[position] == 0x21
        position += 2 if is_extension else 1
        blocks += 1
        while is_extension and position < len(data) and data[position]:
            position += 1 + data[position]
            blocks += 1
            _check_blocks(blocks)
        position += is_extension
        _check_blocks(blocks)
    if data[position : position + 1] == b"," and len(data) >= position + 9:
        left, top, frame_width, frame_height = struct.unpack_from("<HHHH", data, position + 1)
        _check_size(max(width, left + frame_width), max(height, top + frame_height), limits)


def _inspect_bmp(data: bytes, limits: ImageLimits) -> None:
    """Run-length encoding, which Pillow decodes in Python."""
    if len(data) < 34 or int.from_bytes(data[14:18], "little") < 40:
        return
    width, height = struct.unpack_from("<Ii", data, 18)
    _check_size(width, abs(height), limits)
    if data[30] not in (1, 2):
        return
    for value, unit in ((width * abs(height), "pixels"), (len(data), "bytes")):
        if value > MAX_RUN_LENGTH_BMP:
            raise ImageError(
                f"is a run-length encoded BMP of {value} {unit}, more than {MAX_RUN_LENGTH_BMP}; save it as PNG"
            )


# The integers a TIFF entry may hold inline, by type. Pillow keeps types 1, 2 and 7 as bytes; every other value becomes
# a number, one by one.
_TIFF_INTEGERS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q"}
_TIFF_BYTE_TYPES = {1, 2, 7}
_TIFF_SUB_DIRECTORIES = {34665, 34853, 40965}  # EXIF, GPS, interoperability
_TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_TILE_WIDTH, _TIFF_TILE_HEIGHT = 256, 257, 322, 323
_TIFF_BITS_PER_SAMPLE, _TIFF_COMPRESSION, _TIFF_PHOTOMETRIC, _TIFF_SAMPLES_PER_PIXEL = 258, 259, 262, 277
_TIFF_FAX = (2, 3, 4)  # libtiff writes to standard error for every damaged row of these, and goes on


class _TiffDirectories:
    """The directories of a TIFF file, classic or big, by their offsets."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.order = "<" if data[:2] == b"II" else ">"
        is_big = data[2] == 43
        self.count, self.entry, self.offset = (
            struct.Struct(self.order + code) for code in (("Q", "HHQ8s", "Q") if is_big else ("H", "HHI4s", "I"))
        )
        at = 8 if is_big else 4
        (self.first,) = self.offset.unpack_from(data, at) if len(data) >= at + self.offset.size else (0,)

    def span(self, offset: int) -> tuple[int, int, int] | None:
        """Where the entries of the directory at ``offset`` start, where those in the file end, and where all would.

        Pillow reads what is there, whatever the directory says.
        """
        start = offset + self.count.size
        if start > len(self.data):
            return None
        (num_tags,) = self.count.unpack_from(self.data, offset)
        if num_tags > MAX_TIFF_TAGS:
            raise ImageError(f"has a directory of {num_tags} tags, more than {MAX_TIFF_TAGS}; save it anew")
        num_there = min(num_tags, (len(self.data) - start) // self.entry.size)
        return start, start + num_there * self.entry.size, start + num_tags * self.entry.size

    def next(self, end: int) -> int:
        """The offset of the next page, which stands behind the entries of this one."""
        following: int = self.offset.unpack_from(self.data, end)[0]
        return following

    def entries(self, start: int, end: int) -> Iterator[tuple[int, int, int, int | None]]:
        """(tag, type, count, value); the value is None unless it is one integer that stands in the entry."""
        for tag, kind, count, inline in self.entry.iter_unpack(self.data[start:end]):
            value = None
            if count == 1 and kind in _TIFF_INTEGERS:
                code = self.order + _TIFF_INTEGERS[kind]
                if struct.calcsize(code) <= len(inline):
                    (value,) = struct.unpack_from(code, inline)
            yield tag, kind, count, value


def _inspect_tiff(data: bytes, limits: ImageLimits) -> None:
    """Pages, tags and numbers in tags; the size; a tile larger than a picture; more samples than Pillow knows."""
    directories = _TiffDirectories(data)
    pages, offset = 0, directories.first
    while offset:
        span = directories.span(offset)
        if span is None or span[2] + directories.offset.size > len(data):
            raise ImageError(f"is cut short or damaged: its directory at byte {offset} leaves its {len(data)} bytes")
        pages += 1
        if pages > MAX_TIFF_PAGES:
            raise ImageError(f"holds more than {MAX_TIFF_PAGES} pages, or they form a circle; send one page")
        offset = directories.next(span[2])

    numbers, read, unread = 0, {0}, [directories.first]
    while unread:
        offset = unread.pop()
        if offset in read or (span := directories.span(offset)) is None:
            continue
        read.add(offset)
        values: dict[int, int] = {}
        for tag, kind, count, value in directories.entries(*span[:2]):
            numbers += 0 if kind in _TIFF_BYTE_TYPES else count
            if value is not None:
                values.setdefault(tag, value)
                if tag in _TIFF_SUB_DIRECTORIES:
                    unread.append(value)
        if numbers > MAX_TIFF_NUMBERS:
            raise ImageError(f"holds {numbers} numbers in its tags, more than {MAX_TIFF_NUMBERS}; save it anew")
        if offset == directories.first:
            _check_tiff_values(values, limits)


def _check_tiff_values(values: dict[int, int], limits: ImageLimits) -> None:
    if _TIFF_WIDTH in values and _TIFF_HEIGHT in values:
        _check_size(values[_TIFF_WIDTH], values[_TIFF_HEIGHT], limits)
    if values.get(_TIFF_COMPRESSION) in _TIFF_FAX:
        raise ImageError(f"is a TIFF in fax compression {values[_TIFF_COMPRESSION]}; save it as PNG")
    samples = values.get(_TIFF_SAMPLES_PER_PIXEL, 1)
    if samples > TiffImagePlugin.MAX_SAMPLESPERPIXEL:
        raise ImageError(f"has {samples} samples per pixel, more than {TiffImagePlugin.MAX_SAMPLESPERPIXEL}")
    tile_width, tile_height = values.get(_TIFF_TILE_WIDTH, 1), values.get(_TIFF_TILE_HEIGHT, 1)
    if tile_width * tile_height > limits.max_pixels:
        raise ImageError(
            f"has tiles of {tile_width}x{tile_height}, more than max_pixels, {limits.max_pixels}; save it anew"
        )


# ---------------------------------------------------------------- pixels


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none. Asked after loading: a PNG may carry it behind its pixels."""
    try:
        orientation = image.getexif().get(ORIENTATION_TAG)
    except _BAD_BYTES:
        return 1
    return orientation if isinstance(orientation, int) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """A copy in mode RGB, with white behind whatever is transparent."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _grey_to_rgb(image)
    if not image.has_transparency_data:
        return image.copy() if image.mode == "RGB" else image.convert("RGB")
    rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    canvas = Image.new("RGB", image.size, WHITE)
    canvas.paste(rgba, mask=rgba.getchannel("A"))
    return canvas


def _grey_to_rgb(image: Image.Image) -> Image.Image:
    """Samples of more than 8 bits, scaled as the module's docstring says."""
    samples_HW = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    if image.mode.startswith("I;16"):
        bits = tags.get(_TIFF_BITS_PER_SAMPLE, (16,))[0]
        grey_HW = _table(white=(1 << bits) - 1)[samples_HW]
    else:
        grey_HW = _stretch(samples_HW)
    if tags.get(_TIFF_PHOTOMETRIC) == 0:  # white is zero, which Pillow leaves to us above 8 bits
        grey_HW = 255 - grey_HW
    if isinstance(key := image.info.get("transparency"), int):
        grey_HW = np.where(samples_HW == key, np.uint8(255), grey_HW)
    return Image.fromarray(grey_HW).convert("RGB")


def _table(*, white: int) -> npt.NDArray[np.uint8]:
    """[65536] what each 16-bit sample becomes: round(255 * sample / white), at most 255."""
    samples = np.arange(1 << 16, dtype=np.int64)
    return np.minimum((samples * 255 + white // 2) // white, 255).astype(np.uint8)


def _stretch(samples_HW: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    low, high = float(samples_HW.min()), float(samples_HW.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ImageError("holds samples that are not finite numbers")
    nominal = (1, 255, 65535) if samples_HW.dtype.kind == "f" else (65535,)
    black = min(low, 0.0)
    white = next((value for value in nominal if high <= value), high)
    scale = 255.0 / (white - black)
    return np.rint((samples_HW.astype(np.float64) - black) * scale).astype(np.uint8)
