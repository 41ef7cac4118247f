"""Other families than LLaVA in a real server: their own processors leave our square alone, and their grids come out."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from relay_models.text4seg.families.registry import require_family
from tiny_deepseek_vl2 import make_tiny_deepseek_vl2
from tiny_internvl import make_tiny_internvl
from tiny_internvl_chat import make_tiny_internvl_chat
from tiny_models import make_tiny_qwen2_vl
from tiny_server import GRID, TINY_FLAGS, picture_url

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

WORDS = 80  # a question's tokens in SmolLM2's words, those around it included
CHINESE_WORDS = 125  # with the system sentence of InternVL2, which SmolLM2 spells byte by byte


def make_qwen2_vl_that_enlarges(target: Path) -> Path:
    """With bounds of its own for pictures, of which it would make 676 tokens."""
    made = make_tiny_qwen2_vl(target)
    file = made / "processor_config.json"
    stored = json.loads(file.read_text())
    stored["image_processor"]["size"] = {"shortest_edge": 500_000, "longest_edge": 1_000_000}
    file.write_text(json.dumps(stored))
    return made


def make_internvl2_that_cuts(target: Path) -> Path:
    """That cuts every picture into two tiles at least."""
    made = make_tiny_internvl_chat(target)
    file = made / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"min_dynamic_patch": 2}))
    return made


needs_timm = pytest.mark.skipif(
    importlib.util.find_spec("timm") is None,
    reason="vLLM builds DeepSeek-VL2's vision tower with timm, which it does not install: pip install timm",
)


@pytest.mark.parametrize(
    ("make", "flags", "image_tokens", "words"),
    [
        pytest.param(make_tiny_qwen2_vl, (), 256, WORDS, id="qwen2-vl"),
        pytest.param(make_tiny_internvl_chat, ("--trust-remote-code",), 256, CHINESE_WORDS, id="internvl2"),
        pytest.param(make_qwen2_vl_that_enlarges, (), 256, WORDS, id="qwen2-vl-enlarging"),
        pytest.param(make_internvl2_that_cuts, ("--trust-remote-code",), 256, CHINESE_WORDS, id="internvl2-cutting"),
        pytest.param(make_tiny_internvl, (), 16, CHINESE_WORDS, id="internvl2-hf"),
        pytest.param(
            make_tiny_deepseek_vl2,
            ("--limit-mm-per-prompt", '{"image": 1}'),
            421,
            WORDS,
            id="deepseek-vl2",
            marks=needs_timm,
        ),
    ],
)
def test_a_family_answers_with_masks(
    make: Callable[[Path], Path],
    flags: tuple[str, ...],
    image_tokens: int,
    words: int,
    start_server: Callable[..., Any],
    tmp_path: Path,
) -> None:
    model = make(tmp_path / "model")
    family = require_family(json.loads((model / "config.json").read_text()))
    assert family.num_image_tokens == image_tokens
    with start_server(tmp_path / "server.log", str(model), *TINY_FLAGS, *flags) as server:
        answer = httpx.post(
            f"{server.url}/v1/segmentations",
            json={"image": picture_url(seed=1, width=300, height=80), "expressions": ["the thing", "the other"]},
            timeout=300,
        )
        assert answer.status_code == 200, answer.text
        body = answer.json()
        assert [result["status"] for result in body["results"]] == ["complete", "complete"], body["results"]
        assert [result["grid"] for result in body["results"]] == [[GRID, GRID]] * 2
        assert [result["mask"]["size"] for result in body["results"]] == [[80, 300]] * 2
        square = 2 * image_tokens  # a wide picture that is squashed has no fewer, and one that is tiled has more
        assert square < body["usage"]["prompt_tokens"] < square + 2 * words
        assert body["usage"]["prompt_tokens_details"]["cached_tokens"] <= body["usage"]["prompt_tokens"]
        picture = {"type": "image_url", "image_url": {"url": picture_url(seed=1, width=300, height=80)}}
        chat = {"messages": [{"role": "user", "content": [picture, {"type": "text", "text": "What is it?"}]}]}
        said = httpx.post(f"{server.url}/v1/chat/completions", json=chat | {"max_tokens": 4}, timeout=120)
        assert said.status_code == 200, said.text
        assert image_tokens < said.json()["usage"]["prompt_tokens"] < image_tokens + words
        assert "RelayAttention engaged" in server.log, "both questions share the picture"
    shutil.rmtree(model)  # pytest would keep it, and DeepSeek-VL2's tower is large
