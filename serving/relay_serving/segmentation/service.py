"""A segmentation request's life: checked, its pictures opened, its queries answered side by side, its masks made.

A query is one question about one picture: an expression, a class list, or everything. A query that fails leaves the
others: its result carries the error. What the caller sees is a sequence of events, in the order in which they happen;
a whole response is those events collected.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import uuid4

from vllm.v1.engine.exceptions import EngineDeadError

from relay_models.coco_export import CocoImage, CocoMask, coco_dataset
from relay_models.errors import LabelError
from relay_models.masks import coco_rle
from relay_models.refine.interface import Outcome, RefinedMask
from relay_models.text4seg import prompts
from relay_models.text4seg.codec import OPEN_TAG, Answer, StreamDecoder, decode_on_its_own_grid
from relay_models.text4seg.grammar import MAX_FREE_CHARACTERS
from relay_models.text4seg.labels import BACKGROUND, match_key, restore, substitute
from relay_serving.schemas.segmentation import (
    MOST_IMAGES,
    GrammarMode,
    ImageFacts,
    LabelMap,
    MaskFormat,
    OnRefusal,
    ResultError,
    SegmentationRequest,
    SegmentationResponse,
    SegmentationResult,
    Timings,
    Usage,
)
from relay_serving.segmentation import results
from relay_serving.segmentation.errors import BusyError, QueryFailedError, RequestError
from relay_serving.segmentation.generation import Generator, Prompt, Spoken
from relay_serving.segmentation.grammars import Grammars
from relay_serving.segmentation.media import Picture, PictureReader
from relay_serving.segmentation.profile import SegmentationProfile
from relay_serving.segmentation.refining import FAILED, Refining
from relay_serving.segmentation.sampling import descriptor_sampling
from relay_serving.settings import REFINER_NONE

logger = logging.getLogger("vllm.relay")

RETRY_AFTER_SECONDS = 2
MOST_REFINED = 1 << 30  # pixels of the masks of one query, a byte each
FINISHED = ("stop", "length")  # the engine's ways to end an answer that is one


@dataclass(frozen=True)
class Query:
    """One question about every picture of a request.

    Attributes:
        wanted: labels a result is owed for, found or not; None where the model names what it finds.
        labels: the only labels an answer may hold; None: any.
        error: why it cannot be asked at all.
    """

    index: int
    field: str
    expression: str | None
    question: str
    wanted: tuple[str, ...] | None
    labels: tuple[str, ...] | None
    error: RequestError | None = None


@dataclass(frozen=True)
class RowReady:
    """A row of a grid, while its answer is still being written."""

    image_index: int
    query_index: int
    block: int
    row: int
    runs: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class QueryDone:
    """A query's results: one for an expression, one for each class of a list, for each descriptor of its answer.

    Attributes:
        label_maps: one for each descriptor, where they are wanted.
    """

    results: tuple[SegmentationResult, ...]
    label_maps: tuple[LabelMap, ...] = ()
    coco_masks: tuple[CocoMask, ...] = ()


@dataclass(frozen=True)
class AllDone:
    response: SegmentationResponse


Event = RowReady | QueryDone | AllDone


@dataclass
class _Account:
    """What a request has cost so far."""

    began: float = field(default_factory=time.perf_counter)
    usage: Usage = field(default_factory=Usage)
    cached_tokens: int = 0
    image_seconds: float = 0.0
    generate_seconds: float = 0.0
    mask_seconds: float = 0.0
    refine_seconds: float = 0.0

    def add(self, spoken: Spoken) -> None:
        self.usage.prompt_tokens += spoken.prompt_tokens
        self.usage.completion_tokens += len(spoken.token_ids)
        self.usage.total_tokens = self.usage.prompt_tokens + self.usage.completion_tokens
        self.cached_tokens += spoken.cached_tokens
        self.usage.prompt_tokens_details = {"cached_tokens": self.cached_tokens}

    def timings(self) -> Timings:
        return Timings(
            image_ms=round(1e3 * self.image_seconds, 2),
            generate_ms=round(1e3 * self.generate_seconds, 2),
            refine_ms=round(1e3 * self.refine_seconds, 2),
            mask_ms=round(1e3 * self.mask_seconds, 2),
            total_ms=round(1e3 * (time.perf_counter() - self.began), 2),
        )


class SegmentationService:
    """Answers segmentation requests of one server.

    Args:
        most_queries: queries answered at one time; a request beyond them is refused with a time to try again.
        refining: what sharpens masks, where a request does not say `none`.
    """

    def __init__(
        self,
        reader: PictureReader,
        generator: Generator,
        profile: SegmentationProfile,
        grammars: Grammars,
        *,
        model_name: str,
        most_queries: int,
        refining: Refining | None = None,
    ) -> None:
        self._reader = reader
        self._generator = generator
        self._profile = profile
        self._grammars = grammars
        self._model_name = model_name
        self._most_queries = most_queries
        self._refining = refining
        self._in_flight = 0

    async def warm(self) -> None:
        """Have the engine compile what the first requests would otherwise wait for. Raises RequestError."""
        await self._generator.warm_grammar(self._grammars.answer(()))
        await self._generator.warm_grammar(self._grammars.answer(None))

    async def events(self, request: SegmentationRequest, uploads: Sequence[bytes] = ()) -> AsyncGenerator[Event, None]:
        """Rows, results, and the whole response last. Raises RequestError, before the first event only.

        Closing the iterator ends every query of the request.
        """
        account = _Account()
        self._refiner_of(request)
        await self._generator.check_model(request.model)
        queries = _queries_of(request, self._profile.family.check_text)
        num_images = len(uploads) + len(request.image_urls())
        if not num_images:
            raise RequestError("image is missing: give a URL, or upload a file", param="image")
        if num_images > MOST_IMAGES:
            raise RequestError(
                f"images: {num_images} pictures were sent, uploads and URLs together; at most {MOST_IMAGES} can be",
                param="images",
            )
        with self._admitted(len(queries) * num_images):
            pictures = await self._read_pictures(request, uploads)
            request, uploads = request.model_copy(update={"image": None, "images": None}), ()  # they may be large
            account.image_seconds = time.perf_counter() - account.began
            async with contextlib.aclosing(self._answer_all(request, queries, pictures, account)) as events:
                async for event in events:
                    yield event

    def _refiner_of(self, request: SegmentationRequest) -> Refining | None:
        """Raises RequestError for one that this server does not have."""
        ours = REFINER_NONE if self._refining is None else self._refining.name
        if request.refiner == REFINER_NONE:
            return None
        if request.refiner not in (None, ours):
            known = REFINER_NONE if ours == REFINER_NONE else f"{REFINER_NONE} or {ours}"
            raise RequestError(
                f"refiner must be {known}, got {request.refiner!r}: --relay-refiner names the one that a server has",
                param="refiner",
            )
        return self._refining

    @contextlib.contextmanager
    def _admitted(self, count: int) -> Any:
        if count > self._most_queries:
            raise RequestError(
                f"expressions times images is {count}; this server answers at most {self._most_queries} at a time: "
                "send fewer",
                param="expressions",
            )
        if self._in_flight + count > self._most_queries:
            raise BusyError(
                f"{self._in_flight} queries are being answered and at most {self._most_queries} can be: try again",
                retry_after=RETRY_AFTER_SECONDS,
            )
        self._in_flight += count
        try:
            yield
        finally:
            self._in_flight -= count

    async def _read_pictures(self, request: SegmentationRequest, uploads: Sequence[bytes]) -> list[Picture]:
        from_urls = [self._reader.read_url(url, name) for name, url in request.image_urls()]
        from_files = [self._reader.read_bytes(data, f"image.{i}" if i else "image") for i, data in enumerate(uploads)]
        return list(await asyncio.gather(*from_files, *from_urls))

    async def _answer_all(
        self, request: SegmentationRequest, queries: list[Query], pictures: list[Picture], account: _Account
    ) -> AsyncGenerator[Event, None]:
        events: asyncio.Queue[Event | BaseException] = asyncio.Queue()
        tasks = [
            asyncio.create_task(self._answer_into(events, request, query, picture, image_index, account))
            for image_index, picture in enumerate(pictures)
            for query in queries
        ]
        done: list[QueryDone] = []
        try:
            while len(done) < len(tasks):
                event = await events.get()
                if isinstance(event, BaseException):
                    raise event
                if isinstance(event, QueryDone):
                    done.append(event)
                yield event
            yield AllDone(await asyncio.to_thread(self._response, request, pictures, done, account))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer_into(
        self,
        events: asyncio.Queue[Event | BaseException],
        request: SegmentationRequest,
        query: Query,
        picture: Picture,
        image_index: int,
        account: _Account,
    ) -> None:
        """Every end of a query is an event: results, an error of its own, or the engine's end, and the request's."""
        try:
            if query.error is not None:
                raise query.error
            answered = _AnsweredQuery(self, request, query, picture, image_index, account)
            async for event in answered.events():
                events.put_nowait(event)
        except RequestError as error:
            events.put_nowait(QueryDone((_failed(query, image_index, error),)))
        except EngineDeadError as error:  # handed to the reader of `events`, where it is raised
            events.put_nowait(error)
        except Exception as error:
            logger.exception("A query about %s failed.", query.field)
            failure = QueryFailedError(f"the server failed to answer this: {type(error).__name__}", param=query.field)
            events.put_nowait(QueryDone((_failed(query, image_index, failure),)))

    def _response(
        self, request: SegmentationRequest, pictures: list[Picture], done: list[QueryDone], account: _Account
    ) -> SegmentationResponse:
        found = sorted(
            (result for query in done for result in query.results),
            key=lambda r: (r.image_index, r.query_index, r.block, r.index),
        )
        for index, result in enumerate(found):
            result.index = index
        label_maps = [label_map for query in done for label_map in query.label_maps]
        label_maps.sort(key=lambda label_map: (label_map.image_index, label_map.query_index, label_map.block))
        return SegmentationResponse(
            id=f"seg-{uuid4().hex}",
            created=int(time.time()),
            model=request.model or self._model_name,
            images=[ImageFacts(index=i, width=p.width, height=p.height) for i, p in enumerate(pictures)],
            results=found,
            label_maps=label_maps if request.mask_format is MaskFormat.LABEL_MAP else None,
            coco=_coco_of(pictures, found, done) if request.coco else None,
            usage=account.usage,
            timings=account.timings(),
        )


@dataclass(frozen=True)
class _Refined:
    """What became of a descriptor's masks: the refiner's name and what it made of them, or why they are coarse."""

    refiner: str
    masks: list[RefinedMask] | None = None


class _AnsweredQuery:
    """One query about one picture, from its prompt to its results."""

    def __init__(
        self,
        service: SegmentationService,
        request: SegmentationRequest,
        query: Query,
        picture: Picture,
        image_index: int,
        account: _Account,
    ) -> None:
        self._service = service
        self._generator = service._generator
        self._profile = service._profile
        self._request = request
        self._query = query
        self._picture = picture
        self._image_index = image_index
        self._account = account
        self._request_id = f"seg-{uuid4().hex}"
        self._decoder = StreamDecoder(self._profile.rows, self._profile.columns, query.labels)
        self._spoken = Spoken()
        self._is_forced = False
        self._warnings: list[str] = []

    async def events(self) -> AsyncGenerator[Event, None]:
        began = time.perf_counter()
        prompt = await self._generator.prompt(
            self._picture.square, self._picture.id, self._query.question, self._request.model
        )
        async with contextlib.aclosing(self._speak(prompt)) as rows:
            async for row in rows:
                yield row
        self._account.add(self._spoken)
        pieces = await self._scored_pieces(prompt) if self._request.score else None
        now = time.perf_counter()
        self._account.generate_seconds = max(self._account.generate_seconds, now - began)
        refined = await self._refine()
        self._account.refine_seconds = max(self._account.refine_seconds, time.perf_counter() - now)
        now = time.perf_counter()
        done = await asyncio.to_thread(self._make_results, pieces, refined)
        self._account.mask_seconds += time.perf_counter() - now
        yield done

    async def _speak(self, prompt: Prompt) -> AsyncGenerator[RowReady, None]:
        """The answer's rows; where it ends without a mask and one has to be had, it is made to go on."""
        may_refuse = self._request.grammar is GrammarMode.ON
        async for row in self._rows(prompt, self._grammar(may_refuse=may_refuse), ""):
            yield row
        refused = OPEN_TAG not in self._spoken.text and self._spoken.finish_reason != "length"
        if may_refuse and OPEN_TAG in self._spoken.text:
            # A model that is still talking at the last character that free text may have can only end or draw.
            self._is_forced = len(self._spoken.text.partition(OPEN_TAG)[0]) >= MAX_FREE_CHARACTERS
        if not (may_refuse and refused and self._request.on_refusal is OnRefusal.FORCE):
            return
        self._is_forced = True
        self._spoken.take_back(self._generator.end_token_ids)
        async for row in self._rows(prompt, self._grammar(may_refuse=False), "-forced"):
            yield row

    async def _rows(self, prompt: Prompt, grammar: str | None, suffix: str) -> AsyncGenerator[RowReady, None]:
        """Have the model go on from what it has said, and read what it says."""
        said = self._spoken
        prompt = prompt.followed_by(said.token_ids)
        params = descriptor_sampling(
            max_tokens=self._max_tokens(prompt),
            temperature=self._request.temperature,
            seed=self._request.seed,
            grammar=grammar,
        )
        spoken = Spoken()
        heard = 0
        async with contextlib.aclosing(self._generator.speak(prompt, params, self._request_id + suffix)) as outputs:
            async for spoken in outputs:
                events = self._decoder.feed(spoken.text[heard:])
                heard = len(spoken.text)
                for event in events:
                    yield self._row_ready(event)
        self._spoken = said.followed_by(spoken)
        if spoken.finish_reason in FINISHED:
            return
        broken_off = f"the engine broke the answer off ({spoken.finish_reason or 'no reason given'})"
        if OPEN_TAG not in self._spoken.text:
            raise QueryFailedError(broken_off, param=self._query.field)
        self._warnings.append(broken_off)

    def _row_ready(self, event: Any) -> RowReady:
        return RowReady(self._image_index, self._query.index, event.block, event.row, results.runs_of(event))

    def _grammar(self, *, may_refuse: bool) -> str | None:
        if self._request.grammar is GrammarMode.OFF:
            return None
        labels = self._query.labels
        return self._service._grammars.answer(labels) if may_refuse else self._service._grammars.forced(labels)

    def _max_tokens(self, prompt: Prompt) -> int:
        """As many as may be needed, within what the context leaves; refused where not even a plain grid fits."""
        left = self._generator.context - len(prompt.token_ids)
        least = self._service._grammars.least_tokens
        if left < least:
            raise RequestError(
                f"the prompt takes {len(prompt.token_ids)} of {self._generator.context} tokens, and an answer needs at "
                f"least {least}: shorten {self._query.field}, or serve with a larger --max-model-len",
                param=self._query.field,
            )
        asked = self._request.max_tokens
        budget = left if asked is None else max(1, min(left, asked - len(self._spoken.token_ids)))
        most = self._service._grammars.most_tokens(self._query.labels)
        if most is not None and budget < most:
            limit = "the context" if asked is None or asked > left else "max_tokens"
            self._warnings = [
                f"{limit} leaves {budget} tokens for the answer; the longest descriptor of these labels takes {most}, "
                "so that of a very crowded picture may be cut short (status truncated)"
            ]
        return budget

    async def _scored_pieces(self, prompt: Prompt) -> list[tuple[str, float]] | None:
        """The answer's tokens, with the probability the model gives them without a grammar; None without a mask."""
        if OPEN_TAG not in self._spoken.text:
            return None
        return await self._generator.token_probabilities(prompt, self._spoken.token_ids, f"{self._request_id}-score")

    def _answer(self) -> Answer:
        """What was said; without our grammar, on the grid that it has."""
        sides = {"height": self._profile.rows, "width": self._profile.columns}
        return decode_on_its_own_grid(self._spoken.text, **sides, labels=self._query.labels)

    async def _refine(self) -> _Refined | None:
        """What becomes of the masks of the answer's first descriptor; None where no refiner has to do with them."""
        refining, view = self._service._refiner_of(self._request), self._picture.view
        if refining is None or view is None:
            return None
        answer = await asyncio.to_thread(self._answer)
        if not answer.descriptors:
            return None
        if len(answer.descriptors[0].labels) == 1:  # all background
            return _Refined(Outcome.SKIPPED.value)
        num_masks = len(self._query.wanted or answer.descriptors[0].labels)
        if num_masks * self._picture.height * self._picture.width > MOST_REFINED:
            self._warnings.append(f"{num_masks} masks of this size are too many to be refined: they are coarse")
            return None
        found = await refining.refine(
            view,
            self._picture.id,
            self._picture.height,
            self._picture.width,
            lambda: [mask.mask_HW for mask in self._coarse_masks(answer, 0)],
        )
        return _Refined(FAILED) if found is None else _Refined(refining.name, found)

    def _coarse_masks(self, answer: Answer, block: int) -> Iterator[results.FoundMask]:
        picture = self._picture
        return results.masks_of(answer.descriptors[block], picture.height, picture.width, self._query.wanted)

    def _masks(self, answer: Answer, block: int, refined: _Refined | None) -> Iterator[results.FoundMask]:
        """Of one descriptor, refined where they were; only the first one is."""
        coarse = self._coarse_masks(answer, block)
        if refined is None or block:
            yield from coarse
        elif refined.masks is None:
            yield from (replace(mask, refiner=refined.refiner) for mask in coarse)
        else:
            for mask, new in zip(coarse, refined.masks, strict=True):
                yield results.refined(mask, new, refined.refiner)

    def _make_results(self, pieces: list[tuple[str, float]] | None, refined: _Refined | None) -> QueryDone:
        answer = self._answer()
        request, query, picture = self._request, self._query, self._picture
        if not answer.descriptors:
            return QueryDone((self._nothing(answer),))
        write = results.MaskOptions(request.mask_format, request.components)
        made: list[SegmentationResult] = []
        coco_masks: list[CocoMask] = []
        label_maps: list[LabelMap] = []
        for block, descriptor in enumerate(answer.descriptors):
            place = {"image_index": self._image_index, "query_index": query.index, "block": block}
            for found in self._masks(answer, block, refined):
                score = results.label_probability(pieces, answer, block, found.label) if pieces else None
                result = results.result_of(found, descriptor, write, index=len(made), **place)
                result.expression, result.score, result.forced = query.expression, score, self._is_forced
                result.warnings = list(self._warnings)
                made.append(result)
                if request.coco and not result.empty:
                    coco_masks.append(CocoMask(self._image_index, result.label or "", coco_rle(found.mask_HW), score))
            if request.mask_format is MaskFormat.LABEL_MAP:
                is_refined = block == 0 and refined is not None and refined.masks is not None
                drawn = self._masks(answer, block, refined) if is_refined else None
                label_maps.append(
                    results.label_map_of(descriptor, picture.height, picture.width, refined=drawn, **place)
                )
        return QueryDone(tuple(made), tuple(label_maps), tuple(coco_masks))

    def _nothing(self, answer: Answer) -> SegmentationResult:
        query = self._query
        label = restore(query.wanted[0]) if query.wanted and len(query.wanted) == 1 else None
        result = results.nothing_found(
            label, answer.text, index=0, image_index=self._image_index, query_index=query.index
        )
        result.expression, result.forced = query.expression, self._is_forced
        result.warnings = list(self._warnings)
        return result


