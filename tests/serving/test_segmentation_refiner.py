"""Refining in the server: a process of its own, and coarse masks whenever it does not answer."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "models" / "refine"))
from drawn_picture import HEIGHT, WIDTH, coarse_disc, drawn_picture
from random_sam import save_random_sam

from relay_models import masks
from relay_models.errors import CheckpointError
from relay_models.refine.interface import RefinedMask, Refiner
from relay_models.refine.sam import Sam
from relay_models.text4seg.codec import decode
from relay_models.text4seg.geometry import upsample
from relay_serving.segmentation import refining as refining_module
from relay_serving.segmentation.refining import MOST_DEATHS, RefinerSource, Refining, resolve
from tiny_server import GRID, TINY_FLAGS, data_url, picture_bytes

SIDE = 512  # large enough to need memory worth limiting
PATIENT, HASTY = 600.0, 1.5


@pytest.fixture(scope="module")
def sam_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_sam(tmp_path_factory.mktemp("models") / "random-sam", SIDE)


def with_refining(folder: Path, use: Callable[[Refining], Awaitable[None]], **options: Any) -> None:
    async def run() -> None:
        refining = Refining(RefinerSource("ours", ("sam", str(folder)), SIDE), **{"timeout": PATIENT, **options})
        try:
            await use(refining)
        finally:
            await refining.close()
        assert not workers()

    asyncio.run(run())


def workers(of: int | None = None) -> list[psutil.Process]:
    """The refiners' processes below this one, or below another one."""
    children = psutil.Process(of).children(recursive=True)
    return [child for child in children if "relay_models.refine.worker" in child.cmdline()]


async def ask(refining: Refining, *coarse: np.ndarray) -> list[RefinedMask] | None:
    masks_drawn = coarse or [coarse_disc()]
    return await refining.refine(refining.view(drawn_picture()), "drawn", HEIGHT, WIDTH, lambda: masks_drawn)


def test_the_process_answers_as_the_library_does(sam_folder: Path) -> None:
    empty, left = np.zeros((HEIGHT, WIDTH), dtype=bool), np.zeros((HEIGHT, WIDTH), dtype=bool)
    left[:, :150] = True
    expected = Refiner(Sam.from_pretrained(str(sam_folder))).refine(
        drawn_picture(), [coarse_disc(), empty, left], disjoint=True
    )

    async def use(refining: Refining) -> None:
        for _ in range(2):  # the second time from the embedding that is kept
            found = await ask(refining, coarse_disc(), empty, left)
            assert found is not None
            assert [mask.outcome for mask in found] == [mask.outcome for mask in expected]
            for ours, theirs in zip(found, expected, strict=True):
                assert (ours.mask_HW != theirs.mask_HW).mean() < 1e-3
        assert len(workers()) == 1

    with_refining(sam_folder, use)


def test_a_client_that_leaves_takes_no_answer_from_the_next_one(sam_folder: Path) -> None:
    async def use(refining: Refining) -> None:
        alone = await ask(refining)
        leaving = asyncio.create_task(ask(refining, np.ones((HEIGHT, WIDTH), dtype=bool)))
        await asyncio.sleep(0.01)
        leaving.cancel()
        after = await ask(refining)
        assert alone is not None
        assert after is not None
        np.testing.assert_array_equal(after[0].mask_HW, alone[0].mask_HW)

    with_refining(sam_folder, use)


