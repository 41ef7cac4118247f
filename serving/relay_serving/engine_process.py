"""The child of `vllm-relay serve`: vLLM's own server, started through vLLM's own parser and `serve` command.

Run as `python -m relay_serving.engine_process STATUS_FD serve [MODEL] [flags]`. It tells its supervisor over the pipe
STATUS_FD, one JSON pair a line, what it will listen on, what it chose and why it gave up. Every process vLLM spawns
imports this module again, so nothing heavy is imported at its top.
"""

from __future__ import annotations

import argparse
import ctypes
import difflib
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

from relay_models.text4seg.profiles import is_trained
from relay_serving import embedded_model, plugin_names, preflight, relay_flags, start_defaults
from relay_serving.errors import RelayServingError, UsageError
from relay_serving.settings import (
    GPU_KERNEL_CARRIER,
    SEGMENTATION_AUTO,
    SEGMENTATION_OFF,
    VARIABLES,
    CpuKernel,
    GpuKernel,
    RelaySettings,
)
from relay_serving.start_failure import in_one_line
from relay_serving.vllm_plugin import register

_PR_SET_PDEATHSIG = 1
_GRACE_SECONDS = 6.0  # between the supervisor's death and the end of the process group


class Status:
    """The pipe to the supervisor; says nothing when there is none."""

    def __init__(self, descriptor: int) -> None:
        os.set_inheritable(descriptor, False)
        self._pipe = os.fdopen(descriptor, "w", buffering=1)

    def send(self, event: str, value: object) -> None:
        try:
            self._pipe.write(json.dumps([event, value]) + "\n")
        except BrokenPipeError:
            pass


def main(argv: list[str]) -> int:
    _die_with_the_supervisor()
    status = Status(int(argv[0]))
    try:
        _serve(argv[1:], status)
    except UsageError as error:
        status.send("usage", str(error))
        return error.exit_status
    except RelayServingError as error:
        status.send("error", str(error))
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        traceback.print_exc()
        status.send("error", _message_of(error))
        return 1
    return 0


def _serve(words: list[str], status: Status) -> None:
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args

    cli_env_setup()
    command = ServeSubcommand()
    args = _parse(words, command)
    configure_logging_from_args(args)
    settings = _settle(args, status)
    preflight.check_model(args.model_tag)
    if not args.uds and not args.headless:
        preflight.check_port(args.host or "", args.port)
    try:
        command.validate(args)
    except (ValueError, OSError) as error:
        raise UsageError(in_one_line(str(error))) from error
    if not args.headless and not args.grpc:
        status.send("listening", _listening(args, settings))
    command.cmd(args)


def _parse(words: list[str], command: Any) -> argparse.Namespace:
    """vLLM's own parser, with our group added and our way of saying what is wrong."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="vllm-relay")
    serve = command.subparser_init(parser.add_subparsers(dest="subparser"))
    serve.usage = "vllm-relay serve [model] [options]"
    serve.description = (
        f"{serve.description.strip().replace('Defaults to Qwen/Qwen3-0.6B', 'Defaults to the embedded model')}\n\n"
        f"{relay_flags.help_text()}"
    )
    serve.epilog = serve.epilog.replace("vllm serve", "vllm-relay serve")
    relay_flags.add_flags(serve)
    start_defaults.mark(serve)

    def refuse(message: str) -> NoReturn:
        raise UsageError(_with_suggestion(in_one_line(message), serve))

    parser.error = serve.error = refuse
    try:
        args: argparse.Namespace = parser.parse_args(words)
    except (ValueError, OSError, AssertionError) as error:
        raise UsageError(_message_of(error)) from error
    return args


def _settle(args: argparse.Namespace, status: Status) -> RelaySettings:
    """Our settings and defaults, into vLLM's arguments."""
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    if on_cpu:
        preflight.check_library(preflight.CPU_LIBRARY)
    settings = settle_relay(args)
    embedded = embedded_model.name_of(args.model_tag)
    if settings.enabled:
        _check_relay(status)
    elif embedded == embedded_model.RELAY_SEG:
        raise UsageError(
            f"without relay vLLM does not know {embedded}: serve {embedded_model.SMOLLM2}, or leave relay on"
        )
    chosen = start_defaults.apply(
        args,
        embedded_name=embedded,
        on_cpu=on_cpu,
        available_bytes=start_defaults.available_memory(),
        segments=settings.enabled and _segments(settings, args.model_tag),
        draft_rows=settings.draft_rows if settings.enabled else 0,
    )
    for line in chosen:
        status.send("notice", f"default: {line}")
    return settings


