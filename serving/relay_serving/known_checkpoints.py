"""Published checkpoints that vLLM does not load as they are: converted once into the cache, then served from there."""

from __future__ import annotations

from pathlib import Path

from relay_models.text4seg.profiles import profile_of
from relay_serving import convert_command
from relay_serving.settings import cache_folder


def servable(words: list[str]) -> list[str]:
    """The words of `serve` with such a checkpoint's id replaced by its converted folder, served under its id.

    Raises ConversionError where it cannot be fetched or converted.
    """
    model = words[0]
    profile = profile_of(model)
    if profile is None or not profile.needs_conversion or Path(model).exists():
        return words
    folder = cache_folder() / "models" / model.lower().replace("/", "--")
    if not (folder / "config.json").is_file():  # the folder appears whole, by one rename
        folder.parent.mkdir(parents=True, exist_ok=True)
        convert_command.convert_with_progress(model, folder)
    is_named = any(word == "--served-model-name" or word.startswith("--served-model-name=") for word in words)
    return [str(folder), *words[1:], *([] if is_named else ["--served-model-name", model])]
