"""A segmenter in a process of its own, asked over its standard input and answering over its standard output.

    python -m relay_models.refine.worker {mobile WEIGHTS | sam NAME} [--memory BYTES]

So a server can end it when it takes too long, and running out of memory ends it and not the server: it may use so many
bytes more than it has after loading, and where the machine itself runs out it offers itself first. A message is its
length (8 bytes, little-endian) and an npz archive without pickles. The first message is the worker's own: whether it
could load. It ends when its input does.
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import signal
import struct
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image

from relay_models.errors import RelayModelsError
from relay_models.refine.prompts import Prediction, Prompt

if TYPE_CHECKING:
    from relay_models.refine.sam import Sam

LENGTH = struct.Struct("<Q")
LONGEST_MESSAGE = 1 << 30
MEMORY = 8 << 30
EMBEDDINGS_KEPT = 4  # a picture's questions come one after the other; 4 MiB each
CUDA_BYTES_NEEDED = 6 << 30

Arrays = Mapping[str, npt.NDArray[Any]]


# ---------------------------------------------------------------- messages


def packed(arrays: Arrays) -> bytes:
    """A message, its length included."""
    buffer = io.BytesIO()
    buffer.write(bytes(LENGTH.size))
    np.savez(buffer, allow_pickle=False, **arrays)
    message = buffer.getbuffer()
    LENGTH.pack_into(message, 0, len(message) - LENGTH.size)
    return bytes(message)


def unpacked(message: bytes) -> dict[str, npt.NDArray[Any]]:
    with np.load(io.BytesIO(message), allow_pickle=False) as archive:
        return dict(archive)


def question(view: Image.Image, picture_id: str, prompts: Sequence[Prompt]) -> bytes:
    """A picture fitted into the frame, a name that is the same for the same picture, and what is asked about it."""
    arrays = {"view": np.asarray(view), "picture_id": np.array(picture_id), "num": np.array(len(prompts))}
    for index, prompt in enumerate(prompts):
        for field in fields(prompt):
            value = getattr(prompt, field.name)
            if value is not None:
                arrays[f"{index}.{field.name}"] = np.asarray(value)
    return packed(arrays)


def prompts_in(arrays: Arrays) -> list[Prompt]:
    def part(index: int, name: str) -> Any:
        return arrays.get(f"{index}.{name}")

    return [
        Prompt(
            points_P2=part(index, "points_P2"),
            labels_P=part(index, "labels_P"),
            box=part(index, "box"),
            logits_MM=part(index, "logits_MM"),
            passes=int(part(index, "passes")),
        )
        for index in range(int(arrays["num"]))
    ]


def answer(predictions: Sequence[Prediction]) -> bytes:
    return packed(
        {
            "logits": np.stack([found.logits_MM for found in predictions]),
            "scores": np.array([found.score for found in predictions], dtype=np.float32),
        }
    )


def predictions_in(arrays: Arrays) -> list[Prediction]:
    return [Prediction(*found) for found in zip(arrays["logits"], arrays["scores"].tolist(), strict=True)]


def refusal(reason: str) -> bytes:
    return packed({"reason": np.array(reason)})


# ---------------------------------------------------------------- the process


def main(argv: Sequence[str]) -> int:
    questions, answers = _take_streams()
    parser = argparse.ArgumentParser(prog="relay_models.refine.worker")
    parser.add_argument("kind", choices=("mobile", "sam"))
    parser.add_argument("source")
    parser.add_argument("--memory", type=int, default=MEMORY, metavar="BYTES")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's, which closes our input
    _offer_to_the_oom_killer()
    try:
        sam = _load(args.kind, args.source)
    except (RelayModelsError, RuntimeError, MemoryError) as error:
        _send(answers, refusal(_reason(error)))
        return 1
    _limit_memory(args.memory)
    _send(answers, packed({"side": np.array(sam.side), "mask_side": np.array(sam.mask_side)}))
    _serve(sam, questions, answers)
    return 0


def _take_streams() -> tuple[BinaryIO, BinaryIO]:
    """Ours alone: whatever a library prints goes to stderr, and not between our messages."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return sys.stdin.buffer, answers


def _offer_to_the_oom_killer() -> None:
    try:
        Path("/proc/self/oom_score_adj").write_text("1000")
    except OSError:
        return  # no Linux, or not ours to say


def _load(kind: str, source: str) -> Sam:
    import torch

    from relay_models.refine.sam import Sam

    device = "cpu"
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] >= CUDA_BYTES_NEEDED:
        device = "cuda"
    return Sam.mobile(Path(source), device=device) if kind == "mobile" else Sam.from_pretrained(source, device=device)


def _limit_memory(allowance: int) -> None:
    """Of private memory, which is what pictures need; an allocation beyond it fails and is answered as a refusal."""
    status = Path("/proc/self/status")
    if not status.exists():
        return
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmData:"))
    limit = int(line.split()[1]) * 1024 + allowance
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def _serve(sam: Sam, questions: BinaryIO, answers: BinaryIO) -> None:
    embeddings: OrderedDict[str, Any] = OrderedDict()
    while len(head := questions.read(LENGTH.size)) == LENGTH.size:
        (length,) = LENGTH.unpack(head)
        message = questions.read(length)
        if len(message) < length:
            return
        try:
            reply = answer(_predict(sam, unpacked(message), embeddings))
        except (RelayModelsError, RuntimeError, MemoryError) as error:
            embeddings.clear()
            reply = refusal(_reason(error))
        try:
            _send(answers, reply)
        except BrokenPipeError:
            return


def _send(answers: BinaryIO, message: bytes) -> None:
    answers.write(message)
    answers.flush()


def _predict(sam: Sam, arrays: Arrays, embeddings: OrderedDict[str, Any]) -> list[Prediction]:
    picture_id = str(arrays["picture_id"])
    if picture_id not in embeddings:
        embeddings[picture_id] = sam.embed(Image.fromarray(arrays["view"]))
        while len(embeddings) > EMBEDDINGS_KEPT:
            embeddings.popitem(last=False)
    embeddings.move_to_end(picture_id)
    return sam.predict(embeddings[picture_id], prompts_in(arrays))


def _reason(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:400] or type(error).__name__


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
