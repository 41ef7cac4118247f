"""The child of `bench serve`: vLLM's own API server, which says what block size it would choose by itself.

Run as `python -m relay_benchmarks.measured_server FACTS MODEL [flags of vllm serve]`; FACTS is a JSON file that is
written before the server starts. Both sides run it, and which attention serves is decided by VLLM_PLUGINS alone. The
built-in model relay-seg-tiny is of a class of ours, which stock vLLM lacks: for that model the class, and nothing else
of ours, is registered in each process, on both sides. Every process vLLM spawns imports this module again as
`__mp_main__`, so nothing heavy is imported at its top.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from relay_benchmarks.child_process import end_with_the_parent

RELAY_SEG_TYPE = "relay_seg"  # of relay_models' RelaySegConfig, whose module is too heavy to import here


def main(argv: list[str]) -> int:
    end_with_the_parent()
    facts, model, *flags = argv
    register_model_class(model)
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    command = ServeSubcommand()
    parser = FlexibleArgumentParser(prog="vllm")
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    args = parser.parse_args(["serve", model, *flags])
    configure_logging_from_args(args)
    command.validate(args)
    args.model = model
    Path(facts).write_text(json.dumps({"default_block_size": default_block_size(args)}))
    command.cmd(args)
    return 0


def default_block_size(args: Any) -> int:
    """What this process would use if nobody asked for a block size."""
    from dataclasses import replace

    from vllm.engine.arg_utils import AsyncEngineArgs

    asked_by_nobody = replace(AsyncEngineArgs.from_cli_args(args), block_size=None)
    return int(asked_by_nobody.create_engine_config().cache_config.block_size)


def register_model_class(model: str) -> None:
    """Only where `model` is the folder of a relay-seg model."""
    try:
        config = json.loads((Path(model) / "config.json").read_text())
    except (OSError, ValueError):
        return  # vLLM will say what is wrong with it
    if config.get("model_type") == RELAY_SEG_TYPE:
        from relay_serving.vllm_plugin.register import register_models

        register_models()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
elif __name__ == "__mp_main__":
    register_model_class(sys.argv[2])
