"""Another family than LLaVA in a real server: its own processor leaves our square alone, and its grid comes out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from relay_models.text4seg.families import qwen2_vl
from tiny_models import make_tiny_qwen2_vl
from tiny_server import GRID, TINY_FLAGS, picture_url

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_qwen2_vl_answers_with_masks(start_server: Callable[..., Any], tmp_path: Path) -> None:
    model = make_tiny_qwen2_vl(tmp_path / "tiny-qwen2-vl")
    with start_server(tmp_path / "server.log", str(model), *TINY_FLAGS) as server:
        answer = httpx.post(
            f"{server.url}/v1/segmentations",
            json={"image": picture_url(seed=1, width=300, height=80), "expressions": ["the thing", "the other"]},
            timeout=300,
        )
        assert answer.status_code == 200, answer.text
        body = answer.json()
        assert [result["status"] for result in body["results"]] == ["complete", "complete"]
        assert [result["grid"] for result in body["results"]] == [[GRID, GRID]] * 2
        assert [result["mask"]["size"] for result in body["results"]] == [[80, 300]] * 2
        family = qwen2_vl.from_config({"architectures": ["Qwen2VLForConditionalGeneration"]})
        assert family is not None
        square = 2 * family.num_image_tokens  # a wide picture that is squashed has no fewer
        assert square < body["usage"]["prompt_tokens"] < square + 2 * 80
        assert "RelayAttention engaged" in server.log, "both questions share the picture"
