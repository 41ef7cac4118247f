"""The README is executed: every block marked `runnable`, against a real server."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+) runnable\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("language", "code"), BLOCKS, ids=[f"{n}-{language}" for n, (language, _) in enumerate(BLOCKS)]
)
def test_a_block_of_the_readme_runs(language, code, relay_server):
    code = code.replace("http://127.0.0.1:8000", relay_server.url)
    command = {"python": [sys.executable, "-c", code], "bash": ["bash", "-euo", "pipefail", "-c", code]}[language]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


def test_there_are_blocks_to_run():
    assert {language for language, _ in BLOCKS} == {"python", "bash"}


@pytest.mark.parametrize(
    "page", sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").rglob("*.md")), ids=lambda p: p.name
)
def test_links_inside_the_repository_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_readme_names_every_flag_and_default_there_is():
    from relay_serving.relay_flags import help_text
    from relay_serving.settings import RelaySettings

    for flag in re.findall(r"--[\w-]*relay[\w-]*", help_text()):
        assert flag.replace("--no-relay-log-plan", "--relay-log-plan") in README
    assert f"| `{RelaySettings().min_shared_tokens}` | share a prefix" in README
    assert f"| `{RelaySettings().cpu_kernel}` | `cpp`" in README
