"""Reading weights from a folder, one tensor at a time: safetensors or PyTorch files, sharded or not.

Promises: nothing of a file is executed (PyTorch files are read with ``weights_only``); of a folder, the index and the
files have to say the same; a file that is not what its name says is a `CheckpointError` that names it.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relay_models.errors import CheckpointError

if TYPE_CHECKING:
    import torch

# In this order: a folder with both layouts has the same weights twice.
_LAYOUTS = (
    ("model.safetensors.index.json", "model.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin"),
)


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file, not read yet."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class WeightFile:
    """An open file of weights. Made by `open_weights`."""

    def __init__(self, path: Path, tensors: Any, names: list[str]) -> None:
        self.path = path
        self._tensors = tensors
        self._names = names

    def names(self) -> list[str]:
        return sorted(self._names)

    def describe(self, name: str) -> StoredTensor:
        """Shape and type of a tensor, without reading it."""
        if isinstance(self._tensors, Mapping):
            tensor = self._tensors[name]
            return StoredTensor(self.path, name, tuple(tensor.shape), tensor.dtype)
        stored = self._tensors.get_slice(name)
        shape = tuple(stored.get_shape())
        # an empty selection has the type that torch gives the tensor; scalars have nothing to select from
        empty = stored[:0] if shape else self._tensors.get_tensor(name)
        return StoredTensor(self.path, name, shape, empty.dtype)

    def read(self, name: str) -> torch.Tensor:
        """The tensor, on the CPU. Raises CheckpointError if the file has no such tensor, or holds something else."""
        if name not in self._names:
            raise CheckpointError(f"{self.path.name} has no tensor {name!r}")
        if not isinstance(self._tensors, Mapping):
            return self._tensors.get_tensor(name)
        return self._tensors[name]


@contextlib.contextmanager
def open_weights(path: Path) -> Iterator[WeightFile]:
    """Open a file for reading single tensors of it; most of it stays on the disk.

    Raises:
        CheckpointError: it cannot be read as what its suffix says, or holds something other than named tensors.
    """
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            opened = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error
        with opened as tensors:
            yield WeightFile(path, tensors, list(tensors.keys()))
    else:
        tensors = _load_pytorch(path)
        yield WeightFile(path, tensors, list(tensors))


def stored_tensors(path: Path) -> list[StoredTensor]:
    """What a file holds, by name. Errors as of `open_weights`."""
    with open_weights(path) as weights:
        return [weights.describe(name) for name in weights.names()]


def folder_tensors(folder: Path) -> list[StoredTensor]:
    """Every tensor of a model's folder, file by file.

    Raises:
        CheckpointError: there are no weights; a file cannot be read; the index names a file that is absent or lies
            elsewhere, or disagrees with the files; a tensor is in two files.
    """
    index, files = _layout(folder)
    tensors: dict[str, StoredTensor] = {}
    for path in files:
        for tensor in stored_tensors(path):
            if tensor.name in tensors:
                raise CheckpointError(f"{tensor.name} is both in {tensors[tensor.name].file.name} and in {path.name}")
            tensors[tensor.name] = tensor
    if index is not None:
        _check_index(index, tensors)
    return list(tensors.values())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError if it is absent or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def _layout(folder: Path) -> tuple[Path | None, list[Path]]:
    for index, single in _LAYOUTS:
        if (folder / index).exists():
            return folder / index, sorted({_shard(folder, name) for name in _weight_map(folder / index).values()})
        if (folder / single).exists():
            return None, [folder / single]
    expected = " or ".join(name for pair in _LAYOUTS for name in pair)
    raise CheckpointError(f"{folder} holds no weights: expected {expected}")


def _load_pytorch(path: Path) -> Mapping[str, Any]:
    import torch

    try:
        # Only the zip layout, PyTorch's since 1.6, can be mapped into memory instead of read.
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read as PyTorch weights: {str(error).splitlines()[0]}") from error
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path} must hold named tensors, got {type(loaded).__name__}")
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{path} must hold named tensors, got {type(tensor).__name__} under {name!r}")
    return loaded


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"weight_map in {index} must map tensors to files, got {type(weight_map).__name__}")
    return weight_map


def _shard(folder: Path, name: str) -> Path:
    """A file beside the index; an index is somebody else's, and must not point anywhere else."""
    if Path(name).name != name or name.startswith("."):
        raise CheckpointError(f"the index of {folder} names the file {name!r}, which is not in the folder")
    if not (folder / name).exists():
        raise CheckpointError(f"the index of {folder} names the file {name!r}, which is missing: fetch it again")
    return folder / name


def _check_index(index: Path, tensors: Mapping[str, StoredTensor]) -> None:
    weight_map = _weight_map(index)
    for name in sorted(weight_map.keys() ^ tensors.keys()):
        where = "the index only" if name in weight_map else "the files only"
        raise CheckpointError(f"{name} is in {where}, says {index}")
    for name, tensor in tensors.items():
        if weight_map[name] != tensor.file.name:
            raise CheckpointError(f"{name} is in {tensor.file.name}, and not in {weight_map[name]} as {index} says")
