"""Seeded hostile answers, and what must hold for each. A process of its own when millions are run:

    python tests/models/text4seg/codec_fuzz.py --count 10000000 --seed 0

Half of the texts are descriptors of which some pieces were cut out, doubled, swapped or overwritten; half are random
bytes, as Latin-1 or as UTF-8 with replacements. Grids, formats, tags and the requested labels vary with them.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from codec_cases import is_carried, written

from relay_models.text4seg.codec import (
    MAX_BLOCKS,
    Answer,
    DescriptorFormat,
    DescriptorStatus,
    Repair,
    StreamDecoder,
    decode_answer,
    encode,
)

FORMATS = (*(DescriptorFormat.R_RLE,) * 6, DescriptorFormat.I_RLE, DescriptorFormat.FULL)
# Small grids mostly: they exercise the same code in less time. What stands several times is drawn as often.
SIDES = (*((1, 1), (1, 4), (2, 3), (3, 2), (4, 4), (5, 3)) * 4, (8, 8), (16, 16), (12, 20), (24, 24))
LABELS = ("others", "cat", "dog, brown", "5* hotel", "Straße", "狗", "a man in a red shirt", "50% off")
REQUESTED = (None, None, ("cat", "dog, brown"), LABELS)
PIECES = (
    *("\n", "\n ", " ", "|", "| ", "*", " *", " *1", "0", "9", "16", "-1", "1_6", "４", "²", "99999999999999999999"),
    *("<seg>", "</seg>", "<se", "</se", "seg>", "<", ">", "\r\n", "\r", "\t", "\x00", "\u2028", "\u00a0", "\ud800"),
    *("Others", "CAT", " *2 *3", "x" * 600, "\ufdfa", "\u0345", "||||||", "\n\n\n\n"),
)
BASES_PER_GRID = 24
STREAM_EVERY = 16
BATCH = 50_000


class Case(NamedTuple):
    text: str
    height: int
    width: int
    format: DescriptorFormat
    labels: tuple[str, ...] | None


class Outcome(NamedTuple):
    """How a run went: texts by the status of their answer, and by what was repaired in them."""

    count: int
    statuses: dict[str, int]
    repairs: dict[str, int]


def cases(count: int, seed: int) -> Iterator[Case]:
    """The same texts for the same seed, however many are taken."""
    choose = random.Random(seed)
    bases = _bases(choose)
    keys = tuple((sides, format) for sides in SIDES for format in FORMATS)
    for number in range(count):
        key = keys[int(choose.random() * len(keys))]
        (height, width), format = key
        text = _mutated(choose, bases[key]) if number % 2 else _random_text(choose)
        yield Case(text, height, width, format, REQUESTED[int(choose.random() * len(REQUESTED))])


def check(case: Case) -> Answer:
    """Decode, and assert what every answer promises."""
    answer = decode_answer(case.text, height=case.height, width=case.width, labels=case.labels, format=case.format)
    assert answer.text is case.text, case
    assert (answer.status is DescriptorStatus.NONE) == (not answer.descriptors), case
    assert len(answer.descriptors) == min(MAX_BLOCKS, case.text.count("<seg>")), case
    for descriptor in answer.descriptors:
        grid_HW = descriptor.grid_HW
        assert grid_HW.shape == (case.height, case.width), case
        assert descriptor.labels[0] == "others", case
        assert grid_HW.max() < len(descriptor.labels), case
        assert case.labels is None or len(descriptor.labels) <= len(case.labels) + 1, case
        is_complete = descriptor.status is DescriptorStatus.COMPLETE
        assert is_complete == (not descriptor.repairs), case
        assert (Repair.TRUNCATED not in descriptor.repairs) or not is_complete, case
        if is_complete and all(map(is_carried, descriptor.labels)):
            assert encode(grid_HW, descriptor.labels, case.format) == descriptor.text, case
    return answer


def check_stream(case: Case, answer: Answer, choose: random.Random) -> None:
    """The rows reported on the way are those of the whole text, whatever the pieces it arrives in."""
    decoder = StreamDecoder(case.height, case.width, case.labels)
    start = 0
    while start < len(case.text):
        end = start + choose.randint(1, 40)
        for event in decoder.feed(case.text[start:end]):
            descriptor = answer.descriptors[event.block]
            assert (event.cells_W == descriptor.grid_HW[event.row]).all(), case
            assert event.labels == descriptor.labels[: len(event.labels)], case
        start = end


def run(count: int, seed: int) -> Outcome:
    """Check that many texts; the first that breaks a promise is in the error."""
    statuses: Counter[str] = Counter()
    repairs: Counter[str] = Counter()
    choose = random.Random(~seed)
    for number, case in enumerate(cases(count, seed)):
        try:
            answer = check(case)
            if number % STREAM_EVERY < 2 and case.format is DescriptorFormat.R_RLE:
                check_stream(case, answer, choose)
        except Exception as error:
            raise AssertionError(f"text {number} of seed {seed}: {case!r}") from error
        statuses[answer.status] += 1
        for descriptor in answer.descriptors:
            repairs.update(descriptor.repairs)
    return Outcome(
        count,
        {status.value: statuses[status] for status in DescriptorStatus},
        {repair.value: repairs[repair] for repair in Repair},
    )


def _bases(choose: random.Random) -> dict[tuple[tuple[int, int], DescriptorFormat], list[str]]:
    """Good answers for each grid and format."""
    return {
        (sides, format): [f"Sure:\n<seg>{written(_cells(choose, *sides), format)}</seg>" for _ in range(BASES_PER_GRID)]
        for sides in dict.fromkeys(SIDES)
        for format in DescriptorFormat
    }


def _cells(choose: random.Random, height: int, width: int) -> list[list[str]]:
    names = choose.sample(LABELS, choose.randint(1, 4))
    patch = choose.choice((1, 2, 5))
    label_of = {
        (row, column): choose.choice(names)
        for row in range(height // patch + 1)
        for column in range(width // patch + 1)
    }
    return [[label_of[row // patch, column // patch] for column in range(width)] for row in range(height)]


def _mutated(choose: random.Random, bases: list[str]) -> str:
    draw = choose.random
    text = bases[int(draw() * len(bases))]
    for _ in range(int(draw() * 5)):
        start = int(draw() * (len(text) + 1))
        end = start + int(draw() ** 3 * 40)
        kind = draw()
        if kind < 0.35:
            text = text[:start] + PIECES[int(draw() * len(PIECES))] + text[start + (end & 1) :]
        elif kind < 0.55:
            text = text[:start] + text[end:]
        elif kind < 0.7:
            text = text[:end] + text[start:]
        elif kind < 0.8:
            text = text[:start]
        elif kind < 0.9:
            other = bases[int(draw() * len(bases))]
            text = text[:start] + other[int(draw() * len(other)) :]
        else:
            text = text[:start] + chr(int(draw() ** 4 * 0x10FFFF)) + text[start + 1 :]
    return text


def _random_text(choose: random.Random) -> str:
    data = choose.randbytes(int(choose.random() ** 2 * 120))
    text = data.decode("latin-1") if choose.random() < 0.5 else data.decode("utf-8", errors="replace")
    tags = choose.random()
    if tags < 0.3:
        return text
    return f"<seg>{text}</seg>" if tags < 0.7 else f"<seg>{text}"


def peak_kilobytes() -> int:
    """The most memory this process has held since it began (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start = time.perf_counter()
    statuses: Counter[str] = Counter()
    repairs: Counter[str] = Counter()
    peak_after_one_batch = 0
    for batch, begun in enumerate(range(0, arguments.count, BATCH)):
        outcome = run(min(BATCH, arguments.count - begun), seed=arguments.seed * 1_000_003 + batch)
        statuses.update(outcome.statuses)
        repairs.update(outcome.repairs)
        peak_after_one_batch = peak_after_one_batch or peak_kilobytes()
    result = {
        "count": sum(statuses.values()),
        "seconds": round(time.perf_counter() - start, 1),
        "peak_kilobytes": peak_kilobytes(),
        "growth_kilobytes": peak_kilobytes() - peak_after_one_batch,
        "statuses": statuses,
        "repairs": repairs,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
