"""What becomes of a request when its answers are not what one hopes for: refusals, faults, several descriptors.

The engine's faults cannot be had on demand from a real one, so its words are scripted here; all else is real.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import pytest
from PIL import Image
from vllm.sampling_params import SamplingParams

from relay_models.refine.interface import Outcome, RefinedMask
from relay_models.text4seg.families import llava15
from relay_models.text4seg.families.registry import require_family
from relay_models.text4seg.grammar import MAX_FREE_CHARACTERS
from relay_serving.routes.segmentations import _Bodies
from relay_serving.schemas.segmentation import SegmentationRequest, SegmentationResponse
from relay_serving.segmentation import service
from relay_serving.segmentation.errors import BusyError, RequestError
from relay_serving.segmentation.generation import Prompt, Spoken
from relay_serving.segmentation.grammars import Grammars
from relay_serving.segmentation.media import Picture
from relay_serving.segmentation.profile import SegmentationProfile
from relay_serving.segmentation.sampling import force
from relay_serving.segmentation.service import AllDone, SegmentationService

GRID = 2
FAMILY = require_family({"architectures": [llava15.ARCHITECTURE]}).with_grid(GRID)
CAT = "<seg>cat *1| others *1\n cat *2\n</seg>"
EMPTY = "<seg>others *2\n others *2\n</seg>"


class ScriptedGenerator:
    """Says, for each question that holds a key, one part of the text after another; an exception is raised.

    Each part is (text, finish reason), one for each time the model is asked to go on.
    """

    context = 4096
    end_token_ids = frozenset({0})

    def __init__(self, script: dict[str, Sequence[tuple[str, str | None] | Exception]]) -> None:
        self._script = {key: list(parts) for key, parts in script.items()}
        self.heard: list[list[int]] = []  # the prompts, as tokens

    async def check_model(self, model: str | None) -> None:
        pass

    async def prompt(self, picture: Image.Image, picture_id: str, question: str, model: str | None) -> Prompt:
        (key,) = (key for key in self._script if key in question)
        return Prompt({"prompt_token_ids": [1], "key": key}, None)

    async def speak(self, prompt: Prompt, params: Any, request_id: str) -> AsyncGenerator[Spoken, None]:
        part = self._script[prompt.engine_input["key"]].pop(0)
        if isinstance(part, Exception):
            raise part
        self.heard.append(prompt.token_ids)
        text, finish_reason = part
        yield Spoken(text, [5, 0], finish_reason, prompt_tokens=1)


class OnePicture:
    async def read_bytes(self, data: bytes, field: str) -> Picture:
        return Picture(Image.new("RGB", (8, 8)), "id", width=6, height=4, view=Image.new("RGB", (8, 8)))


class CountingRefiner:
    """Gives masks back as they are, and counts them."""

    name = "counting"
    refined = 0

    fails = False

    async def refine(
        self, view: Any, picture_id: str, height: int, width: int, draw: Callable[[], Sequence[Any]]
    ) -> list[Any] | None:
        coarse = draw()
        self.refined += len(coarse)
        if self.fails:
            return None
        return [RefinedMask(mask.astype(bool), Outcome.REFINED) for mask in coarse]


def answered(
    script: dict[str, Any] | ScriptedGenerator,
    *,
    uploads: int = 1,
    refiner: CountingRefiner | None = None,
    **fields: Any,
) -> SegmentationResponse:
    generator = script if isinstance(script, ScriptedGenerator) else ScriptedGenerator(script)
    answering = SegmentationService(
        OnePicture(),  # type: ignore[arg-type]
        generator,  # type: ignore[arg-type]
        SegmentationProfile(FAMILY),
        Grammars(GRID, GRID, len),
        model_name="m",
        most_queries=64,
        refining=refiner,  # type: ignore[arg-type]
    )

    async def run() -> SegmentationResponse:
        async for event in answering.events(SegmentationRequest.model_validate(fields), [b""] * uploads):
            if isinstance(event, AllDone):
                return event.response
        raise AssertionError("no end")

    return asyncio.run(run())


def test_a_fault_of_one_query_leaves_the_others() -> None:
    script = {"dog": [KeyError("ours")], "cat": [(CAT, "stop")], "cow": [ValueError("theirs")]}
    dog, cat, cow = answered(script, expressions=["dog", "cat", "cow"]).results
    assert (cat.status, cat.empty, cat.label) == ("complete", False, "cat")
    for result, name in ((dog, "expressions.0"), (cow, "expressions.2")):
        assert (result.status, result.mask) == ("error", None)
        assert result.error is not None
        assert (result.error.param, result.error.type) == (name, "InternalServerError")
        assert "ours" not in result.error.message, "the inside of the server is nobody's business"


def test_an_answer_that_breaks_off_before_a_mask_is_an_error_and_no_refusal() -> None:
    (result,) = answered({"cat": [("It is", "abort")]}, expressions=["cat"]).results
    assert (result.status, result.forced) == ("error", False)
    assert result.error is not None
    assert "abort" in result.error.message


def test_the_rows_of_an_answer_that_breaks_off_are_kept() -> None:
    (result,) = answered({"cat": [("<seg>cat *2\n ca", "error")]}, expressions=["cat"]).results
    assert (result.status, result.area, result.box) == ("truncated", 12, (0, 0, 6, 2))
    assert any("error" in warning for warning in result.warnings)


def test_a_refusal_is_made_to_go_on_and_says_so() -> None:
    generator = ScriptedGenerator({"cat": [("No cat.", "stop"), (f"\n{EMPTY}", "stop")]})
    (result,) = answered(generator, expressions=["cat"]).results
    assert (result.status, result.forced, result.empty, result.answer) == ("complete", True, True, "No cat.\n")
    assert generator.heard == [[1], [1, 5]], "it goes on after what it said, the end of the text taken back"


def test_a_refusal_may_be_had() -> None:
    (result,) = answered({"cat": [("No cat.", "stop")]}, expressions=["cat"], on_refusal="return").results
    assert (result.status, result.forced, result.mask, result.answer) == ("none", False, None, "No cat.")


def test_talk_that_is_cut_before_a_mask_was_not_forced_to_draw_one() -> None:
    (result,) = answered({"cat": [("x" * MAX_FREE_CHARACTERS, "length")]}, expressions=["cat"], max_tokens=20).results
    assert (result.status, result.forced) == ("none", False)


@pytest.mark.parametrize(("talk", "forced"), [(MAX_FREE_CHARACTERS, True), (MAX_FREE_CHARACTERS - 1, False)])
def test_a_mask_drawn_where_no_more_talk_is_allowed_is_forced(talk: int, forced: bool) -> None:
    (result,) = answered({"cat": [("x" * talk + CAT, "stop")]}, expressions=["cat"]).results
    assert (result.status, result.forced) == ("complete", forced)


def test_the_background_is_no_class_however_it_is_spelt() -> None:
    response = answered({"cat": [(CAT, "stop")]}, classes=["Others", "cat", "CAT", "dog"])
    assert [(result.label, result.status, result.empty) for result in response.results] == [
        ("cat", "complete", False),
        ("dog", "complete", True),
    ]


def test_all_descriptors_of_a_free_answer_come_back() -> None:
    script = {"cat": [(f"Here: {CAT} or {EMPTY}", "stop")]}
    response = answered(script, expressions=["cat"], grammar="off", mask_format="label_map")
    assert [(result.block, result.index, result.empty) for result in response.results] == [(0, 0, False), (1, 1, True)]
    assert [result.answer for result in response.results] == ["Here: ", " or "]
    assert response.label_maps is not None
    assert [label_map.block for label_map in response.label_maps] == [0, 1]


def test_everything_that_is_background_is_an_empty_mask() -> None:
    (result,) = answered({"": [("<seg>others *1\n others *2\n</seg>", "stop")]}, everything=True).results
    assert (result.label, result.empty, result.grid, result.repairs) == (None, True, (2, 2), ["row_short"])
    assert result.mask is not None


def test_a_free_answer_is_read_on_its_own_grid() -> None:
    four = "<seg>" + "cat *2| others *2\n cat *4\n others *4\n others *4\n" + "</seg>"
    (result,) = answered({"cat": [(four, "stop")]}, expressions=["cat"], grammar="off").results
    assert (result.status, result.grid, result.box) == ("complete", (4, 4), (0, 0, 6, 2))


@pytest.mark.parametrize(("most", "refined"), [(48, 2), (47, 0)])
def test_masks_that_need_too_much_memory_stay_coarse_and_say_so(
    monkeypatch: pytest.MonkeyPatch, most: int, refined: int
) -> None:
    monkeypatch.setattr(service, "MOST_REFINED", most)
    refiner = CountingRefiner()
    response = answered({"cat": [(CAT, "stop")]}, classes=["cat", "dog"], refiner=refiner)
    assert refiner.refined == refined
    assert [result.area for result in response.results] == [18, 0]
    for result in response.results:
        assert result.refiner == ("counting" if refined else None)
        assert bool(result.warnings) is not bool(refined)


def test_refining_that_failed_leaves_the_coarse_masks_and_says_so() -> None:
    refiner = CountingRefiner()
    refiner.fails = True
    response = answered({"cat": [(CAT, "stop")]}, classes=["cat", "dog"], refiner=refiner)
    assert [(result.area, result.refiner) for result in response.results] == [(18, "failed"), (0, "failed")]


def test_an_answer_of_background_alone_is_nothing_to_refine() -> None:
    refiner = CountingRefiner()
    (result,) = answered({"": [(EMPTY, "stop")]}, everything=True, refiner=refiner).results
    assert (result.empty, result.refiner, refiner.refined) == (True, "skipped", 0)


def test_nothing_but_the_end_of_the_text_ends_a_descriptor() -> None:
    params = SamplingParams(stop=["cat"], stop_token_ids=[5], min_tokens=3, repetition_penalty=1.2)
    forced = force(params, temperature_was_asked=False)
    assert (forced.stop, forced.stop_token_ids, forced.min_tokens, forced.repetition_penalty) == ([], [], 0, 1.0)


def test_uploads_and_urls_are_counted_together() -> None:
    with pytest.raises(RequestError, match="9 pictures") as refused:
        answered({"cat": []}, expressions=["cat"], uploads=8, image="data:,")
    assert refused.value.param == "images"


def test_bodies_are_held_together_and_let_go() -> None:
    bodies = _Bodies(10)
    with bodies.held() as first:
        first(6)
        with bodies.held() as second:
            second(4)
            with pytest.raises(BusyError) as refused:
                second(1)
            assert refused.value.retry_after
        first(4)
    with bodies.held() as third:
        third(10)
