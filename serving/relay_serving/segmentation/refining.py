"""Sharper masks for the service: a refiner in a process of its own, off the event loop, that no answer depends on.

The process is started with the server and loads once. A query's masks go to it in one question, one query at a time,
and are drawn only then; a picture is encoded once for all of its queries. What goes wrong (too slow, out of memory here
or there, killed, not loaded) is logged and costs the sharpness of the masks in hand, never the masks: they stay coarse,
with `refiner: failed`. A process that was too slow or died is started anew; where it did so `MOST_DEATHS` times without
an answer in between, it rests first, for longer each time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from relay_models.errors import CheckpointError
from relay_models.refine import weights, worker
from relay_models.refine.frame import SIDE, AnyMask, Frame
from relay_models.refine.interface import DEFAULT_STYLE, RefinedMask, finish, prompt_all
from relay_models.refine.prompts import Prediction, Prompt
from relay_serving.settings import REFINER_MOBILE_SAM, REFINER_NONE

logger = logging.getLogger("vllm.relay")

FAILED = "failed"
LOAD_SECONDS = 3600  # a hub id may have to be fetched first
MOST_DEATHS = 3
REST_SECONDS, LONGEST_REST = 60, 3600


@dataclass(frozen=True)
class RefinerSource:
    """Which refiner: its name in requests and results, the worker's arguments, the side of its frame."""

    name: str
    arguments: tuple[str, ...]
    side: int = SIDE


def resolve(setting: str, models: Path) -> RefinerSource | None:
    """The refiner of a setting, its weights fetched if they have to be; None for none.

    Args:
        setting: `none`, `mobile-sam`, or hub id or folder of a SAM.
        models: where fetched weights are kept.

    Raises:
        CheckpointError: the weights cannot be had, or the model is no SAM.
    """
    if setting == REFINER_NONE:
        return None
    if setting == REFINER_MOBILE_SAM:
        return RefinerSource(REFINER_MOBILE_SAM, ("mobile", str(weights.prepare(models, logger.info))))
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(setting)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"--relay-refiner is {setting!r}, and no model can be found there: {reason}") from error
    if config.model_type != "sam":
        raise CheckpointError(
            f"--relay-refiner is {setting!r}, a model of type {config.model_type!r}; it must be a SAM"
        )
    name = Path(setting).name if Path(setting).is_absolute() else setting
    return RefinerSource(name, ("sam", setting), int(config.prompt_encoder_config.image_size))


class WorkerEndedError(Exception):
    """The process ended in the middle of something."""


class RefusedError(Exception):
    """The process is well, and could not do what was asked; its reason is the message."""


class _Worker:
    """A running process that has loaded."""

    def __init__(self, process: asyncio.subprocess.Process, side: int, mask_side: int) -> None:
        self._process = process
        self.side = side
        self.mask_side = mask_side

    @classmethod
    async def start(cls, arguments: Sequence[str]) -> _Worker:
        """Raises RefusedError where it cannot load, WorkerEndedError where it ends."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "relay_models.refine.worker", *arguments),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            hello = await _reply(process)
        except BaseException:  # also a cancelled start leaves no process behind
            await _end(process)
            raise
        return cls(process, int(hello["side"]), int(hello["mask_side"]))

    async def ask(self, question: bytes) -> list[Prediction]:
        """Raises RefusedError, WorkerEndedError; anything else for an answer that cannot be read."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(question)
            await self._process.stdin.drain()
        except (OSError, RuntimeError) as error:  # uvloop's word for a pipe that it has closed is RuntimeError
            raise WorkerEndedError(await _epitaph(self._process)) from error
        return worker.predictions_in(await _reply(self._process))

    async def end(self) -> None:
        await _end(self._process)


