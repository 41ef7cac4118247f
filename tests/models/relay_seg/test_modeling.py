"""The Hugging Face module: pictures go where their placeholders are, and generating reads them once."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from relay_models.relay_seg.configuration import RelaySegConfig
from relay_models.relay_seg.modeling import RelaySegForConditionalGeneration, projector_sizes

IMAGE = 16


@pytest.fixture(scope="module")
def model() -> RelaySegForConditionalGeneration:
    text = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    config = RelaySegConfig(
        text_config=text, image_side=64, grid=2, projector_width=16, projector_layers=1, projector_heads=2,
        projector_classes=3, lora_rank=2, lora_alpha=4.0,
    )  # fmt: skip
    torch.manual_seed(0)
    made = RelaySegForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in (*made.language_model.parameters(), *made.projector.parameters()):
            parameter.normal_(std=0.3)
    return made


def ids(*numbers: int) -> torch.Tensor:
    return torch.tensor([numbers])


def test_tokens_stand_in_the_place_of_the_placeholders(model: RelaySegForConditionalGeneration) -> None:
    pixels = torch.randn(1, 3, 64, 64)
    sequence = ids(5, IMAGE, IMAGE, IMAGE, IMAGE, 7)
    with torch.no_grad():
        logits = model(input_ids=sequence, pixel_values=pixels).logits
        embeddings = model.get_input_embeddings()(sequence)
        embeddings[0, 1:5] = model.projector(model.encoder(pixels))[0]
        model._activation.follows_NS1 = torch.tensor([[0.0, 1, 1, 1, 1, 1]])[..., None]
        expected = model.language_model(inputs_embeds=embeddings).logits
    torch.testing.assert_close(logits, expected)


@pytest.fixture(scope="module")
def base(model: RelaySegForConditionalGeneration) -> LlamaForCausalLM:
    """The language model without its change."""
    made = LlamaForCausalLM(model.config.text_config).eval()
    kept = {name: t for name, t in model.language_model.state_dict().items() if ".lora_" not in name}
    made.load_state_dict(kept)
    return made


def test_a_text_without_a_picture_is_the_bases(model: RelaySegForConditionalGeneration, base: LlamaForCausalLM) -> None:
    sequence = ids(5, 7, IMAGE, 30, 31)  # somebody wrote the word that stands for a picture
    with torch.no_grad():
        assert torch.equal(model(input_ids=sequence).logits, base(input_ids=sequence).logits)
        written = model.generate(input_ids=sequence, max_new_tokens=6, do_sample=False)
        assert written.tolist() == base.generate(input_ids=sequence, max_new_tokens=6, do_sample=False).tolist()


def test_what_comes_before_a_picture_is_the_bases_and_what_follows_is_not(
    model: RelaySegForConditionalGeneration, base: LlamaForCausalLM
) -> None:
    sequence = ids(5, 7, 9, IMAGE, IMAGE, IMAGE, IMAGE, 30)
    embeddings = base.get_input_embeddings()(sequence)
    with torch.no_grad():
        found = model(input_ids=sequence, features=torch.zeros(1, 1728, 2, 2)).logits
        embeddings[0, 3:7] = model.projector(torch.zeros(1, 1728, 2, 2))[0]
        expected = base(inputs_embeds=embeddings).logits
    assert torch.equal(found[:, :3], expected[:, :3])
    assert (found[:, 3:] - expected[:, 3:]).abs().amax((0, 2)).min() > 1e-3


def test_sequences_of_a_batch_are_told_apart(model: RelaySegForConditionalGeneration) -> None:
    pixels = torch.randn(1, 3, 64, 64)
    seen, unseen = ids(5, IMAGE, IMAGE, IMAGE, IMAGE, 7), ids(5, 8, 9, 10, 11, 7)
    with torch.no_grad():
        both = model(input_ids=torch.cat((unseen, seen)), pixel_values=pixels).logits
        torch.testing.assert_close(both[:1], model(input_ids=unseen).logits)
        torch.testing.assert_close(both[1:], model(input_ids=seen, pixel_values=pixels).logits)


def test_cached_features_say_what_the_picture_says(model: RelaySegForConditionalGeneration) -> None:
    pixels = torch.randn(1, 3, 64, 64)
    sequence = ids(5, IMAGE, IMAGE, IMAGE, IMAGE, 7)
    with torch.no_grad():
        from_picture = model(input_ids=sequence, pixel_values=pixels).logits
        from_features = model(input_ids=sequence, features=model.encoder(pixels)).logits
    assert torch.equal(from_picture, from_features)


def test_generating_goes_on_as_reading_everything_again_would(model: RelaySegForConditionalGeneration) -> None:
    pixels = torch.randn(1, 3, 64, 64)
    sequence = ids(5, IMAGE, IMAGE, IMAGE, IMAGE, 7)
    with torch.no_grad():
        written = model.generate(input_ids=sequence, pixel_values=pixels, max_new_tokens=6, do_sample=False)
        again = sequence
        for _ in range(6):
            logits = model(input_ids=again, pixel_values=pixels).logits
            again = torch.cat((again, logits[:, -1:].argmax(-1)), 1)
    assert written.tolist() == again.tolist()


def test_another_number_of_placeholders_is_refused(model: RelaySegForConditionalGeneration) -> None:
    with pytest.raises(ValueError, match="holds 2 placeholders, the pictures make 4 tokens"):
        model(input_ids=ids(5, IMAGE, IMAGE), pixel_values=torch.randn(1, 3, 64, 64))
    with pytest.raises(ValueError, match="needs pixel_values or features"):
        model.image_tokens()


def test_a_saved_model_comes_back(model: RelaySegForConditionalGeneration, tmp_path) -> None:  # type: ignore[no-untyped-def]
    model.save_pretrained(tmp_path)
    loaded = RelaySegForConditionalGeneration.from_pretrained(tmp_path).eval()
    sequence = ids(5, IMAGE, IMAGE, IMAGE, IMAGE, 7)
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(input_ids=sequence, pixel_values=pixels).logits,
            model(input_ids=sequence, pixel_values=pixels).logits,
        )
    assert loaded.config.grid == 2
    assert loaded.config.text_config.hidden_size == 32


def test_the_projector_decides_by_the_thresholds_of_the_config() -> None:
    config = RelaySegConfig(projector_present_above=0.2, projector_named_above=0.3)
    sizes = projector_sizes(config)
    assert (sizes.present_above, sizes.named_above) == (0.2, 0.3)
    older = projector_sizes(RelaySegConfig())
    assert (older.present_above, older.named_above) == (0.03, 0.1), "of weights whose files do not say"
