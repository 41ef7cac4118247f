"""Whatever bytes come, a picture as a person sees it or an `ImageError` comes out, in bounded time."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import random
import struct
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin

# The helper beside this file: pytest's importlib mode does not put test folders on the path.
sys.path.insert(0, str(Path(__file__).parent))

import hostile_images as made

from relay_models.errors import ImageError
from relay_models.images import FORMATS, ImageLimits, OpenedImage, open_image, squash

SEG_TINY = Path(__file__).parents[3] / "shared/data/seg-tiny"
LIMITS = ImageLimits()
HOSTILE = made.hostile_images()
ODD = made.odd_images()
VALID = dict(made.valid_images())
PHOTO = made.picture(48, 32)

SECONDS_AT_MOST = 2.0  # of processor time, for one hostile picture; the worst takes a quarter of a second
LINES_ON_STDERR_AT_MOST = 2  # libtiff writes a line of its own about a strip it cannot decode


def pixels(data: bytes, limits: ImageLimits = LIMITS) -> np.ndarray:
    """[H, W, 3] of an opened picture."""
    return np.asarray(open_image(data, limits=limits).rgb).astype(int)


def saved(image: Image.Image, format_name: str = "PNG", **options) -> bytes:
    return made.save(image, format_name, **options)


def grey(*samples: int | float, dtype: type = np.uint16) -> Image.Image:
    return Image.fromarray(np.array([samples], dtype=dtype))


# ---------------------------------------------------------------- refused and opened


def test_the_lists_are_long_and_every_case_has_its_name():
    assert len(HOSTILE) >= 300
    assert len(ODD) >= 140
    names = [name for name, *_ in [*HOSTILE, *ODD]]
    assert len(set(names)) == len(names)


def test_the_lists_are_the_same_on_every_call():
    assert made.hostile_images() == HOSTILE
    assert made.odd_images() == ODD


@pytest.mark.parametrize(("name", "data"), HOSTILE, ids=[name for name, _ in HOSTILE])
def test_a_hostile_picture_is_refused_by_name_soon_and_quietly(name, data, capfd):
    before = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match=r"^images\[3\] \S.*\d|^images\[3\] (is|cannot be read:) \S") as caught:
            open_image(data, limits=LIMITS, name="images[3]")
    assert time.process_time() - before < SECONDS_AT_MOST
    written = capfd.readouterr()
    assert not written.out
    assert written.err.count("\n") <= LINES_ON_STDERR_AT_MOST
    assert str(caught.value).isprintable()
    assert " object at " not in str(caught.value)


@pytest.mark.parametrize(("name", "data", "width", "height"), ODD, ids=[name for name, *_ in ODD])
def test_an_odd_picture_opens_upright_in_its_size(name, data, width, height):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = open_image(data, limits=LIMITS)
    assert (opened.width, opened.height, opened.rgb.mode) == (width, height, "RGB")
    assert opened.rgb.size == (width, height)
    assert opened.sha256 == hashlib.sha256(data).hexdigest()
    assert opened.format in FORMATS


def test_a_real_photo_opens_in_the_size_its_labels_give():
    if not SEG_TINY.exists():
        pytest.skip("needs the photos of ../shared/data/seg-tiny")
    rows = [json.loads(line) for line in (SEG_TINY / "val.jsonl").read_text().splitlines()]
    for row in rows:
        opened = open_image((SEG_TINY / row["file"]).read_bytes(), limits=LIMITS, name=row["file"])
        assert (opened.width, opened.height) == (row["width"], row["height"])
    assert len(rows) == 100


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", ["0 bytes", "JPEG, PNG, WEBP"]),
        (b"%PDF-1.7", ["a PDF", "JPEG, PNG, WEBP"]),
        (b"<svg></svg>", ["SVG"]),
        (b"\0\0\0\x18ftypheic" + bytes(9), ["HEIC", "heic"]),
        (b"\x12\x34\x56", ["12 34 56", "3 bytes"]),
        (made.png(made.png_header(40_000, 9_000)), ["40000x9000", "360000000", "max_pixels", "178956970"]),
        (made.png(made.png_header(70_000, 1)), ["70000x1", "max_side", "65535"]),
        (VALID["jpeg"][:-60], ["truncated"]),
        (VALID["png"][:-60], ["cut short", str(len(VALID["png"]) - 60)]),
        (VALID["webp"][:-60], ["cut short", str(len(VALID["webp"])), str(len(VALID["webp"]) - 60)]),
        (VALID["bmp"][:-60], ["truncated"]),
        (VALID["tiff-lzw"][:-60], ["cut short"]),
        (dict(HOSTILE)["png-lying-height"], ["100000 bytes", "200"]),
    ],
)
def test_an_error_says_what_was_wrong_with_its_value_and_the_limit(data, words):
    with pytest.raises(ImageError) as caught:
        open_image(data, limits=LIMITS, name="image 2 of the message")
    message = str(caught.value)
    assert message.startswith("image 2 of the message ")
    assert not [word for word in words if word not in message], message


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("png-chunks-70000", "more than 65536 chunks"),
        ("png-empty-pixels-70000", "more than 65536 chunks"),
        ("png-exif-large", "bytes of EXIF, more than 1048576"),
        ("png-lying-height", "says its rows hold"),
        ("jpeg-segments-70000", "more than 65536 chunks"),
        ("jpeg-fill-bytes", "more than 65536 chunks"),
        ("jpeg-junk-extension", "more than 65536 chunks"),
        ("jpeg-photoshop-75000", "more than 65536 chunks"),
        ("jpeg-exif-1-mb", "bytes of EXIF, more than 1048576"),
        ("jpeg-scans-200", "holds 201 scans"),
        ("jpeg-scans-90-of-25-megapixels", "holds 90 scans of 25000000 pixels"),
        ("lying-jpeg-4096", "says it is 4096x4096"),
        ("gif-extensions-70000", "more than 65536 chunks"),
        ("gif-junk-70000", "more than 65536 chunks"),
        ("large-gif-frame", "more than max_pixels"),
        ("bmp-run-length-large", "run-length encoded BMP of 81000000 pixels"),
        ("tiff-pages-1500", "more than 1000 pages"),
        ("tiff-circle", "more than 1000 pages"),
        ("tiff-tags-65535", "directory of 65535 tags, more than 4096"),
        ("tiff-numbers-2-31", "numbers in its tags, more than 262144"),
        ("tiff-fractions-300000", "300009 numbers in its tags"),
        ("tiff-exif-fractions", "270010 numbers in its tags"),
        ("tiff-samples-65535", "65535 samples per pixel"),
        ("tiff-tiles-large", "tiles of 65536x65536, more than max_pixels"),
        ("tiff-strips-missing", "is 4x4000, but its strips or tiles hold 16 pixels"),
        ("tiff-group4", "fax compression 4"),
        ("webp-chunks-70000", "more than 65536 chunks"),
        ("webp-exif-large", "bytes of EXIF, more than 1048576"),
        ("large-webp-16383", "is 16383x16383, 268402689 pixels"),
    ],
)
def test_what_would_take_too_long_is_refused_for_that_reason(name, words):
    with pytest.raises(ImageError) as caught:
        open_image(dict(HOSTILE)[name], limits=LIMITS)
    assert words in str(caught.value)


def test_guards_leave_room_for_what_people_send():
    """Below each count the picture opens."""
    header, rows, photo = made.png_header(8, 8), made.png_rows(8, 8), VALID["jpeg"]
    comments = made.segment(0xFE, b"") * 60_000
    for data in (
        made.png(header, made.chunk(b"tEXt", b"a\0") * 65_000, rows),
        made.png(header, made.chunk(b"eXIf", b"II*\0\x08\0\0\0" + bytes(1 << 19)), rows),
        photo[:2] + comments + photo[2:],
        photo[:2] + made.segment(0xE1, b"Exif\0\0" + bytes(65_000)) * 15 + photo[2:],
    ):
        assert open_image(data, limits=LIMITS).rgb.size in ((8, 8), (48, 32))


BMP_CORE = b"BM" + struct.pack("<IHHIIHHHH", 74, 0, 0, 26, 12, 4, 4, 1, 24) + bytes(48)
WIDTH_AT_24 = [entry if entry[0] != 256 else (256, 16, 1, struct.pack("<I", 24)) for entry in made.grey_entries(4, 4)]


@pytest.mark.parametrize(
    "data", [BMP_CORE, made.tiff(WIDTH_AT_24, bytes(16) + struct.pack("<Q", 4))], ids=["bmp", "tiff"]
)
def test_a_size_that_only_pillow_reads_is_held_to_the_limits_too(data):
    assert open_image(data, limits=ImageLimits(max_pixels=16)).rgb.size == (4, 4)
    with pytest.raises(ImageError, match="is 4x4, 16 pixels, more than max_pixels, 15"):
        open_image(data, limits=ImageLimits(max_pixels=15))


@pytest.mark.parametrize("name", ["jpeg", "jpeg-progressive", "png", "png-interlaced", "webp", "webp-lossless", "bmp"])
def test_no_beginning_of_a_file_passes_for_the_whole(name):
    data = VALID[name]
    whole = len(data) - (4 if name.startswith("png") else 0)  # the checksum of a PNG's empty last chunk says nothing
    step = max(1, whole // 400)
    for end in [*range(0, whole, step), *range(whole - 20, whole)]:
        with pytest.raises(ImageError):
            open_image(data[:end], limits=LIMITS)


# ---------------------------------------------------------------- limits


def test_limits_are_inclusive():
    data = saved(made.picture(48, 32))
    exact = ImageLimits(max_bytes=len(data), max_pixels=48 * 32, max_side=48)
    assert open_image(data, limits=exact).rgb.size == (48, 32)
    for limits, word in (
        (ImageLimits(max_bytes=len(data) - 1), "max_bytes"),
        (ImageLimits(max_pixels=48 * 32 - 1), "max_pixels"),
        (ImageLimits(max_side=47), "max_side"),
    ):
        with pytest.raises(ImageError, match=rf"\b{word}, {getattr(limits, word)}\b"):
            open_image(data, limits=limits)


@pytest.mark.parametrize("name", [name for name in VALID if "animated" not in name])
def test_every_format_keeps_to_the_limit_of_pixels(name):
    with pytest.raises(ImageError, match=r"^picture is 48x32, 1536 pixels, more than max_pixels, 1535"):
        open_image(VALID[name], limits=ImageLimits(max_pixels=1535), name="picture")


@pytest.mark.parametrize("field", ["max_bytes", "max_pixels", "max_side"])
def test_a_limit_below_one_is_an_error(field):
    with pytest.raises(ValueError, match=f"{field} must be at least 1, got 0"):
        ImageLimits(**{field: 0})


def test_the_default_limit_of_pixels_is_where_pillow_stops_too():
    assert LIMITS.max_pixels == 2 * Image.MAX_IMAGE_PIXELS


MEMORY_PROBE = """
import sys
sys.path.insert(0, {folder!r})
import hostile_images as made
from relay_models.errors import ImageError
from relay_models.images import ImageLimits, open_image
def peak_kb():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmPeak")).split()[1])
large = [data for name, data in made.hostile_images() if name.startswith(("large", "bomb", "lying"))]
canvas = made.webp_of_canvas(13_000, 13_000)
before = peak_kb()
for data, limits in [*((data, ImageLimits()) for data in large), (canvas, ImageLimits(max_pixels=1_000_000))]:
    try:
        open_image(data, limits=limits)
    except ImageError:
        continue
    raise SystemExit("opened")