class Refining:
    """The refiner of one server.

    Args:
        source: which one.
        timeout: seconds for the masks of one query, and for what is not loaded yet; waiting for other queries is not
            counted.
        memory: bytes that the process may use beyond what it has loaded.
    """

    def __init__(self, source: RefinerSource, *, timeout: float, memory: int = worker.MEMORY) -> None:
        self.name = source.name
        self.side = source.side
        self._arguments = (*source.arguments, "--memory", str(memory))
        self._timeout = timeout
        self._turn = asyncio.Lock()
        self._loading: asyncio.Task[_Worker] | None = None
        self._asking: set[asyncio.Task[Any]] = set()
        self._deaths = 0
        self._rests_until = 0.0  # of time.monotonic()
        self._given_up: str | None = None

    def start(self) -> None:
        """Begin to load, so that the first query need not wait as long."""
        if self._loading is None and self._given_up is None:
            self._loading = asyncio.create_task(self._load())

    def view(self, picture: Image.Image) -> Image.Image:
        """What the refiner sees of an upright RGB picture."""
        return Frame(picture.height, picture.width, self.side).view(picture)

    async def refine(
        self, view: Image.Image, picture_id: str, height: int, width: int, draw: Callable[[], Sequence[AnyMask]]
    ) -> list[RefinedMask] | None:
        """A mask for each coarse one [height, width], none of which overlap; None where refining failed.

        Args:
            view: of the picture, from `view`.
            picture_id: the same for the same picture.
            draw: makes the coarse masks, in a thread, when it is their turn: until then they take no memory.
        """
        running = await self._taken()
        if running is None:
            return None
        # From here on the turn is the task's: a client that is gone must not leave half a conversation in the pipe.
        task = asyncio.create_task(
            self._refine_in_turn(running, view, picture_id, Frame(height, width, self.side), draw)
        )
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)
        return await asyncio.shield(task)

    async def close(self) -> None:
        """End the process, now and for good."""
        self._given_up = "it was closed"
        if self._loading is not None:
            self._loading.cancel()
            with contextlib.suppress(asyncio.CancelledError, RefusedError, WorkerEndedError, TimeoutError):
                await (await self._loading).end()

    async def _taken(self) -> _Worker | None:
        """The process, with the turn to ask it; None, without, where there is none. Cancelling gives up the place in
        the queue."""
        deadline = time.monotonic() + self._timeout
        while True:
            if self._given_up is not None or time.monotonic() < self._rests_until:
                return None
            self.start()
            loading = self._loading
            assert loading is not None
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    running = await asyncio.shield(loading)
            except RefusedError as error:
                self._give_up(f"it cannot be loaded: {error}")
                return None
            except WorkerEndedError as error:  # out of memory, say: that passes
                if self._loading is loading:
                    self._died(f"{error} while it loaded")
                return None
            except TimeoutError:
                logger.warning("Refiner %s is still loading; masks stay coarse.", self.name)
                return None
            queued = time.monotonic()
            await self._turn.acquire()
            if self._loading is loading:
                return running
            self._turn.release()  # it was started anew meanwhile
            deadline += time.monotonic() - queued

    async def _refine_in_turn(
        self,
        running: _Worker,
        view: Image.Image,
        picture_id: str,
        frame: Frame,
        draw: Callable[[], Sequence[AnyMask]],
    ) -> list[RefinedMask] | None:
        """Masks, or None where it failed, which is logged here. Ends the turn."""
        try:
            coarse = await asyncio.to_thread(draw)
            predictions = await self._ask(running, view, picture_id, frame, coarse)
            if predictions is None:
                return None
            return await asyncio.to_thread(finish, coarse, predictions, frame, disjoint=True)
        except Exception:  # memory above all: the coarse masks can still be had
            logger.exception("Refiner %s failed here in the server; masks stay coarse.", self.name)
            return None
        finally:
            self._turn.release()

    async def _ask(
        self, running: _Worker, view: Image.Image, picture_id: str, frame: Frame, coarse: Sequence[AnyMask]
    ) -> list[Prediction | None] | None:
        """Predictions, None for an empty mask; or None where it failed."""
        prompts, question = await asyncio.to_thread(_question, running, view, picture_id, frame, coarse)
        if question is None:
            return [None] * len(prompts)
        try:
            async with asyncio.timeout(self._timeout):
                predictions = await running.ask(question)
        except RefusedError as error:
            logger.warning("Refiner %s failed: %s; masks stay coarse.", self.name, error)
            return None
        except TimeoutError:
            await self._replace(running, f"it took more than {self._timeout:g} s")
            return None
        except Exception as error:  # whatever it was, the rest of the conversation cannot be trusted
            await self._replace(running, str(error) or type(error).__name__)
            return None
        self._deaths = 0
        found = iter(predictions)
        return [None if prompt is None else next(found) for prompt in prompts]

    async def _load(self) -> _Worker:
        try:
            async with asyncio.timeout(LOAD_SECONDS):
                running = await _Worker.start(self._arguments)
        except TimeoutError as error:
            raise RefusedError(f"it did not load in {LOAD_SECONDS} s") from error
        except OSError as error:
            raise RefusedError(f"no process could be started: {error}") from error
        if running.side != self.side:
            await running.end()
            raise RefusedError(f"its frame is {running.side} pixels a side, not {self.side}")
        logger.info("Refiner %s is loaded.", self.name)
        return running

    async def _replace(self, running: _Worker, reason: str) -> None:
        await running.end()
        self._died(reason)

    def _died(self, reason: str) -> None:
        self._loading = None
        self._deaths += 1
        if self._deaths < MOST_DEATHS:
            logger.warning("Refiner %s failed: %s; masks stay coarse, and it is started anew.", self.name, reason)
            self.start()
            return
        rest = min(REST_SECONDS * 2 ** (self._deaths - MOST_DEATHS), LONGEST_REST)
        self._rests_until = time.monotonic() + rest
        logger.error(
            "Refiner %s failed: %s, %d times in a row; masks stay coarse, and it is started anew after %g s.",
            self.name,
            reason,
            self._deaths,
            rest,
        )

    def _give_up(self, reason: str) -> None:
        self._given_up = reason
        logger.error("Refiner %s is off until the server is started again: %s.", self.name, reason)


def _question(
    running: _Worker, view: Image.Image, picture_id: str, frame: Frame, coarse: Sequence[AnyMask]
) -> tuple[list[Prompt | None], bytes | None]:
    prompts = prompt_all(coarse, frame, DEFAULT_STYLE, mask_side=running.mask_side)
    asked = [prompt for prompt in prompts if prompt is not None]
    return prompts, worker.question(view, picture_id, asked) if asked else None


async def _reply(process: asyncio.subprocess.Process) -> dict[str, Any]:
    assert process.stdout is not None
    try:
        (length,) = worker.LENGTH.unpack(await process.stdout.readexactly(worker.LENGTH.size))
        if length > worker.LONGEST_MESSAGE:
            raise WorkerEndedError(f"its process announced a message of {length} bytes")
        arrays = worker.unpacked(await process.stdout.readexactly(length))
    except asyncio.IncompleteReadError as error:
        raise WorkerEndedError(await _epitaph(process)) from error
    if "reason" in arrays:
        raise RefusedError(str(arrays["reason"]))
    return arrays


async def _epitaph(process: asyncio.subprocess.Process) -> str:
    status = await process.wait()
    return f"its process was killed by signal {-status}" if status < 0 else f"its process ended with status {status}"


async def _end(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()
