"""`vllm-relay serve` of a published checkpoint in the original layout: converted once, then served under its own id."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "models" / "text4seg"))
from upstream_llava import UpstreamLlava, copy_tokenizer, make_sentencepiece, write_config, write_tower, write_weights

from relay_serving import known_checkpoints
from relay_serving.errors import ConversionError

MODEL = "lmc22/text4seg-llava-7b-p24"
TOWER = "openai/clip-vit-large-patch14-336"


def publish(cache: Path, model_id: str, folder: Path) -> None:
    """Put a folder where the hub's library keeps what it has fetched."""
    kept = cache / f"models--{model_id.replace('/', '--')}"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, kept / "snapshots" / ("0" * 40))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("VLLM_RELAY_CACHE", str(tmp_path / "relay"))
    return cache


@pytest.fixture
def published(tmp_path: Path, hub: Path) -> Path:
    words = tmp_path / "words"
    words.mkdir()
    make_sentencepiece(words)
    model = UpstreamLlava(vocab_size=400)
    source = tmp_path / "source"
    write_config(source, model.config(mm_vision_tower=TOWER))
    copy_tokenizer(words, source)
    write_weights(source, {n: t for n, t in model.tensors().items() if not n.startswith("model.vision_tower.")})
    publish(hub, MODEL, source)
    publish(hub, TOWER, write_tower(tmp_path / "clip", model))
    return hub


def test_it_is_converted_once_and_served_under_its_id(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, *rest = known_checkpoints.servable([MODEL, "--port", "8001"])
    assert rest == ["--port", "8001", "--served-model-name", MODEL]
    config = json.loads((Path(folder) / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["text4seg"]["grid"] == 24
    assert Path(folder).is_relative_to(tmp_path / "relay")
    shutil.rmtree(published)  # a second start needs no hub
    assert known_checkpoints.servable([MODEL])[0] == folder


def test_a_name_the_user_chose_wins(published: Path) -> None:
    words = known_checkpoints.servable([MODEL, "--served-model-name", "mine"])
    assert words[1:] == ["--served-model-name", "mine"]


def test_a_hub_that_does_not_give_it_is_one_clear_line(hub: Path) -> None:
    with pytest.raises(ConversionError, match=MODEL):
        known_checkpoints.servable([MODEL])


@pytest.mark.parametrize("model", ["facebook/opt-125m", "./folder", "llava-hf/llava-1.5-7b-hf"])
def test_other_models_are_left_to_vllm(model: str, hub: Path) -> None:
    assert known_checkpoints.servable([model, "--port", "1"]) == [model, "--port", "1"]
