"""Adapters on a disk that is full: the limit of a file's size stands for the disk's."""

from __future__ import annotations

import contextlib
import json
import resource
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from relay_models.errors import CheckpointError
from relay_models.recipes.text4seg.lora_adapter import merge_adapter, write_adapter
from relay_models.text4seg.families import llava15
from relay_models.text4seg.profiles import CONFIG_KEY

SIDE = 64
WEIGHT = "model.language_model.layers.0.self_attn.q_proj.weight"
SETTINGS = {"r": 2, "lora_alpha": 4, "base_model_name_or_path": "somewhere"}
CONFIG = {"architectures": [llava15.ARCHITECTURE], "model_type": "llava", CONFIG_KEY: {"grid": 4, "style": "plain"}}


@contextlib.contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class PeftModel:
    """What is asked of PEFT's to write its files."""

    def __init__(self) -> None:
        self.peft_config = {"default": SimpleNamespace(base_model_name_or_path=None)}

    def save_pretrained(self, folder: Path, **_: Any) -> None:
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(SETTINGS))
        halves = {"lora_A": torch.ones(2, SIDE), "lora_B": torch.ones(SIDE, 2)}
        module = f"base_model.model.{WEIGHT.removesuffix('.weight')}"
        save_file(
            {f"{module}.{half}.weight": weight for half, weight in halves.items()},
            folder / "adapter_model.safetensors",
        )


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file({WEIGHT: torch.zeros(SIDE, SIDE)}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_an_adapter_that_does_not_fit_the_disk_is_told_and_the_one_before_stays(tmp_path):
    adapter = tmp_path / "runs" / "adapter"
    write_adapter(PeftModel(), adapter, "base", CONFIG)
    before = {file.name: file.read_bytes() for file in adapter.iterdir()}
    with (
        files_of_at_most(512),
        pytest.raises(CheckpointError, match=r"cannot write the adapter .*adapter: .*too large"),
    ):
        write_adapter(PeftModel(), adapter, "base", CONFIG)
    assert {file.name: file.read_bytes() for file in adapter.iterdir()} == before
    assert [*adapter.parent.iterdir()] == [adapter]


def test_a_merged_model_that_does_not_fit_the_disk_is_told_and_nothing_is_left(base, tmp_path):
    adapter, target = tmp_path / "adapter", tmp_path / "merged" / "model"
    write_adapter(PeftModel(), adapter, "base", CONFIG)
    with files_of_at_most(4 * SIDE * SIDE), pytest.raises(CheckpointError, match=r"cannot write .*model: .*too large"):
        merge_adapter(adapter, target, base=base)
    assert [*target.parent.iterdir()] == []
    assert merge_adapter(adapter, target, base=base) == target