def settle_relay(args: argparse.Namespace) -> RelaySettings:
    """The settings of all sources, carried by `args` and by the environment of the processes vLLM will start.

    --additional-config is known only now, and wins: if it changes whether relay is on, VLLM_PLUGINS changes with it.
    """
    args.additional_config = relay_flags.settings_from(args).to_additional_config(args.additional_config)
    settings = RelaySettings.from_additional_config(args.additional_config)
    was_on = register.is_asked_for()
    for variable in VARIABLES.values():
        os.environ.pop(variable, None)  # in `settings` now; vLLM warns of every VLLM_ variable that is not its own
    os.environ[plugin_names.VARIABLE] = plugin_names.plugins_value(
        os.environ.get(plugin_names.VARIABLE), settings.enabled, plugin_names.discovered_names()
    )
    os.environ[GPU_KERNEL_CARRIER] = settings.gpu_kernel
    if settings.enabled and (not was_on or settings.gpu_kernel != GpuKernel.OFF):
        register.register()  # vLLM loaded its plugins when it made its parser, and will not do so again here
    if settings.enabled and settings.cpu_kernel == CpuKernel.TRITON:
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so before any worker exists
    return settings


def _segments(settings: RelaySettings, model: str) -> bool:
    """Whether the model will be taken for a segmentation model, as far as can be known before it is loaded."""
    if settings.segmentation != SEGMENTATION_AUTO:
        return settings.segmentation != SEGMENTATION_OFF
    config_file = Path(model) / "config.json"
    try:
        config = json.loads(config_file.read_text()) if config_file.is_file() else {}
    except (OSError, ValueError):
        return False  # vLLM will say what is wrong with it
    return isinstance(config, dict) and is_trained(config, model)


def _check_relay(status: Status) -> None:
    try:
        plugin_names.check_relay_loads()
    except RelayServingError as error:
        status.send("notice", f"WARNING: RELAY IS NOT LOADED, stock vLLM will serve: {error}")


def _listening(args: argparse.Namespace, settings: RelaySettings) -> dict[str, Any]:
    names = args.served_model_name
    return {
        "host": args.host or "",
        "port": args.port,
        "tls": bool(args.ssl_keyfile and args.ssl_certfile),
        "unix_socket": args.uds,
        "model": (names[0] if isinstance(names, list) else names) or args.model_tag or args.model,
        "chats": embedded_model.name_of(args.model_tag) is not None,
        "needs_key": bool(args.api_key or os.environ.get("VLLM_API_KEY")),
        "relay": "on" if settings.enabled else "off",
        "shutdown_timeout": float(getattr(args, "shutdown_timeout", 0) or 0),
    }


def _with_suggestion(message: str, parser: argparse.ArgumentParser) -> str:
    known = [option for action in parser._actions for option in action.option_strings]
    unknown = [word.partition("=")[0] for word in message.split() if word.startswith("--")]
    near = difflib.get_close_matches(unknown[0], known, n=1) if message.startswith("unrecognized") and unknown else []
    hint = f"did you mean {near[0]}?" if near else "see vllm-relay serve --help=all"
    return f"{message}; {hint}"


def _message_of(error: BaseException) -> str:
    """pydantic's errors come on many lines; their first message is the reason."""
    details = getattr(error, "errors", None)
    if callable(details) and type(error).__name__ == "ValidationError":
        first = details()[0]
        where = ".".join(str(part) for part in first.get("loc", ()))
        message = first["msg"].removeprefix("Value error, ")
        return in_one_line(f"{where}: {message}" if where else message)
    return in_one_line(str(error) or type(error).__name__)


def _die_with_the_supervisor() -> None:
    """If the supervisor is killed outright, this process gets SIGTERM, and soon after its group SIGKILL. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        threading.Thread(target=_outlive_briefly, args=(os.getppid(),), daemon=True).start()


def _outlive_briefly(supervisor: int) -> None:
    """vLLM may be in the middle of a start, which SIGTERM does not always end; nobody else is left to see to it."""
    while os.getppid() == supervisor:
        time.sleep(0.5)
    time.sleep(_GRACE_SECONDS)
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
