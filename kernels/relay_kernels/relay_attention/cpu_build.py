"""Compiles cpu_kernel.cpp on first use and keeps the result, one file for each (CPU, torch, compiler, source).

A cached file is only ever loaded where the key recomputed on this machine names it, so it never meets a CPU that lacks
its instructions. Builds are serialised by a file lock and published by rename: a build that was cut short leaves
nothing that could be loaded.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock

SOURCE = Path(__file__).with_name("cpu_kernel.cpp")
_BASE_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno", "-Wno-maybe-uninitialized")


class KernelUnavailableError(RuntimeError):
    """The compiled CPU kernel cannot be had here; the message says why and what to do."""


def cpu_flags() -> tuple[str, ...]:
    """The instruction-set flags of this CPU, sorted (Linux); empty where they cannot be read."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ()
    for line in text.splitlines():
        if line.startswith(("flags", "Features")):
            return tuple(sorted(line.split(":", 1)[1].split()))
    return ()


def find_compiler() -> str | None:
    """The C++ compiler to use: the environment's CXX, else g++, else clang++; None where there is none."""
    wanted = os.environ.get("CXX")
    candidates = [wanted] if wanted else ["g++", "clang++"]
    return next((path for name in candidates if (path := shutil.which(name))), None)


def cache_folder() -> Path:
    """Where compiled kernels are kept: VLLM_RELAY_CACHE, else XDG_CACHE_HOME/vllm-relay, else ~/.cache/vllm-relay."""
    chosen = os.environ.get("VLLM_RELAY_CACHE", "")
    if chosen:
        return Path(chosen).expanduser().absolute() / "kernels"
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "vllm-relay" / "kernels"


def _instruction_flags() -> tuple[str, ...]:
    """Explicit flags, so that what torch reports as usable (AMX needs the kernel's leave) decides, not cpuid alone."""
    if torch.cpu._is_amx_tile_supported():
        return ("-march=native", "-mamx-tile", "-mamx-bf16")
    return ("-march=native", "-mno-amx-tile", "-mno-amx-bf16") if "amx_tile" in cpu_flags() else ("-march=native",)


def _openmp_of_torch() -> list[str]:
    """Link to the very OpenMP runtime that torch loaded, so that both share one pool of threads."""
    folder = Path(torch.__file__).parent / "lib"
    return [argument for file in sorted(folder.glob("libgomp*")) for argument in (str(file), f"-Wl,-rpath,{folder}")]


def build_key(compiler: str) -> str:
    """Hash of everything the compiled file depends on."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    parts = (version, torch.__version__, *cpu_flags(), *_BASE_FLAGS, *_instruction_flags(), SOURCE.read_text())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def build() -> Path:
    """Path of the compiled kernel for this machine, compiling it if need be (seconds, once).

    Raises:
        KernelUnavailableError: there is no compiler, the cache folder cannot be written, or compilation failed.
    """
    compiler = find_compiler()
    if compiler is None:
        raise KernelUnavailableError(
            f"no C++ compiler found (looked for {os.environ.get('CXX') or 'g++, clang++'}): install one (Debian: g++)"
        )
    folder = cache_folder()
    target = folder / f"relay_attention-{build_key(compiler)}.so"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _refuse_if_others_may_write(folder)
        if target.exists():
            _refuse_if_others_may_write(target)
            return target
        with FileLock(folder / "build.lock"):
            if not target.exists():
                _compile(compiler, target)
    except OSError as error:
        raise KernelUnavailableError(f"cannot write the kernel cache {folder}: {error}") from error
    return target


def _refuse_if_others_may_write(path: Path) -> None:
    """Code is run from here, and its name can be computed by anyone."""
    status = path.stat()
    if status.st_uid not in (os.getuid(), 0) or status.st_mode & 0o022:
        raise KernelUnavailableError(
            f"{path} could be written by another user (owner {status.st_uid}, mode {status.st_mode & 0o777:o}), so no "
            "code is loaded from it: chmod go-w it, or set VLLM_RELAY_CACHE to a folder of your own"
        )


def _compile(compiler: str, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / "kernel.so"
        command = [compiler, *_BASE_FLAGS, *_instruction_flags(), str(SOURCE), "-o", str(made), *_openmp_of_torch()]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise KernelUnavailableError(f"{compiler} could not compile {SOURCE}:\n{result.stderr.strip()[-2000:]}")
        os.replace(made, target)


@cache
def load() -> ctypes.CDLL:
    """The compiled kernel, loaded into this process once."""
    path = build()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelUnavailableError(f"cannot load the compiled kernel {path}: {error}") from error
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()  # the Linux kernel grants tile registers per process, on request
    return library
