"""One answer of the served model about one picture, streamed, and scored if asked.

The prompt is the served model's own chat template with the picture first and the question after it, so that several
questions about one picture share everything up to the question: encoder run, prefix cache, relay group.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import uuid4

from PIL import Image
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import VLLMClientError
from vllm.sampling_params import SamplingParams

from relay_serving.segmentation.errors import RequestError, UnknownModelError
from relay_serving.segmentation.sampling import descriptor_sampling, scoring

_HALF_CHARACTER = "\ufffd"


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt, ready for the engine."""

    engine_input: Any
    lora_request: Any

    @property
    def token_ids(self) -> list[int]:
        return list(self.engine_input["prompt_token_ids"])

    def followed_by(self, token_ids: list[int]) -> Prompt:
        """The same prompt with what the model has said so far."""
        if not token_ids:
            return self
        grown = {**self.engine_input, "prompt_token_ids": [*self.token_ids, *token_ids]}
        grown.pop("prompt", None)
        return Prompt(grown, self.lora_request)


@dataclass
class Spoken:
    """What the engine has said to one prompt.

    Attributes:
        finish_reason: the engine's: stop, length, abort; None while it speaks.
        cached_tokens: prompt tokens found in the prefix cache.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0

    def take_back(self, end_token_ids: frozenset[int]) -> None:
        """Unsay the token that ended the answer, so that it can go on."""
        if self.token_ids and self.token_ids[-1] in end_token_ids:
            self.token_ids.pop()

    def followed_by(self, more: Spoken) -> Spoken:
        """Both, one after the other."""
        return replace(
            more,
            text=self.text + more.text,
            token_ids=self.token_ids + more.token_ids,
            prompt_tokens=self.prompt_tokens or more.prompt_tokens,
            # Of the prompt that was asked: what follows is asked with the answer's beginning, which is cached too.
            cached_tokens=self.cached_tokens if self.prompt_tokens else more.cached_tokens,
        )


class Generator:
    """Asks the served model.

    Args:
        chat: vLLM's OpenAIServingChat, whose template, adapters and checks apply.
        engine_client: vLLM's EngineClient.
    """

    def __init__(self, chat: Any, engine_client: Any) -> None:
        self._chat = chat
        self._engine_client = engine_client

    @property
    def context(self) -> int:
        """Tokens a prompt and its answer may have together."""
        return int(self._engine_client.model_config.max_model_len)

    @property
    def tokenizer(self) -> Any:
        return self._engine_client.renderer.tokenizer

    @property
    def end_token_ids(self) -> frozenset[int]:
        """Tokens that end an answer: the tokenizer's, and those of the model's generation_config."""
        config = self._engine_client.model_config.try_get_generation_config() or {}
        named = config.get("eos_token_id")
        ends = named if isinstance(named, list) else [named]
        return frozenset(token for token in (*ends, self.tokenizer.eos_token_id) if token is not None)

    async def warm_grammar(self, grammar: str) -> None:
        """Have the engine compile a grammar before the first request needs it: what is found out about free text serves
        every later one. Raises RequestError: the engine's structured outputs are off, or of a backend that cannot."""
        prompt = Prompt({"type": "token", "prompt_token_ids": [self.tokenizer.eos_token_id]}, None)
        params = descriptor_sampling(max_tokens=1, grammar=grammar)
        async with contextlib.aclosing(self.speak(prompt, params, f"seg-warm-{uuid4().hex}")) as outputs:
            async for _ in outputs:
                pass

    async def check_model(self, model: str | None) -> None:
        """Raises UnknownModelError."""
        refused = await self._chat._check_model(ChatCompletionRequest(model=model, messages=[]))
        if refused is not None:
            raise UnknownModelError(refused.error.message, param="model")

    async def prompt(self, picture: Image.Image, picture_id: str, question: str, model: str | None) -> Prompt:
        """Raises RequestError: an unknown model, or a prompt the model cannot take."""
        request = ChatCompletionRequest(
            model=model,
            messages=[
                {
                    "role": "user",
                    "content": [
                        {"type": "image_pil", "image_pil": picture, "uuid": picture_id},
                        {"type": "text", "text": question},
                    ],
                }
            ],
        )
        try:
            rendered = await self._chat.render_chat_request(request)
        except (VLLMClientError, ValueError) as error:
            raise RequestError(f"the model cannot take this prompt: {error}") from error
        if isinstance(rendered, ErrorResponse):
            raise RequestError(rendered.error.message, param=rendered.error.param)
        _, (engine_input,) = rendered
        return Prompt(engine_input, self._chat._maybe_get_adapters(request, supports_default_mm_loras=True))

    async def speak(self, prompt: Prompt, params: SamplingParams, request_id: str) -> AsyncGenerator[Spoken, None]:
        """Yields the same growing `Spoken` after each engine output. Closing the iterator aborts the request."""
        spoken = Spoken()
        stream = self._engine_client.generate(prompt.engine_input, params, request_id, lora_request=prompt.lora_request)
        try:
            async for output in stream:
                (answer,) = output.outputs
                spoken.text += answer.text
                spoken.token_ids += answer.token_ids
                spoken.finish_reason = answer.finish_reason
                spoken.prompt_tokens = len(output.prompt_token_ids or ())
                spoken.cached_tokens = output.num_cached_tokens or 0
                yield spoken
        except (VLLMClientError, ValueError) as error:
            raise RequestError(f"the engine refused the request: {error}") from error
        finally:
            await stream.aclose()

    async def token_probabilities(
        self, prompt: Prompt, token_ids: list[int], request_id: str
    ) -> list[tuple[str, float]]:
        """Each token of an answer as text, with the probability the model itself gives it, free of any grammar."""
        start = len(prompt.token_ids)
        pieces = pieces_of(token_ids, lambda ids: self.tokenizer.decode(ids, skip_special_tokens=True))
        found: list[tuple[str, float]] = []
        async for output in self._engine_client.generate(
            prompt.followed_by(token_ids).engine_input, scoring(), request_id, lora_request=prompt.lora_request
        ):
            for token_id, piece, candidates in zip(
                token_ids, pieces, (output.prompt_logprobs or [])[start:], strict=False
            ):
                found.append((piece, math.exp(candidates[token_id].logprob)))
        return found


def pieces_of(token_ids: Sequence[int], decode: Callable[[list[int]], str]) -> list[str]:
    """What each token adds to the text before it.

    A token alone may read otherwise: some tokenizers drop the space that a text begins with. Of tokens that share a
    character the last has all of it.
    """
    pieces: list[str] = []
    start = told = 0  # tokens [start, told) are the text that a new one is read after
    for end in range(1, len(token_ids) + 1):
        before, after = decode([*token_ids[start:told]]), decode([*token_ids[start:end]])
        if after.endswith(_HALF_CHARACTER) or len(after) <= len(before):
            pieces.append("")
            continue
        pieces.append(after[len(before) :])
        start, told = told, end
    return pieces
