"""What relay_models refuses, as one tree.

    RelayModelsError (a ValueError: an argument, a file or a picture cannot be used)
    ├── LabelError       a label that a descriptor cannot carry
    ├── ImageError       bytes that are no picture we can open, or too large a one
    ├── GrammarError     a grammar that cannot be made for this grid and these labels
    ├── CheckpointError  weights that are not what they are said to be
    └── DatasetError     annotations that cannot be used; names the file and the line or field too

Every message names the field and the value, and says what to do.
"""

from __future__ import annotations


class RelayModelsError(ValueError):
    """Base of every error this package raises for bad input."""


class LabelError(RelayModelsError):
    """A label that a descriptor cannot carry."""


class ImageError(RelayModelsError):
    """Bytes that are no picture we can open, or too large a one."""


class GrammarError(RelayModelsError):
    """A grammar that cannot be made for this grid and these labels."""


class CheckpointError(RelayModelsError):
    """Weights that are not what they are said to be."""


class DatasetError(RelayModelsError):
    """Annotations that cannot be used: the message names the file, the line or field, and the value."""