print(len(large), peak_kb() - before)
"""


def test_what_is_too_large_is_refused_before_anything_is_allocated():
    if not Path("/proc/self/status").exists():
        pytest.skip("reads the peak of memory from /proc, which only Linux has")
    code = MEMORY_PROBE.format(folder=str(Path(made.__file__).parent))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    count, grown_kb = map(int, result.stdout.split())
    assert count >= 20
    assert grown_kb < 64_000  # of address space: one canvas of these would take a gigabyte


# ---------------------------------------------------------------- what becomes of a picture


UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize(("format_name", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})])
def test_a_turned_picture_is_turned_back_once(format_name, options, orientation):
    stored = np.asarray(PHOTO)
    opened = open_image(saved(PHOTO, format_name, exif=made.exif(orientation), **options), limits=LIMITS)
    np.testing.assert_array_equal(np.asarray(opened.rgb), UPRIGHT[orientation](stored))
    assert not opened.rgb.info
    assert not dict(opened.rgb.getexif())
    again = pixels(saved(opened.rgb))
    np.testing.assert_array_equal(again, np.asarray(opened.rgb))


def test_a_turned_compressed_tiff_is_turned_back_once():
    data = saved(PHOTO, "TIFF", exif=made.exif(6), compression="tiff_lzw")
    np.testing.assert_array_equal(pixels(data), UPRIGHT[6](np.asarray(PHOTO)))


def test_the_result_holds_no_file():
    opened = open_image(VALID["jpeg-exif"], limits=LIMITS)
    assert isinstance(opened, OpenedImage)
    assert not isinstance(opened.rgb, ImageFile.ImageFile)
    with pytest.raises(AttributeError):
        opened.rgb = PHOTO


def test_transparency_becomes_white():
    rgba = Image.new("RGBA", (3, 1))
    rgba.putdata([(200, 0, 0, 255), (200, 0, 0, 0), (200, 0, 0, 127)])
    np.testing.assert_allclose(pixels(saved(rgba))[0], [(200, 0, 0), (255, 255, 255), (228, 128, 128)], atol=1)
    grey_alpha = Image.new("LA", (2, 1))
    grey_alpha.putdata([(10, 255), (10, 0)])
    assert pixels(saved(grey_alpha))[0].tolist() == [[10] * 3, [255] * 3]
    assert pixels(saved(grey_alpha, "TIFF"))[0].tolist() == [[10] * 3, [255] * 3]


def test_a_palette_gives_its_colours_and_its_transparency_white():
    indexed = Image.new("P", (3, 1))
    indexed.putpalette([1, 2, 3, 40, 50, 60, 70, 80, 90])
    indexed.putdata([0, 1, 2])
    assert pixels(saved(indexed))[0].tolist() == [[1, 2, 3], [40, 50, 60], [70, 80, 90]]
    keyed = [[1, 2, 3], [255, 255, 255], [70, 80, 90]]
    assert pixels(saved(indexed, transparency=1))[0].tolist() == keyed
    assert pixels(saved(indexed, transparency=b"\xff\x00\xff"))[0].tolist() == keyed
    assert pixels(saved(indexed, "GIF", transparency=1))[0].tolist() == keyed


def test_a_colour_key_becomes_white():
    two = Image.new("RGB", (2, 1))
    two.putdata([(9, 8, 7), (9, 8, 6)])
    assert pixels(saved(two, transparency=(9, 8, 7)))[0].tolist() == [[255] * 3, [9, 8, 6]]
    assert pixels(saved(grey(9, 8, dtype=np.uint8), transparency=9))[0].tolist() == [[255] * 3, [8] * 3]
    assert pixels(saved(grey(256, 257), transparency=256))[0].tolist() == [[255] * 3, [1] * 3]


def test_one_bit_is_black_and_white():
    mask = np.array([[True, False, True]])
    for data in (saved(Image.fromarray(mask)), saved(Image.fromarray(mask), "TIFF", compression="packbits")):
        assert pixels(data)[0].tolist() == [[255] * 3, [0] * 3, [255] * 3]


@pytest.mark.parametrize("format_name", ["PNG", "TIFF"])
@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
def test_16_bit_grey_is_scaled_not_clipped(format_name, dtype):
    samples = [0, 128, 129, 257, 300, 32_768, 65_278, 65_535]
    data = saved(Image.fromarray(np.array([samples], dtype=dtype)), format_name)
    assert pixels(data)[0, :, 0].tolist() == [round(255 * sample / 65_535) for sample in samples]


def test_12_bit_grey_has_its_own_white():
    samples = [0, 1_000, 2_048, 4_095]
    packed = bytes.fromhex("".join(f"{sample:03x}" for sample in samples))
    data = made.tiff(made.grey_entries(4, 1, bits=12), packed)
    assert pixels(data)[0, :, 0].tolist() == [round(255 * sample / 4_095) for sample in samples]


@pytest.mark.parametrize(
    ("dtype", "samples", "expected"),
    [
        (np.int32, [0, 300, 65_535], [0, 1, 255]),
        (np.int32, [0, 1_000_000, 2_000_000], [0, 128, 255]),
        (np.int32, [-100, 0, 65_535], [0, 0, 255]),
        (np.int32, [7, 7, 7], [0, 0, 0]),
        (np.float32, [0.0, 0.5, 1.0], [0, 128, 255]),
        (np.float32, [0.0, 100.0, 255.0], [0, 100, 255]),
        (np.float32, [-1.0, 0.0, 1.0], [0, 128, 255]),
        (np.float32, [0.0, 0.0, 0.0], [0, 0, 0]),
    ],
)
def test_wide_samples_keep_their_range(dtype, samples, expected):
    assert pixels(saved(grey(*samples, dtype=dtype), "TIFF"))[0, :, 0].tolist() == expected


@pytest.mark.parametrize("sample", [float("nan"), float("inf"), -float("inf")])
def test_samples_that_are_no_numbers_are_refused(sample):
    with pytest.raises(ImageError, match="not finite"):
        open_image(saved(grey(0.0, sample, dtype=np.float32), "TIFF"), limits=LIMITS)


def test_white_is_zero_is_turned_around():
    entries = [entry if entry[0] != 262 else made.short(262, 0) for entry in made.grey_entries(2, 1, bits=16)]
    assert pixels(made.tiff(entries, struct.pack("<HH", 0, 65_535)))[0, :, 0].tolist() == [255, 0]


@pytest.mark.parametrize(
    ("mode", "format_name", "options", "tolerance"),
    [
        ("CMYK", "JPEG", {"quality": 98}, 8),
        ("CMYK", "TIFF", {}, 1),
        ("YCbCr", "TIFF", {}, 4),
        ("RGB", "JPEG", {"quality": 98, "subsampling": 0}, 8),
        ("RGB", "JPEG", {"quality": 98, "subsampling": 0, "progressive": True}, 8),
        ("RGB", "WEBP", {"lossless": True}, 0),
        ("RGB", "BMP", {}, 0),
        ("RGB", "TIFF", {"compression": "tiff_lzw"}, 0),
    ],
)
def test_colours_survive(mode, format_name, options, tolerance):
    y, x = np.mgrid[0:32, 0:48]
    smooth = Image.fromarray(np.stack([x * 5, y * 7, 255 - x * 5], axis=-1).astype(np.uint8))
    data = saved(smooth.convert(mode), format_name, **options)
    assert np.abs(pixels(data) - np.asarray(smooth).astype(int)).max() <= tolerance


def test_lab_becomes_rgb():
    assert pixels(saved(Image.new("LAB", (1, 1), (255, 128, 128)), "TIFF")).min() >= 254
    red = pixels(saved(Image.new("LAB", (1, 1), (136, 208, 195)), "TIFF"))[0, 0]
    assert red[0] > 240
    assert red[1:].max() < 40


@pytest.mark.parametrize(
    ("format_name", "options"), [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})]
)
def test_the_first_frame_is_taken(format_name, options):
    first, second = Image.new("RGB", (8, 6), (200, 0, 0)), Image.new("RGB", (8, 6), (0, 0, 200))
    data = saved(first, format_name, save_all=True, append_images=[second], **options)
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 2
    assert (pixels(data) == (200, 0, 0)).all()


def test_a_gif_frame_stands_where_it_says():
    opened = pixels({name: data for name, data, *_ in ODD}["gif-frame-inside"])
    inside = np.asarray(made.picture(20, 10).convert("P").convert("RGB")).astype(int)
    assert np.abs(opened[25:35, 30:50] - inside).mean() < 40
    assert len(np.unique(opened[:25].reshape(-1, 3), axis=0)) == 1


def test_interlacing_changes_nothing():
    expected = np.asarray(made.picture(13, 9).convert("L")).astype(int)
    np.testing.assert_array_equal(pixels(made.interlaced_png(13, 9))[..., 0], expected)


def test_a_run_length_bmp_is_decoded():
    opened = pixels(made.run_length_bmp(6, 2))
    assert opened[:, :3].reshape(-1, 3).tolist() == [[40, 238, 17]] * 6
    assert opened[:, 3:].reshape(-1, 3).tolist() == [[40, 55, 200]] * 6


# ---------------------------------------------------------------- the process around it


def pillow_settings() -> tuple:
    return (
        Image.MAX_IMAGE_PIXELS,
        ImageFile.LOAD_TRUNCATED_IMAGES,
        ImageFile.MAXBLOCK,
        PngImagePlugin.MAX_TEXT_CHUNK,
        PngImagePlugin.MAX_TEXT_MEMORY,
        Image.WARN_POSSIBLE_FORMATS,
        sorted(Image.OPEN),
    )


NOISY = [(name, data) for name, data, *_ in ODD if name.startswith("exif-")]


def test_pillow_does_warn_of_some_of_these():
    """Otherwise the tests of silence would prove nothing."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _, data in NOISY:
            broken = contextlib.suppress(OSError, SyntaxError, ValueError, struct.error)
            with broken, Image.open(io.BytesIO(data)) as image:
                image.load()
                dict(image.getexif())
    assert "UserWarning" in {warning.category.__name__ for warning in caught}


