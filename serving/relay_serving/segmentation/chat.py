"""`/v1/chat/completions` of a segmentation model: the usual answer, with masks where it holds `<seg>` blocks.

Stands in the place of vLLM's OpenAIServingChat in the server's state and asks it for everything; a chat without a
picture passes through untouched. Masks travel inside the ordinary objects: `message.segmentation` in a whole answer,
`choices[i].delta.segmentation` in a streamed one. Every list in a delta holds objects with an `index`, which is what
the openai client's stream helper needs to put deltas together.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest, ChatCompletionResponse
from vllm.sampling_params import StructuredOutputsParams

from relay_models.text4seg.codec import Answer, StreamDecoder, decode_on_its_own_grid
from relay_serving.schemas.segmentation import GrammarMode, MaskFormat
from relay_serving.segmentation import results
from relay_serving.segmentation.errors import RequestError
from relay_serving.segmentation.media import Picture, PictureReader
from relay_serving.segmentation.profile import SegmentationProfile
from relay_serving.segmentation.sampling import REFUSED_UNDER_SPECULATION, as_segmentation_request

OPTIONS_FIELD = "segmentation"
MOST_PICTURES = 16


@dataclass(frozen=True)
class ChatOptions:
    """`segmentation` in a chat request: how masks are written, and whether the grammar holds."""

    mask_format: MaskFormat = MaskFormat.COCO_RLE
    components: bool = False
    grammar: GrammarMode = GrammarMode.ON

    @classmethod
    def of(cls, request: ChatCompletionRequest) -> ChatOptions:
        given = (request.model_extra or {}).get(OPTIONS_FIELD)
        if given is None:
            return cls()
        if not isinstance(given, dict):
            raise RequestError(f"{OPTIONS_FIELD} must be an object, got {given!r}", param=OPTIONS_FIELD)
        return cls(
            mask_format=_choice(MaskFormat, given, "mask_format", cls.mask_format),
            grammar=_choice(GrammarMode, given, "grammar", cls.grammar),
            components=_boolean(given, "components"),
        )


@dataclass(frozen=True)
class Pictures:
    """The pictures of a conversation, and which of them the answer is about."""

    opened: tuple[Picture, ...]
    candidates: tuple[int, ...]

    def index_of(self, block: int) -> int:
        """Blocks go to the pictures of the last message that has any, in order; what is left over, to its last one."""
        return self.candidates[min(block, len(self.candidates) - 1)]


class SegmentingChat:
    """Follows the part of OpenAIServingChat that the chat route uses; the rest is its."""

    def __init__(
        self,
        chat: Any,
        reader: PictureReader,
        profile: SegmentationProfile,
        *,
        structural_tag: str,
        speculates: bool,
    ) -> None:
        self._chat = chat
        self._reader = reader
        self._profile = profile
        self._structural_tag = structural_tag
        self._speculates = speculates

    def __getattr__(self, name: str) -> Any:
        return getattr(self._chat, name)

    async def create_chat_completion(self, request: ChatCompletionRequest, raw_request: Any = None) -> Any:
        """As OpenAIServingChat's. Raises RequestError for a picture or an option that cannot be used."""
        self._refuse_what_speculation_refuses(request)
        if not _has_picture(request):
            return await self._chat.create_chat_completion(request, raw_request)
        options = ChatOptions.of(request)
        pictures = await self._take_pictures(request)
        forced = as_segmentation_request(request)
        if options.grammar is GrammarMode.ON and not _is_constrained(request):
            forced.structured_outputs = StructuredOutputsParams(structural_tag=self._structural_tag)
        answer = await self._chat.create_chat_completion(forced, raw_request)
        if isinstance(answer, ChatCompletionResponse):
            await asyncio.to_thread(self._add_masks, answer, pictures, options)
            return answer
        return self._stream(answer, pictures, options) if isinstance(answer, AsyncGenerator) else answer

    def _refuse_what_speculation_refuses(self, request: ChatCompletionRequest) -> None:
        if not self._speculates:
            return
        for name in REFUSED_UNDER_SPECULATION:
            if getattr(request, name, None):
                raise RequestError(
                    f"{name} cannot be used while the server drafts tokens; leave it out, or serve without "
                    "--relay-draft-rows and --speculative-config",
                    param=name,
                )

    async def _take_pictures(self, request: ChatCompletionRequest) -> Pictures:
        """Open every picture of the conversation, and put what the model will see in its place."""
        opened: list[Picture] = []
        last_message: list[int] = []
        for m, message in enumerate(request.messages):
            content = message.get("content")
            in_message: list[int] = []
            parts = [*content] if isinstance(content, list) else []
            for p, part in enumerate(parts):
                url = _picture_url(part)
                if url is None:
                    continue
                if len(opened) >= MOST_PICTURES:
                    raise RequestError(f"messages hold more than {MOST_PICTURES} pictures", param=f"messages.{m}")
                picture = await self._reader.read_url(url, f"messages.{m}.content.{p}.image_url.url")
                in_message.append(len(opened))
                opened.append(picture)
                parts[p] = {"type": "image_pil", "image_pil": picture.square, "uuid": picture.id}
            if in_message:
                message["content"] = parts
                last_message = in_message
        return Pictures(tuple(opened), tuple(last_message))

    def _add_masks(self, response: ChatCompletionResponse, pictures: Pictures, options: ChatOptions) -> None:
        for choice in response.choices:
            answer = self._read(choice.message.content or "")
            if answer.descriptors:
                choice.message.segmentation = self._masks(answer, pictures, options)

    def _read(self, text: str) -> Answer:
        """The client's own grammar, or none, may have let it have another grid."""
        return decode_on_its_own_grid(text, height=self._profile.rows, width=self._profile.columns)

    def _masks(self, answer: Answer, pictures: Pictures, options: ChatOptions) -> dict[str, Any]:
        written: list[dict[str, Any]] = []
        label_maps: list[dict[str, Any]] = []
        write = results.MaskOptions(options.mask_format, options.components)
        for block, descriptor in enumerate(answer.descriptors):
            image_index = pictures.index_of(block)
            picture = pictures.opened[image_index]
            for found in results.masks_of(descriptor, picture.height, picture.width, None):
                result = results.result_of(
                    found,
                    descriptor,
                    write,
                    index=len(written),
                    image_index=image_index,
                    query_index=block,
                    block=block,
                )
                written.append(result.model_dump(exclude={"query_index"}))
            if options.mask_format is MaskFormat.LABEL_MAP:
                label_map = results.label_map_of(
                    descriptor, picture.height, picture.width, image_index=image_index, query_index=block, block=block
                )
                label_maps.append({"index": block, **label_map.model_dump()})
        images = [
            {"index": index, "width": picture.width, "height": picture.height}
            for index, picture in enumerate(pictures.opened)
        ]
        head: dict[str, Any] = {"status": answer.status.value, "images": images, "masks": written}
        return {**head, "label_maps": label_maps} if label_maps else head

    async def _stream(
        self, events: AsyncGenerator[str, None], pictures: Pictures, options: ChatOptions
    ) -> AsyncGenerator[str, None]:
        """The engine's events with rows added as they end, and the masks in a delta before the finish."""
        choices: dict[int, _StreamedChoice] = {}
        try:
            async for event in events:
                chunk = _chunk_of(event)
                if chunk is None or not chunk.get("choices"):
                    yield event
                    continue
                for out in await self._with_segmentation(chunk, choices, pictures, options):
                    yield f"data: {json.dumps(out, ensure_ascii=False, separators=(',', ':'))}\n\n"
        finally:
            await events.aclose()

    async def _with_segmentation(
        self, chunk: dict[str, Any], choices: dict[int, _StreamedChoice], pictures: Pictures, options: ChatOptions
    ) -> list[dict[str, Any]]:
        (choice,) = chunk["choices"]
        index = choice["index"]
        if index not in choices:
            choices[index] = _StreamedChoice(StreamDecoder(self._profile.rows, self._profile.columns))
        streamed = choices[index]
        delta = choice["delta"]
        if rows := streamed.rows_of(delta.get("content") or ""):
            delta["segmentation"] = {"rows": rows}
        if choice.get("finish_reason") is None:
            return [chunk]
        answer = self._read(streamed.text)
        before: list[dict[str, Any]] = []
        finish = {**chunk, "choices": [{**choice, "delta": {}}]}
        if delta.get("content") or delta.get("segmentation"):
            before.append(_unfinished(chunk, choice, delta))
        if answer.descriptors:
            masks = await asyncio.to_thread(self._masks, answer, pictures, options)
            before.append(_unfinished(chunk, choice, {"segmentation": masks}))
        return [*before, finish]


