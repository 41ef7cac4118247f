"""Lets torchvision, torchaudio and torchcodec be imported where their compiled halves cannot load.

Their wheels on PyPI are built for CUDA. Beside a CPU build of PyTorch their extensions do not load: torchvision dies at
import, because it registers fake kernels for two operators its `_C` would have declared; torchaudio takes the failure
for unrecoverable; torchcodec raises OSError, where vLLM is prepared for ImportError. vLLM imports all three in most of
its processes, some of which run no code of ours, so `relay_torch_wheel_repair.pth` installs this finder in every
interpreter of the environment.

Promises: nothing is imported and nothing happens until one of the three is imported; nothing changes where PyTorch has
a CUDA build or where the extension loads; no operator is emulated, so calling one still fails with the library's own
message. `VLLM_RELAY_TORCH_WHEEL_REPAIR=0` turns it off. See PATCHES.md.
"""

import sys

_TORCHVISION_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries = []  # a declaration lives as long as its Library object


class TorchWheelFinder:
    """A `sys.meta_path` finder that knows three names and steps aside for everything else."""

    @staticmethod
    def find_spec(fullname, path=None, target=None):
        repaired = _REPAIRED.get(fullname)
        if repaired is None:
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            # `find_spec("torchvision")` alone is a common question and must stay cheap: act when the module executes
            spec.loader.exec_module = repaired(spec, spec.loader.exec_module)
        return spec


def _declaring_torchvision(spec, execute):
    def declare_and_execute(module):
        for folder in list(spec.submodule_search_locations or ())[:1]:
            declare_missing_schemas(folder)
        execute(module)

    return declare_and_execute


def declare_missing_schemas(package_folder):
    """Declare what torchvision's `_C` would have, if it cannot be loaded. Returns whether anything was declared."""
    try:
        import torch
    except ImportError:
        return False  # torchvision will say so better than we could
    if torch.version.cuda is not None or _extension_loads(torch, package_folder):
        return False
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _TORCHVISION_SCHEMAS:
        if not hasattr(torch.ops.torchvision, schema.partition("(")[0]):
            library.define(schema)
    _libraries.append(library)
    return True


def _extension_loads(torch, package_folder):
    from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, FileFinder

    spec = FileFinder(package_folder, (ExtensionFileLoader, EXTENSION_SUFFIXES)).find_spec("_C")
    if spec is None:
        return False
    try:
        torch.ops.load_library(spec.origin)
    except OSError:
        return False
    return True


def _forgiving_torchaudio(spec, execute):
    """torchaudio runs without its extension when the file is absent: let an unloadable file count as absent."""

    def execute_and_wrap(module):
        execute(module)
        load = getattr(module, "_load_lib", None)
        if load is None:
            return

        def load_or_report_absent(lib):
            import torch

            try:
                return load(lib)
            except OSError:
                if torch.version.cuda is not None:
                    raise
                return False

        module._load_lib = load_or_report_absent

    return execute_and_wrap


def _refusing_torchcodec(spec, execute):
    """An extension that cannot be loaded becomes the ImportError that users of an optional package expect."""

    def execute_or_refuse(module):
        try:
            execute(module)
        except OSError as error:
            import torch

            if torch.version.cuda is not None:
                raise
            raise ImportError(
                f"torchcodec cannot load beside a CPU-only PyTorch: {error}", name="torchcodec"
            ) from error

    return execute_or_refuse


_REPAIRED = {
    "torchvision": _declaring_torchvision,
    "torchaudio._extension.utils": _forgiving_torchaudio,
    "torchcodec": _refusing_torchcodec,
}


def install():
    """Called by the .pth file at interpreter start; a second call does nothing."""
    import os

    if os.environ.get("VLLM_RELAY_TORCH_WHEEL_REPAIR", "1") != "0" and TorchWheelFinder not in sys.meta_path:
        sys.meta_path.insert(0, TorchWheelFinder)
