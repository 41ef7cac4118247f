"""How one base model is told from another, of which a run's cache and checkpoint are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from relay_models.recipes.text4seg.lora_student import fingerprint

NUM_BYTES = 6 << 20
MEBIBYTE = 1 << 20


def base(folder: Path, file: str = "model.safetensors", seed: int = 0) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / file).write_bytes(np.random.default_rng(seed).bytes(NUM_BYTES))
    return folder


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_equal_models_are_one_and_others_are_not(tmp_path, file):
    first, same, other = base(tmp_path / "a", file), base(tmp_path / "b", file), base(tmp_path / "c", file, seed=1)
    assert fingerprint(first) == fingerprint(same) != fingerprint(other)
    (same / "config.json").write_text('{"text_config": {}}')
    assert fingerprint(same) != fingerprint(first)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model-00001-of-00002.bin"])
@pytest.mark.parametrize("start", [0, 1.3, 2, 2.7, 3.5, 5])
def test_a_tensor_that_was_trained_is_another_model_wherever_it_is(tmp_path, file, start):
    """A tensor of a mebibyte: all but a few small ones of a model are larger."""
    folder = base(tmp_path / "a", file)
    before = fingerprint(folder)
    with (folder / file).open("r+b") as weights:
        weights.seek(int(start * MEBIBYTE))
        weights.write(np.random.default_rng(2).bytes(MEBIBYTE))
    assert fingerprint(folder) != before


def test_another_name_or_size_is_another_model(tmp_path):
    folder = base(tmp_path / "a")
    before = fingerprint(folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    renamed = fingerprint(folder)
    with (folder / "model-00001-of-00001.safetensors").open("ab") as weights:
        weights.write(b"\0")
    assert len({before, renamed, fingerprint(folder)}) == 3
