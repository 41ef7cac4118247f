"""A LoRA run without a model: a student of one weight, so that nothing but the run itself is asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from relay_models.errors import RelayModelsError
from relay_models.recipes.text4seg import lora_training
from relay_models.recipes.text4seg.lora_training import LoraOptions, _device, _Run


class OneWeight:
    """Its loss is what is given, of the step and the weight."""

    device = torch.device("cpu")
    family = SimpleNamespace(grid=4)

    def __init__(self, loss: Callable[[int, Tensor], Tensor]) -> None:
        self.model = torch.nn.Linear(1, 1, bias=False)
        self.steps = 0
        self._loss = loss

    def trained(self) -> dict[str, torch.nn.Parameter]:
        return dict(self.model.named_parameters())

    def is_of_projector(self, name: str) -> bool:
        return False

    def projected(self, features: None) -> None:
        return features

    def loss(self, sequence: Any, image: None) -> Tensor:
        self.steps += 1
        return self._loss(self.steps, self.model.weight)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., _Run]:
    sequence = SimpleNamespace(target_A=[1, 2], ids_S=[1, 2, 3])
    monkeypatch.setattr(_Run, "_batch", lambda run, step: iter([(None, sequence)]))
    monkeypatch.setattr(_Run, "_check_questions", lambda run: None)

    def make(loss: Callable[[int, Tensor], Tensor]) -> _Run:
        options = LoraOptions("model", tmp_path, steps=4, checkpoint_every=1, learning_rate=0.1)
        return _Run(options, OneWeight(loss), [], {})  # type: ignore[arg-type]

    return make


def without_gradient(weight: Tensor) -> Tensor:
    """0, whose gradient is infinity times 0."""
    return (0 * weight).sqrt().sum()


def exploding(weight: Tensor) -> Tensor:
    """0, and steeper than float32 holds."""
    return ((weight - weight.detach()) * 1e38 * 10).sum()


@pytest.mark.parametrize("loss", [without_gradient, exploding])
def test_a_gradient_that_is_no_number_changes_no_weight(run, tmp_path, loss):
    begun = run(lambda step, weight: (weight**2).sum() if step < 3 else loss(weight))
    with pytest.raises(RelayModelsError, match=r"the gradient of step 3 is (nan|inf): lower learning_rate \(0\.1\)"):
        begun.go(None)
    (weight,) = begun.trained.values()
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 2
    assert torch.isfinite(weight).all()
    assert weight.equal(saved["trained"]["weight"])


def test_a_loss_that_is_no_number_changes_no_weight(run, tmp_path):
    begun = run(lambda step, weight: (weight**2).sum() * (1 if step < 3 else float("nan")))
    with pytest.raises(RelayModelsError, match=r"the loss of step 3 is nan: lower learning_rate \(0\.1\)"):
        begun.go(None)
    (weight,) = begun.trained.values()
    assert weight.equal(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["trained"]["weight"])


def test_the_log_holds_what_the_module_says(run, tmp_path):
    run(lambda step, weight: (weight**2).sum()).go(None)
    (told,) = [line for line in (lora_training.__doc__ or "").splitlines() if "log.jsonl" in line]
    fields = told.partition("one line a step: ")[2].split(", ")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [list(line) for line in lines] == [fields] * 4


@pytest.mark.parametrize(
    ("name", "count", "known"),
    [
        ("cuda:1", 1, "cpu, cuda:0"),
        ("cuda:7", 2, "cpu, cuda:0, cuda:1"),
        ("cuda", 0, "cpu"),
        ("mps", 0, "cpu"),
        ("tpu", 1, "cpu, cuda:0"),
        ("cuda:-1", 1, "cpu, cuda:0"),
    ],
)
def test_a_device_that_is_not_here_is_named(monkeypatch, name, count, known):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(
        RelayModelsError, match=rf"device must be auto or one that PyTorch has here \({known}\), got '{name}'"
    ):
        _device(name)


def test_a_device_that_is_here_is_taken(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("cpu", "cuda", "cuda:0", "cuda:1"):
        assert _device(name) == torch.device(name)
    assert _device("auto") == torch.device("cuda")