def test_threads_agree_with_one_another_warn_of_nothing_and_change_no_setting():
    cases = [*HOSTILE[::3], *((name, data) for name, data, *_ in ODD[::2]), *NOISY]

    def outcome(case: tuple[str, bytes]) -> str:
        try:
            return hashlib.sha256(open_image(case[1], limits=LIMITS).rgb.tobytes()).hexdigest()
        except ImageError as error:
            return str(error)

    before = pillow_settings()
    alone = [outcome(case) for case in cases]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(outcome, cases * 2))
    assert together == alone * 2
    assert not [str(warning.message) for warning in caught]
    assert pillow_settings() == before


def test_only_pillow_is_silenced():
    open_image(VALID["png"], limits=LIMITS)
    with pytest.warns(UserWarning, match="ours"):
        warnings.warn("ours", UserWarning, stacklevel=1)


def test_a_filter_of_somebody_else_does_not_stay_in_front():
    with warnings.catch_warnings(record=True) as caught:
        for _ in range(3):
            warnings.simplefilter("always")
            for _, data in NOISY:
                open_image(data, limits=LIMITS)
        assert len(warnings.filters) < 100
    assert not caught


def test_importing_it_starts_no_thread_and_loads_no_reader_of_another_format():
    code = (
        "import sys, threading; from PIL import Image; import relay_models.images; from relay_models.images import *;"
        f"open_image({VALID['tiff']!r}, limits=ImageLimits());"
        "assert threading.active_count() == 1; assert not {'EPS', 'PDF', 'WMF'} & set(Image.OPEN), sorted(Image.OPEN)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------- fuzz


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Bits flipped, bytes set, removed or repeated; mostly near the beginning, where headers are."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(min(len(changed), rng.choice((64, 400, len(changed)))))
        match rng.randrange(6):
            case 0 | 1 | 2:
                changed[at] ^= 1 << rng.randrange(8)
            case 3:
                changed[at] = rng.choice((0, 255, 127, 128))
            case 4:
                del changed[at : at + rng.randrange(1, 30)]
            case 5:
                changed[at:at] = changed[at : at + rng.randrange(40)]
        changed = changed or bytearray(1)
    return bytes(changed)


def fuzz(rounds: int, seed: int) -> tuple[int, int]:
    """How many were opened and refused; anything else is raised."""
    rng = random.Random(seed)
    limits = ImageLimits(max_pixels=1_000_000)
    files = [*VALID.values(), *(data for name, data, *_ in ODD if name.startswith(("exif", "mode")))]
    counts = [0, 0]
    for _ in range(rounds):
        try:
            opened = open_image(mutated(rng.choice(files), rng), limits=limits)
        except ImageError:
            counts[1] += 1
        else:
            assert opened.width * opened.height <= limits.max_pixels
            counts[0] += 1
    return counts[0], counts[1]


def test_damaged_files_are_opened_or_refused():
    opened, refused = fuzz(4_000, seed=1)
    assert opened > 400
    assert refused > 400


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 6))
def test_many_damaged_files_are_opened_or_refused(seed):
    opened, refused = fuzz(50_000, seed=seed)
    assert min(opened, refused) > 5_000


