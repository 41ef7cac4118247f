"""Labels of a descriptor: which two are the same class, which ones R-RLE can carry, and how the others are written.

A label is ordinary text between two separators, and for a referred expression it is that expression verbatim, so people
write into it whatever they like. Three questions are answered here, each by one function:

    `match_key`: are two labels the same class? Compared by compatibility form (NFKC), case and white space.
    `check_label`: does a label come back from a descriptor as it went in? If not, it is refused with the reason.
    `substitute` and `restore`: the stand-in for a label that would be refused. It is what the model must see in the
        prompt and write in its answer, both times the same string, and it turns back into the label exactly.
"""

from __future__ import annotations

import re
import unicodedata

from relay_models.errors import LabelError

BACKGROUND = "others"
MAX_LABEL_LENGTH = 512  # characters; a referred expression has tens

# What ends or splits a label, and the sign that stands in for it. The signs are rare in speech, and neither NFKC nor
# case folding touches them.
STAND_INS = {"|": "¦", "*": "∗", "<": "‹", "\n": "↵"}
ESCAPE = "⧵"  # followed by a hexadecimal code point and a semicolon

_SIGNS = {sign: character for character, sign in STAND_INS.items()}
_SHOWN_CHARACTERS = 60

_REFUSED = (
    (re.compile(r"\|"), "contains '|', which separates runs"),
    (re.compile(r"[\r\n]"), "contains a line break, which separates rows"),
    (re.compile(r" \*[0-9]"), "contains ' *' and a digit, which is how a count is written"),
    (re.compile(r"</?seg>"), "contains a tag that delimits descriptors"),
    (re.compile(r"\A\s|\s\Z"), "begins or ends with white space, which is lost around a label"),
    (re.compile(r"[^\S ]|\s\s"), "contains white space other than single spaces, which labels are compared without"),
    (re.compile(r"[\ud800-\udfff]"), "contains half of a surrogate pair, which is no character"),
)
_TO_SUBSTITUTE = re.compile(
    r"\||\n|(?<= )\*(?=[0-9])|<(?=/?seg>)"  # ends or splits a label
    r"|[^\S ]|\A\s|\s\Z|(?<=\s)\s|[\ud800-\udfff]"  # is not kept
    rf"|[{''.join(_SIGNS)}{ESCAPE}]"  # would be taken for a stand-in
)
_TO_RESTORE = re.compile(rf"[{''.join(_SIGNS)}]|{ESCAPE}([0-9a-f]{{1,6}});")


def normalise(label: str) -> str:
    """The label in Unicode's compatibility form (NFKC), each run of white space one space, none at its ends."""
    return " ".join(unicodedata.normalize("NFKC", label).split())


def match_key(label: str) -> str:
    """What two labels of the same class have in common: the normalised label without its case."""
    return normalise(normalise(label).casefold())


def check_label(label: str) -> None:
    """Refuse a label that would not come back from a descriptor, or would make it ambiguous.

    Raises:
        LabelError: names the label and what is wrong with it. `substitute` makes a label of any of them, except of a
            blank and of one longer than `MAX_LABEL_LENGTH` characters.
    """
    _check_size(label)
    for pattern, reason in _REFUSED:
        if pattern.search(label):
            raise LabelError(f"label {_shown(label)} {reason}: write it differently, or use its substitute")


def substitute(label: str) -> str:
    """A label that descriptors carry, and that `restore` turns back into this one; most labels are their own.

    ``a|b`` becomes ``a¦b``, ``sign *5`` becomes ``sign ∗5``, a newline ``↵`` and ``<seg>`` becomes ``‹seg>``. White
    space that would be lost, and a stand-in that was in the label already, become ``⧵`` with the code point: ``⧵a6;``.

    Raises:
        LabelError: the label is blank, or too long once written so.
    """
    _check_size(label)
    written = _TO_SUBSTITUTE.sub(lambda match: _written(match.group()), label)
    check_label(written)
    return written


def restore(label: str) -> str:
    """The label that `substitute` was given. Total: what is no stand-in stays as it is."""
    return _TO_RESTORE.sub(lambda match: _read(match.group(), match.group(1)), label)


def _written(character: str) -> str:
    return STAND_INS.get(character) or f"{ESCAPE}{ord(character):x};"


def _read(stand_in: str, code_point: str | None) -> str:
    if code_point is None:
        return _SIGNS[stand_in]
    return chr(int(code_point, 16)) if int(code_point, 16) <= 0x10FFFF else stand_in


def _check_size(label: str) -> None:
    if not normalise(label):
        raise LabelError(f"label {_shown(label)} is blank: name what is to be segmented")
    if len(label) > MAX_LABEL_LENGTH:
        raise LabelError(
            f"label {_shown(label)} has {len(label)} characters, more than {MAX_LABEL_LENGTH}: write it shorter"
        )


def _shown(label: str) -> str:
    return repr(label if len(label) <= _SHOWN_CHARACTERS else label[:_SHOWN_CHARACTERS] + "…")
