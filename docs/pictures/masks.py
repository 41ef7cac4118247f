"""Draws the masks that a running server answers with over the photos they were asked of, side by side.

    python docs/pictures/masks.py http://127.0.0.1:8000 docs/pictures/masks.png cat.png cat portrait.png person

The pictures in docs/ were made so, from photos that scikit-image brings: `chelsea` and `coffee` (CC0) and `astronaut`
(NASA, public domain).
"""

from __future__ import annotations

import base64
import io
import json
import sys
import urllib.request
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

HEIGHT, GAP, BAR = 300, 8, 26
COLOUR, OPACITY = (255, 64, 64), 130


def mask_of(url: str, photo: Path, expression: str) -> Image.Image:
    """The mask, 255 where the photo shows what was asked for."""
    data = base64.b64encode(photo.read_bytes()).decode()
    body = {"image": f"data:image/png;base64,{data}", "expressions": [expression], "mask_format": "png"}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/segmentations", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as response:
        (result,) = json.load(response)["results"]
    encoded = result["mask"]["png"]
    return Image.open(io.BytesIO(base64.b64decode(encoded))).convert("L").point(lambda value: 255 if value else 0)


def drawn(url: str, photo: Path, expression: str) -> Image.Image:
    image = Image.open(photo).convert("RGB")
    mask = mask_of(url, photo, expression)
    shown = Image.composite(Image.new("RGB", image.size, COLOUR), image, mask.point(lambda value: value and OPACITY))
    shown = shown.resize((round(image.width * HEIGHT / image.height), HEIGHT))
    labelled = Image.new("RGB", (shown.width, HEIGHT + BAR), "white")
    labelled.paste(shown)
    ImageDraw.Draw(labelled).text((4, HEIGHT + 3), f"“{expression}”", "black", ImageFont.load_default(16))
    return labelled


def main() -> None:
    url, target, *words = sys.argv[1:]
    pictures = [drawn(url, Path(photo), asked) for photo, asked in zip(words[::2], words[1::2], strict=True)]
    width = sum(picture.width for picture in pictures) + GAP * (len(pictures) - 1)
    joined = Image.new("RGB", (width, HEIGHT + BAR), "white")
    left = 0
    for picture in pictures:
        joined.paste(picture, (left, 0))
        left += picture.width + GAP
    joined.save(target, optimize=True)


if __name__ == "__main__":
    main()
