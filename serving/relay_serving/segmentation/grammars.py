"""The structured-output constraints of one server: for answers to our own questions, and for chats."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from relay_models.errors import GrammarError
from relay_models.text4seg.codec import BACKGROUND, CLOSE_TAG, OPEN_TAG
from relay_models.text4seg.grammar import GrammarSpec, body_grammar, seg_grammar, worst_case_tokens
from relay_serving.segmentation.errors import RequestError

FORCED_PREAMBLE = ("\n",)  # what stands between an answer's sentence and its descriptor


class Grammars:
    """Grammars for one grid.

    Args:
        count_tokens: how many tokens of the served model a text has.
    """

    def __init__(self, rows: int, columns: int, count_tokens: Callable[[str], int]) -> None:
        self._rows, self._columns = rows, columns
        self._count_tokens = count_tokens

    def answer(self, labels: Sequence[str] | None) -> str:
        """A sentence and a descriptor, or a sentence alone. None for `labels` allows any label."""
        return self._written(labels, allow_refusal=True)

    def forced(self, labels: Sequence[str] | None) -> str:
        """A descriptor, whatever was said before."""
        return self._written(labels, preamble=FORCED_PREAMBLE)

    def chat(self) -> str:
        """A structural tag: text is free until it opens a descriptor, which then has to be one."""
        content = {"type": "grammar", "grammar": body_grammar(GrammarSpec(self._rows, self._columns, None))}
        tag = {"type": "tag", "begin": OPEN_TAG, "content": content, "end": CLOSE_TAG}
        tags = {"type": "triggered_tags", "triggers": [OPEN_TAG], "tags": [tag]}
        return json.dumps({"type": "structural_tag", "format": tags})

    @cached_property
    def least_tokens(self) -> int:
        """Tokens of the shortest answer: a grid of background, and the end of the text."""
        row = f"{BACKGROUND} *{self._columns}\n"
        return self._count_tokens(f"{OPEN_TAG}{' '.join([row] * self._rows)}{CLOSE_TAG}") + 1

    def most_tokens(self, labels: Sequence[str] | None) -> int | None:
        """Tokens of the longest descriptor of these labels, a checkerboard.

        None where that is not known: any label may stand in it, or the labels are too many for a grammar.
        """
        if labels is None:
            return None
        try:
            spec = GrammarSpec(self._rows, self._columns, (BACKGROUND, *labels), preamble=FORCED_PREAMBLE)
        except GrammarError:
            return None
        return worst_case_tokens(spec, self._count_tokens)

    def _written(self, labels: Sequence[str] | None, **others: Any) -> str:
        known = None if labels is None else (BACKGROUND, *labels)
        try:
            return seg_grammar(GrammarSpec(self._rows, self._columns, known, **others))
        except GrammarError as error:
            raise RequestError(str(error)) from error
