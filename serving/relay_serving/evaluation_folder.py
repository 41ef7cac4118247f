"""The folder of an evaluation: answers as they come, so that one that was ended goes on, and the report at the end.

The folder holds
    run.json        what is evaluated on what; another evaluation is refused
    masks.jsonl     a line for each answer: what was asked, and the mask; `vllm-relay bench refining` reads it
    report.json, report.md

A photo's lines are written in one go. What a kill cut off, and what the server failed to answer, is asked again. A
folder whose evaluation is finished takes no other: its answers may be those of weights that are no longer served.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relay_serving.errors import UsageError

if TYPE_CHECKING:
    from relay_models.recipes.text4seg.dataset import Photo
    from relay_models.recipes.text4seg.evaluation import EvaluationReport, Query, Reply

RUN, MASKS, REPORT = "run.json", "masks.jsonl", "report.json"


class EvaluationFolder:
    """Answers kept in a folder.

    Args:
        folder: made if it is not there.
        run: what the answers depend on, as JSON has it.

    Raises:
        UsageError: it cannot be written, or holds another evaluation, or one that is finished.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any]) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._lines: dict[str, list[dict[str, Any]]] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._check_run(run)
            num_failed = self._read()
            if (folder / REPORT).exists() and not num_failed:
                raise UsageError(f"--output is {str(folder)!r}, which holds a finished evaluation: name another folder")
        except (OSError, ValueError) as error:
            raise self._unusable(error) from error

    def replies(self, photo: Photo, queries: Sequence[Query]) -> list[Reply] | None:
        """The answers that are kept to just these queries, or None."""
        from relay_models.masks import from_coco_rle
        from relay_models.recipes.text4seg.evaluation import Reply

        lines = self._lines.get(photo.file, [])
        if [_asked(photo, query) for query in queries] != [
            {key: value for key, value in line.items() if key not in ("status", "mask")} for line in lines
        ]:
            return None
        return [Reply(from_coco_rle(line["mask"]), line["status"]) for line in lines]

    def keep(self, photo: Photo, queries: Sequence[Query], replies: Sequence[Reply]) -> None:
        """Write down what was answered about a photo. Raises UsageError."""
        from relay_models.masks import coco_rle

        lines = [
            {**_asked(photo, query), "status": reply.status, "mask": coco_rle(reply.mask_HW)}
            for query, reply in zip(queries, replies, strict=True)
        ]
        try:
            with self._lock, (self._folder / MASKS).open("a", encoding="utf-8") as file:
                self._lines[photo.file] = lines
                file.write(_text(lines))
        except OSError as error:
            raise self._unusable(error) from error

    def finish(self, photos: Sequence[Photo], report: EvaluationReport) -> None:
        """The report, and the answers in the order of the photos. Raises UsageError."""
        lines = [line for photo in photos for line in self._lines.get(photo.file, ())]
        try:
            _write(self._folder / MASKS, _text(lines))
            _write(self._folder / REPORT, report.to_json())
            _write(self._folder / "report.md", report.to_markdown())
        except OSError as error:
            raise self._unusable(error) from error

    def _check_run(self, run: Mapping[str, Any]) -> None:
        file = self._folder / RUN
        if not file.exists():
            _write(file, json.dumps(run, indent=2) + "\n")
            return
        before = json.loads(file.read_text(encoding="utf-8"))
        for name, value in run.items():
            if before.get(name) != value:
                raise UsageError(
                    f"--output is {str(self._folder)!r}, which holds an evaluation with {name} {before.get(name)!r}, "
                    f"and now it is {value!r}: name another folder"
                )

    def _read(self) -> int:
        """Take over whole lines; of a photo of which a question failed none, so that all are asked again. How many
        photos those are."""
        from relay_models.recipes.text4seg.evaluation import FAILED

        file = self._folder / MASKS
        if not file.exists():
            return 0
        found: dict[str, list[dict[str, Any]]] = {}
        whole, _, _ = file.read_text(encoding="utf-8").rpartition("\n")
        for line in map(json.loads, whole.splitlines()):
            found.setdefault(line["file"], []).append(line)
        self._lines = {name: lines for name, lines in found.items() if all(line["status"] != FAILED for line in lines)}
        _write(file, _text([line for lines in self._lines.values() for line in lines]))
        return len(found) - len(self._lines)

    def _unusable(self, error: Exception) -> UsageError:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        return UsageError(f"--output is {str(self._folder)!r}, which cannot be used: {reason}")


def _asked(photo: Photo, query: Query) -> dict[str, Any]:
    return {"file": photo.file, "text": query.text, "kind": query.kind, "label": query.label, "ids": list(query.ids)}


def _text(lines: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def _write(file: Path, text: str) -> None:
    """In whole or not at all."""
    unfinished = file.with_suffix(".part")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, file)