def _queries_of(request: SegmentationRequest, check_text: Callable[[str, str], None]) -> list[Query]:
    """What to ask about each picture. An expression that no descriptor can carry becomes a query with an error.

    Raises RequestError for a class list, of which no class can be left out.
    """
    if request.everything:
        question = prompts.question(prompts.Subject.everything())
        return [Query(0, "everything", None, question, None, None)]
    if request.classes is not None:
        try:
            names = [_label(name, f"classes.{i}", check_text) for i, name in enumerate(request.classes)]
            by_key = {match_key(name): name for name in reversed(names)}
            wanted = tuple(by_key[key] for key in dict.fromkeys(map(match_key, names)) if key != BACKGROUND)
            question = prompts.question(prompts.Subject.classes(wanted))
        except LabelError as error:
            raise RequestError(str(error), param="classes") from error
        return [Query(0, "classes", None, question, wanted, wanted)]
    return [_referring(index, text, check_text) for index, text in enumerate(request.expressions or [])]


def _referring(index: int, expression: str, check_text: Callable[[str, str], None]) -> Query:
    name = f"expressions.{index}"
    try:
        label = _label(expression, name, check_text)
        question = prompts.question(prompts.Subject.refer(label))
    except LabelError as error:
        return Query(index, name, expression, "", None, None, RequestError(str(error), param=name))
    return Query(index, name, expression, question, (label,), (label,))


def _label(text: str, name: str, check_text: Callable[[str, str], None]) -> str:
    """The string that stands in the question and in the descriptor for what was asked. Raises LabelError."""
    label = substitute(text.strip())
    check_text(name, label)
    return label


def _coco_of(pictures: list[Picture], found: list[SegmentationResult], done: list[QueryDone]) -> dict[str, Any]:
    """All masks that are not empty as a COCO dataset; image ids are the request's indices."""
    images = [CocoImage(i, f"image-{i}", picture.width, picture.height) for i, picture in enumerate(pictures)]
    categories = list(dict.fromkeys(result.label for result in found if result.label))
    return coco_dataset(images, categories, [mask for query in done for mask in query.coco_masks])


def _failed(query: Query, image_index: int, error: RequestError) -> SegmentationResult:
    return SegmentationResult(
        index=0,
        image_index=image_index,
        query_index=query.index,
        expression=query.expression,
        label=query.expression,
        status="error",
        error=ResultError(message=str(error), type=error.type, param=error.param or query.field),
    )
