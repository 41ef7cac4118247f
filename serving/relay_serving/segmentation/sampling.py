"""How a segmentation model is sampled: forced after vLLM has merged the model's own defaults.

A repetition penalty, a `stop` or a repetition detector bends or ends a descriptor without an error, because a
descriptor repeats itself by design. A model's generation_config.json may set any of them for every request.
"""

from __future__ import annotations

from typing import Any

import msgspec
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

REFUSED_UNDER_SPECULATION = ("logit_bias", "min_p")


def descriptor_sampling(
    *,
    max_tokens: int,
    temperature: float = 0.0,
    seed: int | None = None,
    grammar: str | None = None,
    stop_token_ids: list[int] | None = None,
) -> SamplingParams:
    """Sampling of one answer of ours. Nothing of the model's generation_config enters, but its end-of-text tokens."""
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        stop_token_ids=stop_token_ids or [],
        structured_outputs=None if grammar is None else StructuredOutputsParams(grammar=grammar),
        output_kind=RequestOutputKind.DELTA,
        skip_special_tokens=True,
        spaces_between_special_tokens=False,
    )


def scoring() -> SamplingParams:
    """A pass over a prompt that tells the probability of each of its tokens. It reads nothing from the prefix cache."""
    return SamplingParams(
        max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
    )


def force(params: SamplingParams, *, temperature_was_asked: bool) -> SamplingParams:
    """A chat's merged parameters with all that bends a descriptor taken out again."""
    temperature = params.temperature if temperature_was_asked else 0.0
    is_greedy = temperature == 0.0
    forced: SamplingParams = msgspec.structs.replace(
        params,
        temperature=temperature,
        top_p=1.0 if is_greedy else params.top_p,
        top_k=0 if is_greedy else params.top_k,
        min_p=0.0 if is_greedy else params.min_p,
        repetition_penalty=1.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        min_tokens=0,
        stop=[],
        stop_token_ids=[],  # the model's own ends of text are added after this
        bad_words=[],
        ignore_eos=False,
        repetition_detection=None,
        output_text_buffer_length=0,
    )
    return forced


class SegmentationChatRequest(ChatCompletionRequest):  # type: ignore[misc]
    """A chat request about a picture: `to_sampling_params` is where vLLM merges, so it is where we force."""

    def to_sampling_params(self, max_tokens: int, default_sampling_params: dict[str, Any]) -> SamplingParams:
        params = super().to_sampling_params(max_tokens, default_sampling_params)
        return force(params, temperature_was_asked=self.temperature is not None)


def as_segmentation_request(request: ChatCompletionRequest) -> SegmentationChatRequest:
    """The same request, already validated, as the class that forces."""
    forced = SegmentationChatRequest.model_construct(_fields_set=request.model_fields_set, **request.__dict__)
    for name, value in (request.__pydantic_private__ or {}).items():
        setattr(forced, name, value)
    if request.__pydantic_extra__:
        forced.__pydantic_extra__ = dict(request.__pydantic_extra__)
    return forced
