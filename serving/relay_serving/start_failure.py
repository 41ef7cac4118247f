"""Why a vLLM did not start, in one line, read from its own log.

vLLM reports a failure once per process it passes through: a traceback in the worker, another in the engine core, a
third in the API server that only says "see above". The first one is the cause. `StartLog` is fed line by line; it says
which lines are worth showing, and afterwards what went wrong.
"""

from __future__ import annotations

import re

_PROCESS = re.compile(r"^\((?P<process>[^()]*?(?: pid=\d+)?)\) ")
_LEVEL = re.compile(r"^(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL):? (?:\d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\] ?)?")
_EXCEPTION = re.compile(r"^(?P<type>[A-Za-z_][\w.]*(?:Error|Exception|Exit|Interrupt|Failure)): (?P<message>.*)$")
_CONTINUES = ("The above exception was the direct cause", "During handling of the above exception")
_SECOND_HAND = re.compile(
    r"see root cause above|check the stack trace above|Engine core initialization failed"
    r"|WorkerProc initialization failed|EngineDeadError|cancelled|KeyboardInterrupt|resource_tracker|BrokenPipe",
    re.IGNORECASE,
)

# What to do, where the message itself does not say it.
_ADVICE = (
    (
        re.compile(
            r"No available memory for the cache blocks|KV cache is needed|on kv cache allocation", re.IGNORECASE
        ),
        "lower --max-model-len, or raise --kv-cache-memory-bytes if the machine has the memory",
    ),
    (
        re.compile(r"requested memory for kv \((?!.*Decrease)"),
        "say how much to take with --kv-cache-memory-bytes, e.g. 1G",
    ),
    (re.compile(r"Address already in use"), "stop the other server or pass --port"),
    (
        re.compile(r"[Cc]annot allocate memory|DefaultCPUAllocator|out of memory|OutOfMemory"),
        "pass a smaller model, or lower --kv-cache-memory-bytes and --max-model-len",
    ),
    (
        re.compile(r"couldn't connect|LocalEntryNotFound|Invalid repository ID|is not a local folder|OfflineMode"),
        "check the model's name or path, and the network if it is on a hub",
    ),
)


def in_one_line(text: str) -> str:
    """Lines joined, runs of blanks closed up, nothing after 600 characters."""
    joined = " ".join(text.split())
    return joined if len(joined) <= 600 else joined[:597] + "..."


def is_second_hand(reason: str) -> bool:
    """Whether this only says that something else failed, somewhere above."""
    return _SECOND_HAND.search(reason) is not None


def with_advice(reason: str) -> str:
    for pattern, advice in _ADVICE:
        if pattern.search(reason) and advice.split(",")[0] not in reason:
            return f"{reason.rstrip('. ')}; {advice}"
    return reason


class StartLog:
    """Feeds on the log of a starting (or stopping) server."""

    def __init__(self) -> None:
        self._in_traceback: set[str] = set()
        self._causes: list[str] = []
        self._cause_of: dict[str, int] = {}
        self._open_message: str | None = None

    def shows(self, line: str) -> bool:
        """Takes one line; false for tracebacks and error records, which are kept for the reason instead."""
        process, level, text = _split(line)
        if level in ("DEBUG", "INFO", "WARNING"):
            self._in_traceback.discard(process)
            self._open_message = None
            return True
        if level is None and text.startswith("Traceback (most recent call last)"):
            self._in_traceback.add(process)
        if level is None and process not in self._in_traceback:
            return True
        self._learn(process, text)
        return False

    def reason(self) -> str | None:
        """The first cause seen, in one line, with advice; None if the log holds none."""
        for cause in self._causes:
            if not is_second_hand(cause):
                return with_advice(in_one_line(cause))
        return None

    def _learn(self, process: str, text: str) -> None:
        if text.startswith(_CONTINUES):
            self._cause_of.setdefault(process, len(self._causes) - 1)
            self._open_message = None
        elif match := _EXCEPTION.match(text):
            cause = match["message"] or match["type"]
            replaced = self._cause_of.pop(process, None)
            if replaced is not None and 0 <= replaced < len(self._causes) and not is_second_hand(cause):
                self._causes[replaced] = cause  # the later of a chain says more
            else:
                self._causes.append(cause)
            self._open_message = process
        elif self._open_message == process and text.strip() and not text.startswith("Traceback"):
            self._causes[-1] += " " + text.strip()  # a message of several lines
        elif text.startswith("Traceback"):
            self._open_message = None


def _split(line: str) -> tuple[str, str | None, str]:
    process = ""
    if match := _PROCESS.match(line):
        process, line = match["process"], line[match.end() :]
    if match := _LEVEL.match(line):
        return process, match["level"], line[match.end() :]
    return process, None, line
