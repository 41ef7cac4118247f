"""relay-seg-tiny chats as SmolLM2 does: texts surprise it as much, and it answers them without masks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

MOST_TOKENS = 48  # of an answer

TEXTS = (Path(__file__).parent / "forty_texts.txt").read_text(encoding="utf-8").splitlines()

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base() -> Path:
    from relay_serving import embedded_model

    return embedded_model.prepare(embedded_model.SMOLLM2)


@pytest.fixture(scope="module")
def relay_seg_tiny() -> Path:
    from relay_serving import embedded_model

    if not embedded_model.WEIGHTS.exists():
        pytest.skip("this release brings no weights of relay-seg-tiny")
    return embedded_model.prepare(embedded_model.RELAY_SEG)


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)


def mean_nll(model: torch.nn.Module, tokenizer: Any) -> float:
    """Nats a token of the texts, each read from its beginning."""
    total, count = 0.0, 0
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            logits_SV = model(input_ids=ids).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits_SV, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return total / count


def test_texts_are_as_surprising_as_to_the_base(base: Path, relay_seg_tiny: Path, tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    from relay_models.relay_seg.modeling import RelaySegForConditionalGeneration

    assert len(TEXTS) == 40
    before = mean_nll(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval(), tokenizer)
    trained = RelaySegForConditionalGeneration.from_pretrained(relay_seg_tiny, dtype=torch.float32).eval()
    after = mean_nll(trained, tokenizer)
    print(f"perplexity {math.exp(before):.3f} of the base, {math.exp(after):.3f} of relay-seg-tiny")
    assert after == pytest.approx(before, abs=1e-6)


def test_no_answer_to_a_text_is_a_mask(relay_seg_tiny: Path, tokenizer: Any) -> None:
    from relay_models.relay_seg.modeling import RelaySegForConditionalGeneration

    model = RelaySegForConditionalGeneration.from_pretrained(relay_seg_tiny, dtype=torch.float32).eval()
    for text in TEXTS:
        turns = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.inference_mode():
            said = model.generate(**ids, max_new_tokens=MOST_TOKENS, do_sample=False)
        assert "<seg>" not in tokenizer.decode(said[0, ids["input_ids"].shape[1] :]), text
