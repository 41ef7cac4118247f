"""Where a number was measured: the machine, the commit, the versions."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


@dataclass(frozen=True)
class Machine:
    cpu: str
    cores: int
    memory_gib: int

    @property
    def name(self) -> str:
        """Fit for a file name: ``intel-xeon-processor-2-cores``."""
        words = re.sub(r"\((r|tm)\)|@.*|\bcpu\b", " ", self.cpu.lower())
        return f"{re.sub('[^a-z0-9]+', '-', words).strip('-') or 'unknown-cpu'}-{self.cores}-cores"

    @classmethod
    def here(cls) -> Machine:
        """This machine; the cores are those this process may use."""
        import psutil

        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return cls(_cpu_model(), cores, round(psutil.virtual_memory().total / 2**30))


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def commit() -> str:
    """The commit this package is run from, ``+changes`` if tracked files differ from it; "unknown" outside git."""
    here = Path(__file__).parent
    if _git(here, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return "unknown"
    head = _git(here, "rev-parse", "--short=12", "HEAD")
    if head is None:
        return "unknown"
    # rows that an earlier run appended change no number of this one
    paths = (":(top)", ":(exclude)results")
    return f"{head}+changes" if _git(here, "status", "--porcelain", "--untracked-files=no", "--", *paths) else head


def installed(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "unknown"


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
