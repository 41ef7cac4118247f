"""transformers' SAM as a refiner: against transformers' own pre- and post-processing, and what is promised of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from drawn_picture import HEIGHT, WIDTH, coarse_disc, drawn_picture
from PIL import Image
from random_sam import random_sam

from relay_models.errors import CheckpointError, RelayModelsError
from relay_models.refine.frame import Frame
from relay_models.refine.interface import Outcome, Refiner, finish, iou
from relay_models.refine.prompts import Prediction, Style, prompt_of
from relay_models.refine.sam import Sam

SIDE = 64


@pytest.fixture(scope="module")
def sam(random_sam_folder) -> Sam:
    return Sam.from_pretrained(str(random_sam_folder))


class CountingSam(Sam):
    embedded = 0

    def embed(self, view):
        self.embedded += 1
        return super().embed(view)


def masks(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    found = []
    for _ in range(count):
        y, x = rng.integers(0, HEIGHT - 60), rng.integers(0, WIDTH - 60)
        mask_HW = np.zeros((HEIGHT, WIDTH), dtype=bool)
        mask_HW[y : y + 60, x : x + 60] = True
        found.append(mask_HW)
    return found


def prediction(logits_MM: np.ndarray) -> Prediction:
    return Prediction(logits_MM.astype(np.float32), 0.9)


@pytest.mark.parametrize(("width", "height"), [(300, 200), (120, 190), (64, 64)])
def test_a_mask_is_the_one_that_transformers_own_processor_and_model_make(sam, random_sam_folder, width, height):
    from transformers import SamImageProcessor, SamModel, SamProcessor

    picture = drawn_picture().resize((width, height))
    box = [10, 30, 50, 55]
    sizes = {"size": {"longest_edge": SIDE}, "pad_size": {"height": SIDE, "width": SIDE}}
    processor = SamProcessor(
        SamImageProcessor(**sizes, mask_size={"longest_edge": 16}, mask_pad_size={"height": 16, "width": 16})
    )
    model = SamModel.from_pretrained(random_sam_folder)
    inputs = processor(picture, input_boxes=[[box]], return_tensors="pt")
    with torch.inference_mode():
        outputs = model(**inputs, multimask_output=False)
    (theirs,) = processor.image_processor.post_process_masks(
        outputs.pred_masks,
        inputs["original_sizes"],
        inputs["reshaped_input_sizes"],
        binarize=False,
        pad_size={"height": SIDE, "width": SIDE},
    )
    mask_HW = np.zeros((height, width), dtype=bool)
    mask_HW[box[1] : box[3] + 1, box[0] : box[2] + 1] = True
    frame = Frame(height, width, SIDE)
    prompt = prompt_of(mask_HW, frame, Style.BOX, mask_side=sam.mask_side)
    (ours,) = sam.predict(sam.embed(frame.view(picture)), [prompt])
    np.testing.assert_allclose(frame.restore(ours.logits_MM), theirs[0, 0], atol=2e-2)
    assert np.abs(theirs.numpy()).max() > 0.2


def test_a_picture_is_encoded_once_for_all_its_masks_and_not_at_all_for_none():
    sam = CountingSam(random_sam(SIDE))
    refiner = Refiner(sam)
    found = refiner.refine(drawn_picture(), masks(3))
    assert len(found) == 3
    assert sam.embedded == 1
    empty = np.zeros((HEIGHT, WIDTH), dtype=bool)
    assert [mask.outcome for mask in refiner.refine(drawn_picture(), [empty, empty])] == [Outcome.SKIPPED] * 2
    assert refiner.refine(drawn_picture(), []) == []
    assert sam.embedded == 1


def test_masks_keep_their_order_around_an_empty_one(sam):
    first, second = masks(2)
    empty = np.zeros((HEIGHT, WIDTH), dtype=bool)
    alone = [Refiner(sam).refine(drawn_picture(), [mask])[0].mask_HW for mask in (first, second)]
    together = Refiner(sam).refine(drawn_picture(), [first, empty, second])
    assert together[1].outcome is Outcome.SKIPPED
    np.testing.assert_array_equal(together[0].mask_HW, alone[0])
    np.testing.assert_array_equal(together[2].mask_HW, alone[1])


def test_the_same_picture_and_masks_give_the_same_result(sam):
    first, second = (Refiner(sam).refine(drawn_picture(), masks(2)) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one.mask_HW, other.mask_HW)
        assert one.score == other.score


def test_logits_are_fed_back_as_often_as_the_style_says(sam):
    frame = Frame(HEIGHT, WIDTH, SIDE)
    embedding = sam.embed(frame.view(drawn_picture()))
    prompt = prompt_of(coarse_disc(), frame, Style.POINTS_LOGITS, mask_side=sam.mask_side)
    once = prompt_of(coarse_disc(), frame, Style.POINTS_LOGITS_ONCE, mask_side=sam.mask_side)
    expected = once
    for _ in range(3):
        (found,) = sam.predict(embedding, [expected])
        expected = type(once)(once.points_P2, once.labels_P, once.box, found.logits_MM, 1)
    np.testing.assert_allclose(sam.predict(embedding, [prompt])[0].logits_MM, found.logits_MM, atol=1e-5)


def test_the_mask_prompt_matters(sam):
    frame = Frame(HEIGHT, WIDTH, SIDE)
    embedding = sam.embed(frame.view(drawn_picture()))
    with_logits, without = (
        sam.predict(embedding, [prompt_of(coarse_disc(), frame, style, mask_side=sam.mask_side)])[0].logits_MM
        for style in (Style.BOX_LOGITS, Style.BOX)
    )
    assert np.abs(with_logits - without).max() > 0.01


# ---------------------------------------------------------------- what is taken


def frame_and_halves() -> tuple[Frame, np.ndarray, np.ndarray]:
    """A square picture, and its left and right half."""
    left_HW = np.zeros((256, 256), dtype=bool)
    left_HW[:, :128] = True
    return Frame(256, 256), left_HW, ~left_HW


def test_a_refined_mask_that_is_empty_or_elsewhere_is_not_taken():
    frame, left_HW, right_HW = frame_and_halves()
    nothing = prediction(np.full((256, 256), -3.0))
    elsewhere = prediction(np.where(right_HW, 5.0, -5.0))
    there = prediction(np.where(left_HW, 5.0, -5.0))
    found = finish([left_HW] * 3, [nothing, elsewhere, there], frame)
    assert [mask.outcome for mask in found] == [Outcome.KEPT, Outcome.KEPT, Outcome.REFINED]
    for mask in found:
        assert iou(mask.mask_HW, left_HW) > 0.99


def test_where_masks_overlap_the_largest_logit_wins_and_the_first_of_equals():
    frame, left_HW, _ = frame_and_halves()
    top_HW = left_HW.T
    weak = prediction(np.where(left_HW, 2.0, -9.0))
    strong = prediction(np.where(top_HW, 3.0, -9.0))
    found = finish([left_HW, top_HW], [weak, strong], frame, disjoint=True)
    assert not (found[0].mask_HW & found[1].mask_HW).any()
    assert found[1].mask_HW[:120, :120].all()
    assert found[0].mask_HW[140:, :120].all()


def test_a_mask_that_would_lose_nearly_all_of_itself_keeps_its_coarse_pixels():
    """A shirt on a person of whom the segmenter draws all, and with more certainty."""
    frame, left_HW, right_HW = frame_and_halves()
    everything = prediction(np.full((256, 256), 12.0))
    shirt = prediction(np.where(left_HW, 5.0, -5.0))
    for order in ((0, 1), (1, 0)):
        coarse, predictions = [left_HW, right_HW], [shirt, everything]
        found = finish([coarse[i] for i in order], [predictions[i] for i in order], frame, disjoint=True)
        shirt_mask, person = (found[order.index(i)] for i in (0, 1))
        np.testing.assert_array_equal(shirt_mask.mask_HW, left_HW)
        np.testing.assert_array_equal(person.mask_HW, right_HW)
        assert (shirt_mask.outcome, person.outcome) == (Outcome.KEPT, Outcome.REFINED)


def test_a_coarse_mask_that_stays_keeps_its_pixels():
    frame, left_HW, right_HW = frame_and_halves()
    everything = prediction(np.full((256, 256), 12.0))
    nothing = prediction(np.full((256, 256), -3.0))
    found = finish([right_HW, left_HW], [everything, nothing], frame, disjoint=True)
    np.testing.assert_array_equal(found[1].mask_HW, left_HW)
    np.testing.assert_array_equal(found[0].mask_HW, right_HW)
    assert [mask.outcome for mask in found] == [Outcome.REFINED, Outcome.KEPT]


def test_masks_that_take_each_others_pixels_one_after_the_other_all_stay_coarse():
    """Each is put back in a round of its own, and takes the next one's pixels with it."""
    frame, _, _ = frame_and_halves()
    number = 6
    strips = [np.zeros((256, 256), dtype=bool) for _ in range(number)]
    for index, strip_HW in enumerate(strips):
        strip_HW[:, 40 * index : 40 * index + 40] = True
    swept = [np.where(np.roll(strip_HW, 40, axis=1) | strip_HW, 3.0 + i, -5.0) for i, strip_HW in enumerate(strips)]
    found = finish(strips, [prediction(logits) for logits in swept], frame, disjoint=True)
    assert sum(mask.mask_HW.astype(int) for mask in found).max() <= 1
    for mask, strip_HW in zip(found, strips, strict=True):
        assert iou(mask.mask_HW, strip_HW) >= 0.3