# ---------------------------------------------------------------- squash


@pytest.mark.parametrize(("width", "height"), [(640, 427), (1, 700), (700, 1), (1, 1), (336, 336)])
def test_squash_gives_up_the_aspect_and_crops_nothing(width, height):
    image = open_image(saved(made.picture(width, height)), limits=LIMITS).rgb
    squashed = squash(image, 336, 224)
    assert (squashed.size, squashed.mode) == ((336, 224), "RGB")
    np.testing.assert_array_equal(np.asarray(squashed), np.asarray(image.resize((336, 224), Image.Resampling.BICUBIC)))


def test_a_half_of_the_picture_stays_a_half():
    halves = Image.new("RGB", (640, 60))
    halves.paste((255, 255, 255), (320, 0, 640, 60))
    squashed = np.asarray(squash(halves, 336, 336, Image.Resampling.NEAREST))
    assert (squashed[:, :168] == 0).all()
    assert (squashed[:, 168:] == 255).all()


@pytest.mark.parametrize(("sides", "name"), [((0, 9), "side_w"), ((9, -1), "side_h")])
def test_squash_refuses_a_side_below_one(sides, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1"):
        squash(PHOTO, *sides)


def test_squash_takes_only_rgb():
    with pytest.raises(ValueError, match="RGB, got L"):
        squash(PHOTO.convert("L"), 9, 9)
