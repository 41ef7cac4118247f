"""`vllm-relay convert text4seg SRC DST`: upstream's checkpoints and adapters to the layout vLLM loads."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relay_models.errors import CheckpointError
from relay_models.text4seg.profiles import Style
from relay_serving.errors import ConversionError

if TYPE_CHECKING:
    from relay_models.text4seg.convert import Conversion


def run(words: Sequence[str]) -> int:
    """Convert as the command line says. Raises ConversionError."""
    args = _parser().parse_args(words)
    made = convert_with_progress(
        args.source,
        args.target,
        base=args.base,
        vision_tower=args.vision_tower,
        grid=args.grid,
        style=None if args.style is None else Style(args.style),
    )
    print(
        f"{made.folder}: {made.num_tensors} tensors, {made.num_bytes / 1e9:.2f} GB, descriptors of {made.grid} by "
        f"{made.grid} cells\nvllm-relay serve {made.folder}"
    )
    return 0


def convert_with_progress(source: str, target: Path, **options: Any) -> Conversion:
    """`relay_models.text4seg.convert.convert` with a bar on stderr. Raises ConversionError."""
    from tqdm import tqdm

    from relay_models.text4seg.convert import convert  # imports PyTorch

    with tqdm(total=None, unit="B", unit_scale=True, desc="Writing weights", file=sys.stderr, disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        try:
            return convert(source, target, progress=show, **options)
        except CheckpointError as error:
            raise ConversionError(str(error)) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm-relay convert text4seg",
        description="Write a llava-hf folder, which vLLM serves, from a checkpoint or an adapter of the original LLaVA "
        "code.",
    )
    add = parser.add_argument
    add("source", metavar="SRC", help="folder or hub id")
    add("target", metavar="DST", type=Path, help="folder to write; absent or empty")
    add("--base", help="model an adapter was trained on (default: the one the adapter names)")
    add("--vision-tower", help="CLIP model to take the tower from, if SRC holds none (default: the one SRC names)")
    add("--grid", type=int, help="cells a side of its descriptors (default: what is known of SRC)")
    add("--style", choices=[style.value for style in Style], help="how it is spoken to (default: what is known of SRC)")
    return parser