@pytest.mark.slow
def test_too_slow_or_killed_is_a_failure_and_then_it_works_again(
    sam_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def use(refining: Refining) -> None:
        assert await ask(refining) is not None
        refining._timeout = HASTY
        (stopped,) = workers()
        stopped.send_signal(signal.SIGSTOP)
        assert await ask(refining) is None
        assert "took more than 1.5 s" in caplog.text
        assert not stopped.is_running()
        refining._timeout = PATIENT
        assert await ask(refining) is not None
        (killed,) = workers()
        killed.kill()
        assert await ask(refining) is None
        assert "killed by signal 9" in caplog.text
        assert await ask(refining) is not None

    with_refining(sam_folder, use)


def test_out_of_memory_is_a_failure_that_the_process_survives(
    sam_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def use(refining: Refining) -> None:
        assert await ask(refining) is None
        assert "memory" in caplog.text.lower()
        assert len(workers()) == 1

    with_refining(sam_folder, use, memory=6 << 20)  # enough for the question


def test_what_cannot_be_loaded_is_given_up_and_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')

    async def use(refining: Refining) -> None:
        assert await ask(refining) is None
        assert await ask(refining) is None
        assert caplog.text.count("cannot be loaded") == 1
        assert "a refiner must be a SAM" in caplog.text

    with_refining(tmp_path, use)


def test_clients_that_leave_the_queue_cost_nothing(sam_folder: Path) -> None:
    """Forty expressions and gone: neither masks are drawn for them, nor is the process asked."""
    drawn: list[str] = []

    def draw(name: str) -> Callable[[], list[np.ndarray]]:
        return lambda: [drawn.append(name) or coarse_disc()]

    async def use(refining: Refining) -> None:
        assert await ask(refining) is not None
        view = refining.view(drawn_picture())
        (process,) = workers()
        process.send_signal(signal.SIGSTOP)
        tasks = [
            asyncio.create_task(refining.refine(view, "drawn", HEIGHT, WIDTH, draw(name)))
            for name in ("first", *["leaves"] * 40, "stays")
        ]
        while drawn != ["first"]:
            await asyncio.sleep(0.01)
        for task in tasks[1:-1]:
            task.cancel()
        await asyncio.gather(*tasks[1:-1], return_exceptions=True)
        process.send_signal(signal.SIGCONT)
        assert await tasks[0] is not None
        assert await tasks[-1] is not None
        assert drawn == ["first", "stays"]

    with_refining(sam_folder, use)


def test_who_waited_while_the_process_died_asks_the_new_one(sam_folder: Path) -> None:
    async def use(refining: Refining) -> None:
        assert await ask(refining) is not None
        (process,) = workers()
        process.send_signal(signal.SIGSTOP)
        first, second = (asyncio.create_task(ask(refining)) for _ in range(2))
        while not refining._turn.locked():
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        process.kill()
        assert await first is None
        assert await second is not None

    with_refining(sam_folder, use)


def test_no_memory_in_the_server_costs_no_mask_and_no_process(
    sam_folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: Any, **__: Any) -> None:
        raise MemoryError

    async def use(refining: Refining) -> None:
        assert await ask(refining) is not None
        before = workers()
        for name in ("finish", "_question"):
            with monkeypatch.context() as patched:
                patched.setattr(refining_module, name, no_memory)
                assert await ask(refining) is None
            assert "failed here in the server" in caplog.text
            caplog.clear()
            assert await ask(refining) is not None
        assert await refining.refine(refining.view(drawn_picture()), "drawn", HEIGHT, WIDTH, no_memory) is None
        assert await ask(refining) is not None
        assert workers() == before

    with_refining(sam_folder, use)


def test_an_answer_that_cannot_be_read_costs_the_process(
    sam_folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def use(refining: Refining) -> None:
        assert await ask(refining) is not None
        (before,) = workers()
        with monkeypatch.context() as patched:
            patched.setattr(refining_module.worker, "unpacked", lambda message: np.load(io.BytesIO(b"no archive")))
            assert await ask(refining) is None
        assert not before.is_running()
        assert "it is started anew" in caplog.text
        assert await ask(refining) is not None

    with_refining(sam_folder, use)


def test_all_wait_at_one_time_for_what_is_not_loaded(sam_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(arguments: Any) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(refining_module._Worker, "start", never)

    async def use(refining: Refining) -> None:
        async with asyncio.timeout(8):  # one after the other they would take 20
            assert await asyncio.gather(*(ask(refining) for _ in range(20))) == [None] * 20

    with_refining(sam_folder, use, timeout=1.0)


def test_what_dies_while_it_loads_rests_too(
    sam_folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed for memory when it is started anew: that is no reason to be off for good."""

    async def killed(arguments: Any) -> None:
        raise refining_module.WorkerEndedError("its process was killed by signal 9")

    async def use(refining: Refining) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(refining_module._Worker, "start", killed)
            for _ in range(MOST_DEATHS):
                assert await asyncio.gather(*(ask(refining) for _ in range(2))) == [None] * 2
        assert f"while it loaded, {MOST_DEATHS} times in a row" in caplog.text
        assert await ask(refining) is None
        refining._rests_until = 0.0
        assert await ask(refining) is not None

    with_refining(sam_folder, use)


@pytest.mark.slow
def test_what_dies_again_and_again_rests(sam_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def use(refining: Refining) -> None:
        refining._deaths = MOST_DEATHS - 1  # of starts that each cost seconds
        refining.start()
        assert refining._loading is not None
        await refining._loading
        workers()[0].kill()
        assert await ask(refining) is None
        assert f"{MOST_DEATHS} times in a row; masks stay coarse, and it is started anew after 60 s" in caplog.text
        assert await ask(refining) is None
        assert not workers()
        refining._rests_until = 0.0
        assert await ask(refining) is not None
        assert refining._deaths == 0

    with_refining(sam_folder, use)


def test_a_setting_becomes_a_source(sam_folder: Path, tmp_path: Path) -> None:
    assert resolve("none", tmp_path) is None
    assert resolve(str(sam_folder), tmp_path) == RefinerSource("random-sam", ("sam", str(sam_folder)), SIDE)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(CheckpointError, match="a model of type 'clip'; it must be a SAM"):
        resolve(str(tmp_path), tmp_path)
    with pytest.raises(CheckpointError, match="no model can be found there"):
        resolve(str(tmp_path / "absent"), tmp_path)


# ---------------------------------------------------------------- a whole server


@pytest.fixture(scope="module")
def server(
    tiny_llava: Path, sam_folder: Path, start_server: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    log_path = tmp_path_factory.mktemp("refining") / "server.log"
    flags = ("--relay-refiner", str(sam_folder), "--relay-refiner-timeout", "60")
    with start_server(log_path, str(tiny_llava), *TINY_FLAGS, *flags) as started:
        yield started


@pytest.fixture(scope="module")
def client(server: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=300) as client:
        yield client


def results_of(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/segmentations", json={"image": data_url(picture_bytes(width=61, height=43)), **fields})
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def mask_of(result: dict[str, Any]) -> np.ndarray:
    return masks.from_coco_rle({"size": result["mask"]["size"], "counts": result["mask"]["counts"]})


def coarse_mask(result: dict[str, Any]) -> np.ndarray:
    return upsample(decode(result["text"], height=GRID, width=GRID).mask(result["label"]), 43, 61) > 0


@pytest.mark.e2e
@pytest.mark.slow
def test_a_server_refines_unless_a_request_says_none(client: httpx.Client) -> None:
    names = [f"thing {i}" for i in range(6)]
    refined, coarse = (results_of(client, expressions=names, **extra) for extra in ({}, {"refiner": "none"}))
    assert {result["refiner"] for result in coarse["results"]} == {None}
    origins = {result["refiner"] for result in refined["results"]}
    assert origins <= {"random-sam", "kept", "skipped"}
    assert origins & {"random-sam", "kept"}
    assert refined["timings"]["refine_ms"] > 0
    for ours, plain in zip(refined["results"], coarse["results"], strict=True):
        np.testing.assert_array_equal(mask_of(plain), coarse_mask(plain))
        assert ours["area"] == int(mask_of(ours).sum())
        if ours["refiner"] != "random-sam":
            np.testing.assert_array_equal(mask_of(ours), coarse_mask(ours))


@pytest.mark.e2e
@pytest.mark.slow
def test_refined_classes_do_not_overlap_and_are_those_of_the_label_map(client: httpx.Client) -> None:
    classes = ["sky", "grass", "zebra"]
    found = results_of(client, classes=classes)
    covered = sum(mask_of(result).astype(int) for result in found["results"])
    assert covered.max() <= 1
    (label_map,) = results_of(client, classes=classes, mask_format="label_map")["label_maps"]
    values = np.asarray(Image.open(io.BytesIO(base64.b64decode(label_map["png"]))))
    for result in found["results"]:
        if result["label"] in label_map["labels"]:
            expected = values == label_map["labels"].index(result["label"])
            np.testing.assert_array_equal(mask_of(result) > 0, expected)


@pytest.mark.e2e
@pytest.mark.slow
def test_another_refiner_than_the_servers_is_refused(client: httpx.Client) -> None:
    answer = client.post(
        "/v1/segmentations",
        json={"image": data_url(picture_bytes()), "expressions": ["a"], "refiner": "mobile-sam"},
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "refiner"
    assert "none or random-sam, got 'mobile-sam'" in answer.json()["error"]["message"]


@pytest.mark.e2e
@pytest.mark.slow
def test_a_dead_refiner_costs_no_mask(server: Any, client: httpx.Client) -> None:
    results_of(client, expressions=["the dog"])  # so that it is loaded
    (worker,) = workers(server.process.pid)
    os.kill(worker.pid, signal.SIGKILL)
    body = results_of(client, expressions=["the dog"])
    (result,) = body["results"]
    assert result["refiner"] == "failed"
    np.testing.assert_array_equal(mask_of(result), coarse_mask(result))
    assert result["status"] == "complete"
    assert "killed by signal 9" in server.log
