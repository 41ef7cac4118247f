"""What `serve` makes of the folder of a trained adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from relay_serving.errors import ConversionError
from relay_serving.trained_adapters import servable

CONFIG = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "model_type": "qwen2_vl",
    "text4seg": {"grid": 12, "style": "plain"},
}


def adapter(folder: Path, **changes: object) -> Path:
    folder.mkdir(parents=True)
    settings = {
        "peft_type": "LORA",
        "r": 20,
        "lora_alpha": 40,
        "base_model_name_or_path": "hub/base",
        "modules_to_save": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps({**settings, **changes}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return folder


def test_another_folder_is_left_alone(tmp_path: Path) -> None:
    assert servable([str(tmp_path), "--port", "1"]) == [str(tmp_path), "--port", "1"]


def test_an_adapter_is_served_beside_its_base_under_the_name_of_its_run(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "dogs" / "adapter")
    base, *flags = servable([str(folder), "--port", "1"])
    assert base == "hub/base"
    assert flags[-2:] == ["--port", "1"]
    assert flags[flags.index("--lora-modules") + 1] == f"dogs={folder}"
    assert flags[flags.index("--max-lora-rank") + 1] == "32"
    assert flags[flags.index("--relay-segmentation") + 1] == "12"


def test_an_adapter_that_cannot_be_merged_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLLM_RELAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = adapter(tmp_path / "dogs", modules_to_save=["multi_modal_projector"])
    with pytest.raises(ConversionError, match="dogs cannot be served"):
        servable([str(folder)])
    assert "because it replaces multi_modal_projector" in capsys.readouterr().err
    assert not list((tmp_path / "cache" / "models").glob("adapter-*"))


def test_a_folder_with_half_an_adapter_is_named(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "dogs")
    (folder / "config.json").unlink()
    with pytest.raises(ConversionError, match=r"config\.json"):
        servable([str(folder)])