def test_equal_masks_cannot_both_have_their_pixels():
    frame, left_HW, _ = frame_and_halves()
    weak = prediction(np.where(left_HW, 2.0, -9.0))
    first, second = finish([left_HW, left_HW], [weak, weak], frame, disjoint=True)
    np.testing.assert_array_equal(first.mask_HW, left_HW)
    assert not second.mask_HW.any()


def test_one_mask_alone_is_the_same_disjoint_or_not():
    frame, left_HW, _ = frame_and_halves()
    weak = prediction(np.where(left_HW, 2.0, -9.0))
    plain, disjoint = (finish([left_HW], [weak], frame, disjoint=value)[0] for value in (False, True))
    np.testing.assert_array_equal(plain.mask_HW, disjoint.mask_HW)


# ---------------------------------------------------------------- what is refused


def test_a_model_of_another_type_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(CheckpointError, match="is a model of type 'clip'; a refiner must be a SAM"):
        Sam.from_pretrained(str(tmp_path))


def test_a_folder_without_weights_is_refused(random_sam_folder, tmp_path):
    (tmp_path / "config.json").write_text((random_sam_folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match="cannot load the SAM"):
        Sam.from_pretrained(str(tmp_path))


def test_a_folder_that_lacks_a_weight_is_refused(random_sam_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    (tmp_path / "config.json").write_text((random_sam_folder / "config.json").read_text())
    state = load_file(random_sam_folder / "model.safetensors")
    del state["mask_decoder.iou_token.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks the weight mask_decoder\.iou_token\.weight"):
        Sam.from_pretrained(str(tmp_path))


def test_pictures_that_do_not_fit_are_refused(sam):
    with pytest.raises(RelayModelsError, match="longest side of 64, got RGB of 65x20"):
        sam.embed(Image.new("RGB", (65, 20)))
    with pytest.raises(RelayModelsError, match="picture must be RGB, got L"):
        Refiner(sam).refine(Image.new("L", (WIDTH, HEIGHT)), masks(1))
