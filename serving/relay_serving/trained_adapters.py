"""Adapters that `vllm-relay train` wrote: served beside their base, or merged once into the cache and served there."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from relay_models.errors import RelayModelsError
from relay_models.recipes.text4seg.lora_adapter import ADAPTER_WEIGHTS, is_adapter, merge_adapter, served_form
from relay_serving.errors import ConversionError
from relay_serving.settings import cache_folder

RUN_SUBFOLDER = "adapter"  # of a run's folder, whose name says more


def servable(words: list[str]) -> list[str]:
    """The words of `serve` with an adapter's folder replaced by what vLLM serves, under the name of its run.

    Raises ConversionError where it fits no base, or cannot be merged.
    """
    folder = Path(words[0])
    if not is_adapter(folder):
        return words
    folder = folder.resolve()
    name = folder.parent.name if folder.name == RUN_SUBFOLDER else folder.name
    try:
        form = served_form(folder, name)
        if form.merge_reason is None:
            return [form.base, *form.flags, *words[1:]]
        return [str(_merged(folder, form.merge_reason)), "--served-model-name", name, *words[1:]]
    except (RelayModelsError, OSError) as error:
        raise ConversionError(f"the adapter {folder} cannot be served: {error}") from error


def _merged(folder: Path, reason: str) -> Path:
    with (folder / ADAPTER_WEIGHTS).open("rb") as weights:
        digest = hashlib.file_digest(weights, "sha256").hexdigest()
    target = cache_folder() / "models" / f"adapter-{digest[:16]}"
    if not (target / "config.json").is_file():  # the folder appears whole, by one rename
        print(f"vllm-relay: merging {folder} into its base, because {reason}", file=sys.stderr)
        target.parent.mkdir(parents=True, exist_ok=True)
        merge_adapter(folder, target)
    return target
