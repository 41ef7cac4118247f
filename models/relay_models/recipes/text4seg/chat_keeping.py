"""What keeps the chat of a small language model as it was: its own answers, learnt again while it learns to segment.

The base model is asked `QUESTIONS` and its answers, drawn with a fixed seed, are trained on beside the descriptors
(self-distillation: nothing is taught that it did not say before).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

_TOPICS = (
    "the water cycle",
    "a recipe for pancakes",
    "how airplanes fly",
    "the history of Rome",
    "a poem about autumn",
    "tips for learning a language",
    "what a computer is",
    "how to plant tomatoes",
    "the planets of the solar system",
    "a short story about a fox",
    "the rules of chess",
    "how bread is made",
    "why the sky is blue",
    "a letter to a friend",
    "good habits for sleeping",
    "the life of a bee",
    "how to fix a flat tyre",
    "what music theory is",
    "a list of European capitals",
    "the seasons",
    "photosynthesis",
    "a dialogue between two shopkeepers",
    "how the heart works",
    "basic Python loops",
    "what inflation means",
    "a packing list for a trip",
    "volcanoes",
    "the invention of printing",
    "a joke about cats",
    "how to write an email to a boss",
    "differences between cats and dogs",
    "healthy breakfasts",
    "the moon",
    "electric cars",
    "what a database is",
    "a story about a lighthouse",
    "how rivers form",
    "a summary of Hamlet",
    "the metric system",
    "mindfulness",
)
_FORMS = ("Tell me about {}.", "Explain {} in simple words.", "Write something short on {}.")
QUESTIONS = (
    *(_FORMS[index % len(_FORMS)].format(topic) for index, topic in enumerate(_TOPICS)),
    "Hello! Who are you?",
    "What is 12 plus 30?",
    "Translate 'good morning' to French.",
    "Give me three ideas for a birthday present.",
    "Is it raining in a desert often?",
    "Continue: Once upon a time",
    "What is the capital of France?",
    "How are you today?",
    "Write a Python function that adds two numbers.",
    "List five animals.",
    "What can I cook with eggs and rice?",
    "Thank you!",
)
_ANSWER_TOKENS = 130
_BATCH = 26


def read_or_make_chats(file: Path, base: Path, tokenizer: Any, seed: int) -> list[tuple[str, str]]:
    """Questions with the base's answers, from ``file``, which is written first if it is not there."""
    if not file.exists():
        unfinished = file.with_suffix(".part")
        unfinished.write_text(json.dumps(_answered(base, tokenizer, seed)), encoding="utf-8")
        os.replace(unfinished, file)
    return [(question, answer) for question, answer in json.loads(file.read_text(encoding="utf-8"))]


@torch.inference_mode()
def _answered(base: Path, tokenizer: Any, seed: int) -> list[tuple[str, str]]:
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval()
    answered = []
    for start in range(0, len(QUESTIONS), _BATCH):
        asked = QUESTIONS[start : start + _BATCH]
        turns = [[{"role": "user", "content": question}] for question in asked]
        prompts = [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        written = model.generate(
            **inputs,
            max_new_tokens=_ANSWER_TOKENS,
            do_sample=True,
            temperature=0.8,
            top_p=0.95,
            pad_token_id=tokenizer.pad_token_id,
        )
        answers = tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answered += list(zip(asked, answers, strict=True))
    return answered