@dataclass
class _StreamedChoice:
    decoder: StreamDecoder
    rows_sent: int = 0
    text: str = ""

    def rows_of(self, text: str) -> list[dict[str, Any]]:
        self.text += text
        rows = []
        for event in self.decoder.feed(text):
            rows.append(
                {
                    "index": self.rows_sent,
                    "block": event.block,
                    "row": event.row,
                    "runs": [
                        {"index": index, "label": label, "count": count}
                        for index, (label, count) in enumerate(results.runs_of(event))
                    ],
                }
            )
            self.rows_sent += 1
        return rows


def _unfinished(chunk: dict[str, Any], choice: dict[str, Any], delta: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in chunk.items() if name not in ("usage", "system_fingerprint")}
    return {**kept, "choices": [{"index": choice["index"], "delta": delta, "finish_reason": None}]}


def _chunk_of(event: str) -> dict[str, Any] | None:
    """An event's chunk; None for comments, errors and the end of the stream, which pass as they are."""
    if not event.startswith("data: {"):
        return None
    chunk = json.loads(event.removeprefix("data: "))
    return chunk if isinstance(chunk, dict) and "error" not in chunk else None


def _has_picture(request: ChatCompletionRequest) -> bool:
    return any(
        _picture_url(part) is not None
        for message in request.messages
        if isinstance(content := message.get("content"), list)
        for part in content
    )


def _picture_url(part: Any) -> str | None:
    """OpenAI's `image_url` part, also without its `type`, and the `input_image` of newer clients."""
    if not isinstance(part, dict):
        return None
    image = part.get("image_url")
    url = image.get("url") if isinstance(image, dict) else image
    return url if isinstance(url, str) else None


def _is_constrained(request: ChatCompletionRequest) -> bool:
    """The client brought a constraint of its own, which wins."""
    response_format = request.response_format
    return request.structured_outputs is not None or (response_format is not None and response_format.type != "text")


def _choice(kind: Any, given: dict[str, Any], name: str, default: Any) -> Any:
    if name not in given:
        return default
    try:
        return kind(given[name])
    except ValueError:
        field_name = f"{OPTIONS_FIELD}.{name}"
        known = ", ".join(kind)
        raise RequestError(f"{field_name} must be one of {known}, got {given[name]!r}", param=field_name) from None


def _boolean(given: dict[str, Any], name: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        field_name = f"{OPTIONS_FIELD}.{name}"
        raise RequestError(f"{field_name} must be true or false, got {value!r}", param=field_name)
    return value
