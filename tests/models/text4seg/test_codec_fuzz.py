"""Millions of hostile answers: none raises, each keeps the promises of the codec, and memory does not grow."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from itertools import islice
from pathlib import Path

import codec_fuzz
import pytest

from relay_models.text4seg.codec import DescriptorStatus, Repair

KILOBYTES = 1024
QUICK_COUNT = 20_000
SLOW_COUNT = 10_000_000


def assert_all_kinds_were_met(statuses: dict[str, int], repairs: dict[str, int]) -> None:
    """A fuzzer that no longer reaches a branch tests nothing there."""
    assert set(statuses) == {status.value for status in DescriptorStatus}
    assert set(repairs) == {repair.value for repair in Repair}
    count = sum(statuses.values())
    assert min(statuses.values()) > count / 100
    assert min(repairs.values()) > count / 1000


def test_twenty_thousand_hostile_answers():
    outcome = codec_fuzz.run(QUICK_COUNT, seed=20_241_013)
    assert sum(outcome.statuses.values()) == outcome.count == QUICK_COUNT
    assert_all_kinds_were_met(outcome.statuses, outcome.repairs)


def test_a_hostile_answer_takes_memory_for_its_text_and_its_grids_only():
    tracemalloc.start()
    try:
        for case in islice(codec_fuzz.cases(4_000, seed=7), 0, None, 2):
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            answer = codec_fuzz.check(case)
            peak = tracemalloc.get_traced_memory()[1] - before
            grids = len(answer.descriptors) * (2 * case.height * case.width + 4 * KILOBYTES)
            assert peak < grids + 12 * sys.getsizeof(case.text) + 8 * KILOBYTES, case
    finally:
        tracemalloc.stop()


def test_the_same_seed_gives_the_same_answers():
    assert list(codec_fuzz.cases(500, seed=3)) == list(codec_fuzz.cases(1_000, seed=3))[:500]
    assert list(codec_fuzz.cases(500, seed=3)) != list(codec_fuzz.cases(500, seed=4))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak memory of a process is read from /proc")
def test_ten_million_hostile_answers_in_a_process_that_does_not_grow():
    command = [sys.executable, codec_fuzz.__file__, "--count", str(SLOW_COUNT), "--seed", "1"]
    process = subprocess.run(command, cwd=Path(codec_fuzz.__file__).parent, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-4000:]
    result = json.loads(process.stdout)
    assert result["count"] == SLOW_COUNT
    assert_all_kinds_were_met(result["statuses"], result["repairs"])
    assert result["peak_kilobytes"] < 150 * KILOBYTES
    assert result["growth_kilobytes"] < 16 * KILOBYTES
