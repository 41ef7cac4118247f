"""What installing us changes for a vLLM that did not ask: nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.v1.attention.backends.registry import AttentionBackendEnum
print("backend:", AttentionBackendEnum.CPU_ATTN.get_path())
"""


@pytest.mark.parametrize(
    ("environment", "relay"),
    [
        ({}, False),
        ({"VLLM_PLUGINS": "lora_filesystem_resolver"}, False),
        ({"VLLM_PLUGINS": "relay"}, True),
        ({"VLLM_PLUGINS": "relay", "VLLM_RELAY": "0"}, False),
    ],
    ids=["unset", "another", "asked", "asked-and-switched-off"],
)
def test_the_attention_backend_is_ours_only_where_we_are_named(environment, relay, make_environment):
    command = [sys.executable, "-c", CODE]
    result = subprocess.run(command, env=make_environment(**environment), capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    (backend,) = [line for line in result.stdout.splitlines() if line.startswith("backend:")]
    assert ("relay_serving" in backend) is relay
