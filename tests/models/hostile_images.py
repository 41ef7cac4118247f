"""Byte strings that a server must refuse as pictures, and odd ones that it must open. Seeded: the same on every call.

    hostile_images() -> [(id, bytes)]                  must be refused, within the default limits
    odd_images() -> [(id, bytes, width, height)]       must open, upright, in this size
    valid_images() -> [(id, bytes)]                    one plain file of each kind, to mutate

Nothing here is larger than 2 MB, so that all of it can be sent to a server in a test.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

SEED = 20_241_009
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
SOI, EOI = b"\xff\xd8", b"\xff\xd9"

Hostile = tuple[str, bytes]
Odd = tuple[str, bytes, int, int]


def hostile_images() -> list[Hostile]:
    """(id, bytes) of everything that must be refused."""
    groups = (
        _no_pictures(),
        _foreign_pictures(),
        _bare_beginnings(),
        _cut_files(),
        _too_large(),
        _bad_png(),
        _bad_jpeg(),
        _bad_gif(),
        _bad_bmp(),
        _bad_tiff(),
        _bad_webp(),
    )
    return [case for group in groups for case in group]


def odd_images() -> list[Odd]:
    """(id, bytes, width, height) of pictures that look strange and are sound; the size is the upright one."""
    groups = (_odd_sizes(), _odd_orientations(), _odd_modes(), _odd_structures())
    return [case for group in groups for case in group]


def valid_images() -> list[Hostile]:
    """(id, bytes) of one sound file of each kind, 48x32."""
    photo = picture(48, 32)
    grey16 = Image.fromarray((np.arange(48 * 32, dtype=np.uint16) * 42).reshape(32, 48))
    frames: dict[str, Any] = {"save_all": True, "append_images": [picture(48, 32, seed=2)], "duration": 80}
    return [
        ("jpeg", save(photo, "JPEG")),
        ("jpeg-progressive", save(photo, "JPEG", progressive=True, quality=90)),
        ("jpeg-grey", save(photo.convert("L"), "JPEG")),
        ("jpeg-cmyk", save(photo.convert("CMYK"), "JPEG")),
        ("jpeg-exif", save(photo, "JPEG", exif=exif(3))),
        ("jpeg-mpo", save(photo, "MPO", save_all=True, append_images=[picture(48, 32, seed=2)])),
        ("png", save(photo, "PNG")),
        ("png-rgba", save(photo.convert("RGBA"), "PNG")),
        ("png-palette", save(photo.convert("P", palette=Image.Palette.ADAPTIVE), "PNG", transparency=3)),
        ("png-16", save(grey16, "PNG")),
        ("png-1", save(photo.convert("1"), "PNG")),
        ("png-interlaced", interlaced_png(48, 32)),
        ("png-animated", save(photo, "PNG", **frames)),
        ("gif", save(photo, "GIF")),
        ("gif-animated", save(photo, "GIF", **frames)),
        ("bmp", save(photo, "BMP")),
        ("bmp-palette", save(photo.convert("P"), "BMP")),
        ("bmp-rle", run_length_bmp(48, 32)),
        ("tiff", save(photo, "TIFF")),
        ("tiff-lzw", save(photo, "TIFF", compression="tiff_lzw")),
        ("tiff-deflate", save(photo, "TIFF", compression="tiff_adobe_deflate")),
        ("tiff-jpeg", save(photo, "TIFF", compression="jpeg")),
        ("tiff-16", save(grey16, "TIFF")),
        ("tiff-packbits", save(photo.convert("1"), "TIFF", compression="packbits")),
        ("tiff-pages", save(photo, "TIFF", save_all=True, append_images=[picture(20, 10)])),
        ("webp", save(photo, "WEBP")),
        ("webp-lossless", save(photo.convert("RGBA"), "WEBP", lossless=True)),
        ("webp-animated", save(photo, "WEBP", **frames)),
    ]


# ---------------------------------------------------------------- making files


def picture(width: int, height: int, seed: int = 1) -> Image.Image:
    """A smooth RGB picture with some noise."""
    rng = np.random.default_rng(SEED + seed)
    y, x = np.mgrid[0:height, 0:width]
    planes = [(x * 255 // max(width - 1, 1)), (y * 255 // max(height - 1, 1)), (x + y) * 7 % 256]
    noisy = np.stack(planes, axis=-1) + rng.integers(-9, 10, (height, width, 3))
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def save(image: Image.Image, format_name: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


def exif(orientation: Any) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def chunk(kind: bytes, payload: bytes, *, length: int | None = None) -> bytes:
    size = len(payload) if length is None else length
    return struct.pack(">I", size) + kind + payload + struct.pack(">I", zlib.crc32(kind + payload))


def png_header(width: int, height: int, bits: int = 8, colour: int = 2, interlace: int = 0) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlace))


def png(*chunks: bytes) -> bytes:
    return PNG_MAGIC + b"".join(chunks) + chunk(b"IEND", b"")


def png_rows(width: int, height: int, *, channels: int = 3, fill: int = 90) -> bytes:
    return chunk(b"IDAT", zlib.compress((b"\0" + bytes([fill]) * width * channels) * height))


def interlaced_png(width: int, height: int) -> bytes:
    """An Adam7 greyscale PNG, which Pillow reads and does not write."""
    pixels_HW = np.asarray(picture(width, height).convert("L"))
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    rows = b""
    for top, left, down, right in passes:
        part = pixels_HW[top::down, left::right]
        if part.size:
            rows += b"".join(b"\0" + row.tobytes() for row in part)
    return png(png_header(width, height, 8, 0, 1), chunk(b"IDAT", zlib.compress(rows)))


def segment(marker: int, payload: bytes, *, length: int | None = None) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(payload) + 2 if length is None else length) + payload


def patched(data: bytes, at: int, replacement: bytes) -> bytes:
    return data[:at] + replacement + data[at + len(replacement) :]


def jpeg_of_size(width: int, height: int) -> bytes:
    """A small JPEG that says it has another size."""
    data = save(picture(16, 16), "JPEG")
    return patched(data, data.index(b"\xff\xc0") + 5, struct.pack(">HH", height, width))


def bmp_header(
    width: int, height: int, *, bits: int = 24, compression: int = 0, colours: int = 0, size: int = 40
) -> bytes:
    info = struct.pack("<IiiHHIIiiII", size, width, height, 1, bits, compression, 0, 2835, 2835, colours, 0)
    return b"BM" + struct.pack("<IHHI", 14 + len(info), 0, 0, 14 + len(info) + 4 * colours) + info


def run_length_bmp(width: int, height: int, *, bits: int = 8) -> bytes:
    palette = b"".join(bytes((index, 255 - index, 40, 0)) for index in range(256))
    row = bytes((width // 2, 17, width - width // 2, 200)) + b"\0\0"
    return bmp_header(width, height, bits=bits, compression=1, colours=256) + palette + row * height + b"\0\1"


TiffEntry = tuple[int, int, int, bytes]  # tag, type, count, the value or its offset


def short(tag: int, value: int) -> TiffEntry:
    return tag, 3, 1, struct.pack("<H", value)


def long(tag: int, value: int) -> TiffEntry:
    return tag, 4, 1, struct.pack("<I", value)


def grey_entries(width: int, height: int, *, bits: int = 8, strip: int = 8) -> list[TiffEntry]:
    return [
        long(256, width),
        long(257, height),
        short(258, bits),
        short(259, 1),
        short(262, 1),
        long(273, strip),
        short(277, 1),
        long(278, height),
        long(279, width * height * bits // 8),
    ]


def directory(entries: Sequence[TiffEntry], following: int = 0, *, num_tags: int | None = None) -> bytes:
    head = struct.pack("<H", len(entries) if num_tags is None else num_tags)
    body = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3].ljust(4, b"\0")[:4] for entry in entries)
    return head + body + struct.pack("<I", following)


def tiff(
    entries: Sequence[TiffEntry], pixels: bytes = b"", *, following: int = 0, num_tags: int | None = None
) -> bytes:
    """Little-endian: the header, the pixels from offset 8 on, one directory."""
    pixels += b"\0" * (len(pixels) % 2)
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + directory(entries, following, num_tags=num_tags)


def grey_tiff(width: int = 4, height: int = 4, *changes: TiffEntry, without: int = 0) -> bytes:
    entries = {entry[0]: entry for entry in [*grey_entries(width, height), *changes]}
    entries.pop(without, None)
    return tiff([entries[tag] for tag in sorted(entries)], bytes(range(0, 160, 10))[: width * height])


def tiff_of_pages(count: int) -> bytes:
    """One 4x4 picture, and as many directories that all show it."""
    size = len(directory(grey_entries(4, 4)))
    offsets = [24 + size * page for page in range(count)]
    pages = [directory(grey_entries(4, 4), following) for following in [*offsets[1:], 0]]
    return b"II*\0" + struct.pack("<I", 24) + bytes(range(16)) + b"".join(pages)


def riff(*chunks: tuple[bytes, bytes], size: int | None = None) -> bytes:
    body = b"WEBP" + b"".join(
        kind + struct.pack("<I", len(payload)) + payload + b"\0" * (len(payload) % 2) for kind, payload in chunks
    )
    return b"RIFF" + struct.pack("<I", len(body) if size is None else size) + body


def webp_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    chunks, position = [], 12
    while position + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, position)
        chunks.append((kind, data[position + 8 : position + 8 + length]))
        position += 8 + length + length % 2
    return chunks


def canvas(width: int, height: int, flags: int = 0) -> tuple[bytes, bytes]:
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"VP8X", bytes((flags, 0, 0, 0)) + sides


def webp_of_canvas(width: int, height: int) -> bytes:
    """A sound animation whose one frame of 16x16 stands in the corner of a canvas."""
    frame = bytes(6) + (15).to_bytes(3, "little") * 2 + bytes((100, 0, 0, 0))
    pixels = b"".join(riff(part)[12:] for part in webp_chunks(save(picture(16, 16), "WEBP")) if part[0] == b"VP8 ")
    return riff(canvas(width, height, 2), (b"ANIM", bytes(6)), (b"ANMF", frame + pixels))


# ---------------------------------------------------------------- hostile


def _no_pictures() -> Iterator[Hostile]:
    rng = random.Random(SEED)
    photo = save(picture(48, 32), "PNG")
    svg = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><script>alert(1)</script></svg>'
    yield "empty", b""
    yield "one-byte", b"\x89"
    yield "newline", b"\n"
    yield "zeros", bytes(1000)
    yield "ones", b"\xff" * 1000
    for size in (2, 7, 64, 1000, 30_000):
        yield f"random-{size}", rng.randbytes(size)
    yield "text", b"A cat sits on a mat, and no picture of it is here. " * 20
    yield "text-bm", b"BMW is a maker of cars, and this is a sentence."
    yield "text-utf16", "no picture at all".encode("utf-16")
    yield "html", b"<!DOCTYPE html><html><body><img src='cat.png'></body></html>"
    yield "html-404", b"\r\n<html><head><title>404 Not Found</title></head></html>"
    yield "svg", svg.encode()
    yield "svg-xml", b"<?xml version='1.0'?>\n" + svg.encode()
    yield "svg-bom", b"\xef\xbb\xbf" + svg.encode()
    yield "svg-gzip", gzip.compress(svg.encode(), mtime=0)
    yield "xml-entities", b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "cc"><!ENTITY d "&b;&b;">]><a>&d;</a>'
    yield "json", json.dumps({"image": "cat.png"}).encode()
    yield "base64", base64.b64encode(photo)
    yield "data-url", b"data:image/png;base64," + base64.b64encode(photo)
    yield "address", b"https://example.com/cat.png"
    yield "hex", photo.hex().encode()
    yield "shell", b"#!/bin/sh\nexit 1\n"
    yield "newline-before", b"\n" + photo
    yield "png-as-text-mode", photo.replace(b"\r\n", b"\n")
    yield "reversed", photo[::-1]


def _foreign_pictures() -> Iterator[Hostile]:
    photo = picture(48, 32)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as writer:
        writer.writestr(zipfile.ZipInfo("cat.png"), save(photo, "PNG"))
    yield "zip", archive.getvalue()
    for format_name in (
        "ICO",
        "ICNS",
        "PPM",
        "TGA",
        "PCX",
        "SGI",
        "JPEG2000",
        "DDS",
        "EPS",
        "DIB",
        "SPIDER",
        "QOI",
    ):
        image = photo.convert("F") if format_name == "SPIDER" else photo
        yield f"format-{format_name.lower()}", save(image, format_name)
    yield "format-pbm", save(photo.convert("1"), "PPM")
    yield "format-xbm", save(photo.convert("1"), "XBM")
    yield "format-msp", save(photo.convert("1"), "MSP")
    yield "format-pdf", b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF"
    yield "format-psd", b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 4, 4, 8, 3) + bytes(60)
    yield "format-cur", b"\0\0\2\0\1\0" + bytes(40)
    yield "format-fits", b"SIMPLE  =                    T".ljust(2880)
    yield "format-wmf", b"\xd7\xcd\xc6\x9a" + bytes(40)
    yield "format-avif", b"\0\0\0\x20ftypavif\0\0\0\0avifmif1miaf" + bytes(40)
    yield "format-heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40)
    yield "format-mp4", b"\0\0\0\x18ftypisom\0\0\2\0isomiso2" + bytes(40)
    yield "format-jxl", b"\xff\x0a" + bytes(40)
    yield "format-wav", b"RIFF\x24\0\0\0WAVEfmt " + bytes(28)
    yield "format-webm", b"\x1aE\xdf\xa3" + bytes(40)
    yield "format-elf", b"\x7fELF\2\1\1" + bytes(60)
    yield "format-numpy", b"\x93NUMPY\1\0v\0{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }" + bytes(60)
    yield "format-sqlite", b"SQLite format 3\0" + bytes(84)
    yield "format-big-endian-bigtiff", b"MM\0+\0\x08\0\0" + bytes(8)


def _bare_beginnings() -> Iterator[Hostile]:
    magics = {
        "jpeg": SOI + b"\xff",
        "png": PNG_MAGIC,
        "gif": b"GIF89a",
        "bmp": b"BM",
        "tiff-ii": b"II*\0",
        "tiff-mm": b"MM\0*",
        "bigtiff": b"II+\0",
        "webp": b"RIFF\x20\0\0\0WEBP",
    }
    rng = random.Random(SEED + 1)
    for name, magic in magics.items():
        yield f"magic-{name}", magic
        yield f"magic-{name}-zeros", magic + bytes(200)
        yield f"magic-{name}-random", magic + rng.randbytes(500)


def _cut_files() -> Iterator[Hostile]:
    """Each kind of file, cut where its pixels are incomplete. An animation is cut inside its first frame."""
    for name, data in valid_images():
        first_frame = (
            len(data) // 3 if name in ("jpeg-mpo", "png-animated", "gif-animated", "webp-animated") else len(data)
        )
        for percent in (15, 50, 90):
            if not (name == "tiff-pages" and percent == 90):  # there only the pixels of its second page are cut
                yield f"cut-{name}-{percent}", data[: first_frame * percent // 100]
    for name, data in valid_images():
        if name in ("jpeg", "jpeg-progressive", "png", "bmp", "webp"):
            yield f"cut-{name}-last-bytes", data[:-13]


def _too_large() -> Iterator[Hostile]:
    rows = png_rows(8, 8)
    yield "large-png", png(png_header(100_000, 100_000), rows)
    yield "large-png-2-31", png(png_header(2**31 - 1, 2**31 - 1), rows)
    yield "large-png-2-32", png(png_header(2**32 - 1, 2**32 - 1), rows)
    yield "large-png-just-above", png(png_header(65_535, 2_731, 1, 0), rows)
    yield "large-png-side", png(png_header(65_536, 1, 1, 0), rows)
    yield "large-png-side-height", png(png_header(1, 178_956_970, 1, 0), rows)
    side = 14_000  # a bomb that is no lie: 196 million pixels that really are there, in 24 kB
    yield "bomb-png", png(png_header(side, side, 1, 0), chunk(b"IDAT", zlib.compress(bytes((side // 8 + 1) * side), 9)))
    yield "large-gif", b"GIF89a\xff\xff\xff\xff\0\0\0" + save(picture(4, 4), "GIF")[13:]
    frame = b",\0\0\0\0\xff\xff\xff\xff\0\x02\x02L\x01\0;"
    yield "large-gif-frame", b"GIF89a\4\0\4\0\x80\0\0" + bytes(6) + frame
    yield "large-bmp", bmp_header(100_000, 100_000) + bytes(100)
    yield "large-bmp-top-down", bmp_header(50_000, -50_000) + bytes(100)
    yield "large-bmp-2-31", bmp_header(2**31 - 1, -(2**31)) + bytes(100)
    yield "large-tiff", grey_tiff(4, 4, long(256, 100_000), long(257, 100_000))
    yield "large-tiff-2-32", grey_tiff(4, 4, long(256, 2**32 - 1), long(257, 2**32 - 1))
    yield "large-webp-canvas", riff(canvas(2**24, 2**24, 2), (b"ANIM", bytes(6)))
    yield "large-webp-lossless", riff((b"VP8L", b"\x2f" + b"\xff" * 20))
    yield "large-webp-lossy", riff((b"VP8 ", b"\x10\0\0\x9d\x01\x2a\xff\x3f\xff\x3f" + bytes(30)))
    yield "large-webp-16383", riff(canvas(16_383, 16_383), *webp_chunks(save(picture(16, 16), "WEBP")))
    yield "large-jpeg", jpeg_of_size(65_500, 65_500)
    yield "lying-jpeg-20000", jpeg_of_size(20_000, 8_000)
    yield "lying-jpeg-4096", jpeg_of_size(4_096, 4_096)


def _bad_png() -> Iterator[Hostile]:
    header, rows, one_mb = png_header(8, 8), png_rows(8, 8), 1 << 20
    good = png(header, rows)
    yield "png-zero-width", png(png_header(0, 8), rows)
    yield "png-zero-height", png(png_header(8, 0), rows)
    yield "png-bits-3", png(png_header(8, 8, 3), rows)
    yield "png-colour-5", png(png_header(8, 8, 8, 5), rows)
    yield "png-colour-7-16", png(png_header(8, 8, 16, 7), rows)
    yield "png-short-header", png(chunk(b"IHDR", bytes(5)), rows)
    yield "png-header-crc", patched(good, 30, b"\0")
    yield "png-no-header", png(rows)
    yield "png-no-pixels", png(header)
    yield "png-header-only", PNG_MAGIC + header
    yield "png-lying-height", png(png_header(8, 4_000), rows)
    yield "png-lying-width", png(png_header(4_000, 8), rows)
    yield "png-lying-channels", png(png_header(8, 8, 16, 6), rows)
    yield "png-not-zlib", png(header, chunk(b"IDAT", b"these are no deflated rows, only a sentence" * 4))
    yield "png-broken-zlib", png(header, chunk(b"IDAT", patched(zlib.compress(bytes(200), 9), 5, b"\xff\xff\xff\xff")))
    yield "png-filter-9", png(header, chunk(b"IDAT", zlib.compress((b"\x09" + bytes(24)) * 8)))
    yield "png-chunk-length-2-32", PNG_MAGIC + header + chunk(b"IDAT", b"abc", length=2**32 - 1)
    yield "png-chunk-length-2-31", PNG_MAGIC + header + chunk(b"tEXt", b"abc", length=2**31 - 1)
    yield "png-chunk-name", PNG_MAGIC + header + chunk(b"\0\1\2\3", b"abc") + rows
    bomb = zlib.compress(bytes(2 * one_mb), 9)
    yield "png-ztxt-bomb", png(header, chunk(b"zTXt", b"a\0\0" + bomb), rows)
    yield "png-itxt-bomb", png(header, chunk(b"iTXt", b"a\0\1\0\0\0" + bomb), rows)
    just_below = zlib.compress(bytes(one_mb - 1), 9)
    many = [chunk(b"zTXt", b"a%d\0\0" % number + just_below) for number in range(66)]
    yield "png-text-66-mb", png(header, *many, rows)
    yield "png-text-66-mb-behind", png(header, rows, *many)
    yield "png-chunks-70000", png(header, chunk(b"tEXt", b"a\0") * 70_000, rows)
    yield "png-empty-pixels-70000", png(header, chunk(b"IDAT", b"") * 70_000, rows)
    yield "png-exif-large", png(header, chunk(b"eXIf", b"II*\0\x08\0\0\0" + bytes(one_mb)), rows)
    yield "png-animation-frames", png(header, chunk(b"acTL", bytes(3)), rows)
    yield (
        "png-frame-outside",
        png(
            header,
            chunk(b"acTL", struct.pack(">II", 2, 0)),
            chunk(b"fcTL", struct.pack(">5IHHBB", 0, 99, 99, 9, 9, 1, 1, 0, 0)),
            rows,
        ),
    )


def _bad_jpeg() -> Iterator[Hostile]:
    good = save(picture(48, 32), "JPEG")
    frame, scan = good.index(b"\xff\xc0"), good.index(b"\xff\xda")
    yield "jpeg-only-end", SOI + EOI
    yield "jpeg-no-frame", good[:frame] + good[frame + 19 :]
    yield "jpeg-no-scan", good[:scan] + EOI
    yield "jpeg-no-tables", SOI + good[frame : frame + 19] + good[scan:]
    yield "jpeg-zero-width", patched(good, frame + 7, b"\0\0")
    yield "jpeg-zero-height", patched(good, frame + 5, b"\0\0")
    yield "jpeg-16-bits", patched(good, frame + 4, b"\x10")
    yield "jpeg-2-components", patched(good, frame + 9, b"\x02")
    yield "jpeg-255-components", patched(good, frame + 9, b"\xff")
    yield "jpeg-sampling-0", patched(good, frame + 11, b"\x00")
    yield "jpeg-sampling-15", patched(good, frame + 11, b"\xff")
    yield "jpeg-huffman-table", patched(good, good.index(b"\xff\xc4") + 5, b"\xff" * 16)
    yield "jpeg-segment-past-end", SOI + segment(0xE0, b"JFIF\0", length=65_535) + b"\0" * 20
    yield "jpeg-marker", SOI + b"\xff\x02\0\0" + good[2:]
    yield "jpeg-junk", SOI + bytes(70_000) + good[2:]
    yield "jpeg-junk-extension", SOI + segment(0xF0, bytes(65_000)) + segment(0xF0, bytes(65_000)) + good[2:]
    yield "jpeg-fill-bytes", SOI + b"\xff" * 70_000 + good[2:]
    yield "jpeg-segments-70000", SOI + segment(0xFE, b"") * 70_000 + good[2:]
    resources = b"Photoshop 3.0\0" + (b"8BIM\x04\x04" + bytes(6)) * 5_400
    yield "jpeg-photoshop-75000", SOI + segment(0xED, resources) * 14 + good[2:]
    yield "jpeg-exif-1-mb", SOI + segment(0xE1, b"Exif\0\0" + bytes(65_000)) * 17 + good[2:]
    yield "jpeg-scans-200", good[:-2] + good[scan : scan + 14] * 200 + EOI
    large = save(Image.new("RGB", (5_000, 5_000)), "JPEG", progressive=True, quality=5)
    yield "jpeg-scans-90-of-25-megapixels", large[:-2] + large[large.rindex(b"\xff\xda") : -2] * 80 + EOI


def _bad_gif() -> Iterator[Hostile]:
    screen = b"GIF89a\4\0\4\0\x80\0\0\0\0\0\xff\xff\xff"
    pixels = b"\2\2L\1\0"
    yield "gif-zero-width", b"GIF89a\0\0\4\0\x80\0\0" + bytes(6) + b",\0\0\0\0\0\0\4\0\0" + pixels + b";"
    yield "gif-no-frame", screen + b";"
    yield "gif-no-end", screen
    yield "gif-frame-cut", screen + b",\0\0\0\0\4\0"
    yield "gif-code-size", screen + b",\0\0\0\0\4\0\4\0\0\x0d\4\xff\xff\xff\xff\0;"
    yield "gif-no-pixels", screen + b",\0\0\0\0\4\0\4\0\0\2\0;"
    frame = save(picture(48, 32), "GIF")
    at = frame.index(b",", 13 + 3 * (2 << (frame[10] & 7)))
    yield "gif-extensions-70000", frame[:at] + b"!\xfe" + b"\1a" * 70_000 + b"\0" + frame[at:]
    yield "gif-junk-70000", frame[:at] + b"x" * 70_000 + frame[at:]


def _bad_bmp() -> Iterator[Hostile]:
    yield "bmp-zero", bmp_header(0, 0) + bytes(100)
    yield "bmp-header-13", bmp_header(4, 4, size=13) + bytes(100)
    yield "bmp-header-2-32", bmp_header(4, 4, size=2**32 - 1) + bytes(100)
    yield "bmp-bits-7", bmp_header(4, 4, bits=7) + bytes(100)
    yield "bmp-compression-9", bmp_header(4, 4, compression=9) + bytes(100)
    yield "bmp-compression-jpeg", bmp_header(4, 4, compression=4) + save(picture(4, 4), "JPEG")
    yield "bmp-colours", bmp_header(4, 4, bits=8)[:46] + b"\xff\xff\xff\x7f" + bytes(100)
    yield "bmp-bitfields", bmp_header(4, 4, bits=32, compression=3) + b"\1\2\3\4" * 30
    yield "bmp-lying", bmp_header(4_000, 4_000) + bytes(100)
    yield "bmp-offset", patched(bmp_header(4, 4) + bytes(48), 10, b"\xff\xff\xff\x7f")
    yield "bmp-run-length-large", bmp_header(9_000, 9_000, bits=8, compression=1) + b"\1\1\0\0" * 9_000
    yield "bmp-run-length-4", bmp_header(60_000, 100, bits=4, compression=2) + b"\1\1\0\0" * 100
    yield "bmp-run-length-cut", run_length_bmp(48, 32)[:-60]


def _bad_tiff() -> Iterator[Hostile]:
    yield "tiff-directory-at-0", b"II*\0" + bytes(60)
    yield "tiff-directory-past-end", b"II*\0\xff\xff\xff\x7f" + bytes(60)
    yield "tiff-no-tags", tiff([])
    yield "tiff-tags-cut", tiff(grey_entries(4, 4), bytes(16), num_tags=900)
    yield "tiff-tags-65535", tiff(grey_entries(4, 4), bytes(16), num_tags=65_535) + bytes(12 * 65_535)
    circle = tiff(grey_entries(4, 4), bytes(16))
    yield "tiff-circle", circle[:-4] + struct.pack("<I", 24)
    yield "tiff-pages-1500", tiff_of_pages(1_500)
    yield "tiff-no-width", grey_tiff(without=256)
    yield "tiff-no-strips", grey_tiff(without=273)
    yield "tiff-zero-width", grey_tiff(4, 4, long(256, 0))
    yield "tiff-zero-height", grey_tiff(4, 4, long(257, 0))
    yield "tiff-width-fraction", grey_tiff(4, 4, (256, 5, 1, struct.pack("<I", 8)))
    yield "tiff-width-text", grey_tiff(4, 4, (256, 2, 4, b"4px\0"))
    yield "tiff-bits-3", grey_tiff(4, 4, short(258, 3))
    yield "tiff-bits-0", grey_tiff(4, 4, short(258, 0))
    yield "tiff-photometric-99", grey_tiff(4, 4, short(262, 99))
    yield "tiff-compression-9999", grey_tiff(4, 4, short(259, 9_999))
    yield "tiff-compression-jpeg", grey_tiff(4, 4, short(259, 7))
    yield "tiff-compression-lzw", grey_tiff(4, 4, short(259, 5))
    yield "tiff-compression-group4", grey_tiff(64, 64, short(259, 4), short(258, 1))
    for compression in ("tiff_ccitt", "group3", "group4"):
        yield f"tiff-{compression}", save(picture(48, 32).convert("1"), "TIFF", compression=compression)
    fax = save(picture(480, 900).convert("1"), "TIFF", compression="group4")
    yield "tiff-group4-damaged", fax[:500] + bytes(1_000) + fax[1_500:]
    yield "tiff-samples-65535", grey_tiff(4, 4, short(277, 65_535))
    yield "tiff-samples-2-32", grey_tiff(4, 4, long(277, 2**32 - 1))
    yield "tiff-strip-past-end", grey_tiff(4, 4, long(273, 1 << 30))
    yield "tiff-strips-missing", grey_tiff(4, 4, long(257, 4_000), long(278, 4))
    yield "tiff-strip-cut", tiff(grey_entries(400, 400), bytes(16))
    yield (
        "tiff-tiles-large",
        grey_tiff(4, 4, long(322, 65_536), long(323, 65_536), long(324, 8), long(325, 16), short(259, 8)),
    )
    yield "tiff-tiles-zero", grey_tiff(4, 4, long(322, 0), long(323, 0), long(324, 8), without=273)
    yield "tiff-numbers-2-31", grey_tiff(4, 4, (65_000, 4, 2**31, struct.pack("<I", 8)))
    fractions = bytes(1) * 8 * 100_000
    numbers = [*grey_entries(4, 4), *[(tag, 5, 100_000, struct.pack("<I", 8)) for tag in (282, 283, 65_000)]]
    yield "tiff-fractions-300000", tiff(sorted(numbers), fractions)
    inner = directory([(37_500, 5, 270_000, struct.pack("<I", 24))])
    entries = sorted([*grey_entries(4, 4), long(34_665, 24)])
    yield "tiff-exif-fractions", tiff(entries, bytes(16) + inner)
    yield "bigtiff-tags-2-63", b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 2**63) + bytes(60)
    yield "bigtiff-offset-2-63", b"II+\0\x08\0\0\0" + struct.pack("<Q", 2**63 + 5) + bytes(60)


def _bad_webp() -> Iterator[Hostile]:
    lossy, lossless = (save(picture(48, 32), "WEBP", lossless=lossless) for lossless in (False, True))
    yield "webp-no-chunks", riff()
    yield "webp-empty-chunk", riff((b"VP8 ", b""))
    yield "webp-unknown-chunk", riff((b"ABCD", bytes(40)))
    yield "webp-size-lies", lossy[:4] + struct.pack("<I", 2**32 - 10) + lossy[8:]
    yield "webp-start-code", patched(lossy, lossy.index(b"\x9d\x01\x2a"), b"\0\0\0")
    yield "webp-lossy-damage", patched(lossy, 30, b"\xff" * 12)[:60]
    yield "webp-lossless-version", patched(lossless, 24, b"\xe0")
    yield "webp-canvas-only", riff(canvas(48, 32))
    yield "webp-canvas-differs", riff(canvas(99, 99), *webp_chunks(lossy))
    yield "webp-animation-empty", riff(canvas(48, 32, 2), (b"ANIM", bytes(6)))
    yield "webp-frame-outside", riff(canvas(48, 32, 2), (b"ANIM", bytes(6)), (b"ANMF", b"\xff" * 16 + lossy[12:]))
    yield "webp-exif-large", riff(canvas(48, 32, 8), *webp_chunks(lossy), (b"EXIF", b"II*\0" + bytes(1 << 20)))
    yield "webp-chunks-70000", riff(canvas(48, 32), *[(b"ABCD", b"")] * 70_000, *webp_chunks(lossy))


# ---------------------------------------------------------------- odd


def _odd_sizes() -> Iterator[Odd]:
    for format_name in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"):
        for width, height in ((1, 1), (1, 700), (700, 1)):
            yield (
                f"size-{format_name.lower()}-{width}x{height}",
                save(picture(width, height), format_name),
                width,
                height,
            )
    yield "size-png-65535x1", png(png_header(65_535, 1, 8, 0), png_rows(65_535, 1, channels=1)), 65_535, 1
    yield "size-png-1x65535", png(png_header(1, 65_535, 8, 0), png_rows(1, 65_535, channels=1)), 1, 65_535
    yield "size-jpeg-4000x3", save(picture(4_000, 3), "JPEG"), 4_000, 3


def _odd_orientations() -> Iterator[Odd]:
    photo = picture(48, 32)
    for orientation in range(1, 9):
        width, height = (48, 32) if orientation < 5 else (32, 48)
        for format_name in ("JPEG", "PNG", "WEBP", "TIFF"):
            data = save(photo, format_name, exif=exif(orientation))
            yield f"orientation-{format_name.lower()}-{orientation}", data, width, height
    for orientation in (0, 9, 600):
        yield f"orientation-jpeg-{orientation}", save(photo, "JPEG", exif=exif(orientation)), 48, 32
    plain = save(photo, "PNG")
    tags = exif(6).tobytes()[6:]
    yield "orientation-png-behind-pixels", plain[:-12] + chunk(b"eXIf", tags) + plain[-12:], 32, 48
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="8"/></x:xmpmeta>'
    yield "orientation-jpeg-xmp", save(photo, "JPEG", xmp=xmp), 32, 48
    jpeg = save(photo, "JPEG")
    rng = random.Random(SEED + 2)
    for name, broken in (
        ("header", b"XX*\0" + bytes(20)),
        ("cut", tags[:13]),
        ("random", rng.randbytes(300)),
        ("none", b""),
    ):
        yield f"exif-broken-{name}", SOI + segment(0xE1, b"Exif\0\0" + broken) + jpeg[2:], 48, 32
        if broken:
            yield f"exif-broken-png-{name}", plain[:33] + chunk(b"eXIf", broken) + plain[33:], 48, 32
    past_end = b"II*\0\x08\0\0\0" + directory([(0x0112, 3, 9_000, struct.pack("<I", 9_999)), long(0x011A, 7)])
    yield "exif-past-end", SOI + segment(0xE1, b"Exif\0\0" + past_end) + jpeg[2:], 48, 32


def _odd_modes() -> Iterator[Odd]:
    photo = picture(48, 32)
    adaptive = photo.convert("P", palette=Image.Palette.ADAPTIVE)
    grey16_HW = (np.arange(48 * 32, dtype=np.uint16) * 42).reshape(32, 48)
    images: list[tuple[str, Image.Image, str, dict[str, Any]]] = [
        ("grey", photo.convert("L"), "PNG", {}),
        ("grey-colour-key", photo.convert("L"), "PNG", {"transparency": 9}),
        ("grey-alpha", photo.convert("LA"), "PNG", {}),
        ("rgb-colour-key", photo, "PNG", {"transparency": (9, 9, 9)}),
        ("rgba", photo.convert("RGBA"), "PNG", {}),
        ("1-bit", photo.convert("1"), "PNG", {}),
        ("palette", adaptive, "PNG", {}),
        ("palette-transparent", adaptive, "PNG", {"transparency": 3}),
        ("palette-alpha", adaptive, "PNG", {"transparency": bytes(range(256))}),
        ("palette-4-bit", photo.quantize(11), "PNG", {"bits": 4}),
        ("16-bit", Image.fromarray(grey16_HW), "PNG", {}),
        ("16-bit-colour-key", Image.fromarray(grey16_HW), "PNG", {"transparency": 42}),
        ("16-bit-tiff", Image.fromarray(grey16_HW), "TIFF", {}),
        ("16-bit-tiff-big-endian", Image.fromarray(grey16_HW.astype(">u2")), "TIFF", {}),
        ("16-bit-tiff-lzw", Image.fromarray(grey16_HW), "TIFF", {"compression": "tiff_lzw"}),
        ("32-bit-tiff", Image.fromarray(grey16_HW.astype(np.int32) * 999 - 7), "TIFF", {}),
        ("float-tiff", Image.fromarray(grey16_HW.astype(np.float32) / 65_535), "TIFF", {}),
        ("cmyk-jpeg", photo.convert("CMYK"), "JPEG", {}),
        ("cmyk-tiff", photo.convert("CMYK"), "TIFF", {}),
        ("ycbcr-tiff", photo.convert("YCbCr"), "TIFF", {}),
        ("lab-tiff", Image.new("LAB", (48, 32), (120, 130, 140)), "TIFF", {}),
        ("palette-tiff", adaptive, "TIFF", {}),
        ("palette-alpha-tiff", adaptive.convert("PA"), "TIFF", {}),
        ("alpha-webp", photo.convert("RGBA"), "WEBP", {}),
        ("palette-gif-transparent", adaptive, "GIF", {"transparency": 3}),
    ]
    for name, image, format_name, options in images:
        yield f"mode-{name}", save(image, format_name, **options), 48, 32
    for name, data in valid_images():
        yield f"valid-{name}", data, 48, 32


def _odd_structures() -> Iterator[Odd]:
    photo = picture(48, 32)
    jpeg, plain = save(photo, "JPEG"), save(photo, "PNG")
    yield "jpeg-trailing-bytes", jpeg + b"<html>" + bytes(3_000), 48, 32
    yield "png-trailing-bytes", plain + b"PK\x03\x04" + bytes(3_000), 48, 32
    yield "jpeg-fill-bytes-few", SOI + b"\xff" * 40 + jpeg[2:], 48, 32
    yield "jpeg-subsampled", save(photo, "JPEG", subsampling="4:2:0", quality=5), 48, 32
    yield "jpeg-restarts", save(photo, "JPEG", restart_marker_blocks=1), 48, 32
    yield "jpeg-large-comment", save(photo, "JPEG", comment=b"c" * 60_000), 48, 32
    yield (
        "jpeg-plain-white",
        save(Image.new("RGB", (3_000, 2_000), "white"), "JPEG", quality=1, optimize=True),
        3_000,
        2_000,
    )
    yield "png-one-byte-chunks", png(png_header(8, 8), *_one_byte_chunks(png_rows(8, 8))), 8, 8
    yield "png-text", png(png_header(8, 8), chunk(b"tEXt", b"Comment\0" + b"x" * 9_000), png_rows(8, 8)), 8, 8
    yield "png-unknown-chunk", png(png_header(8, 8), chunk(b"vpAg", bytes(9)), png_rows(8, 8)), 8, 8
    yield "png-interlaced-1x1", interlaced_png(1, 1), 1, 1
    yield "png-interlaced-3x17", interlaced_png(3, 17), 3, 17
    frames = [picture(48, 32, seed=seed) for seed in range(40)]
    for format_name in ("GIF", "PNG", "WEBP", "TIFF"):
        options: dict[str, Any] = {"save_all": True, "append_images": frames}
        yield f"frames-41-{format_name.lower()}", save(photo, format_name, **options), 48, 32
    yield "webp-frame-inside", webp_of_canvas(60, 50), 60, 50
    yield "gif-frame-inside", _gif_with_small_frame(), 60, 50
    yield "bmp-top-down", bmp_header(48, -32) + photo.tobytes(), 48, 32
    yield "bmp-run-length", run_length_bmp(48, 32), 48, 32
    yield "bmp-core-header", b"BM" + struct.pack("<IHHIIHHHH", 74, 0, 0, 26, 12, 4, 4, 1, 24) + bytes(48), 4, 4
    yield "tiff-pages-999", tiff_of_pages(999), 4, 4
    yield "tiff-12-bit", tiff(grey_entries(4, 4, bits=12), bytes(range(24))), 4, 4
    yield "tiff-many-strips", save(picture(8, 2_000), "TIFF", tiffinfo={278: 1}), 8, 2_000


def _one_byte_chunks(rows: bytes) -> Iterator[bytes]:
    for byte in rows[8:-4]:
        yield chunk(b"IDAT", bytes([byte]))


def _gif_with_small_frame() -> bytes:
    """A frame of 20x10 at (30, 25) of a screen of 60x50."""
    data = save(picture(20, 10), "GIF")
    at = data.index(b",", 13 + 3 * (2 << (data[10] & 7)))
    data = patched(data, at + 1, struct.pack("<HH", 30, 25))
    return patched(data, 6, struct.pack("<HH", 60, 50))
