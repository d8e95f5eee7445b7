"""What export and import refuse."""

from __future__ import annotations


class ExportError(ValueError):
    """A network cannot be written in a format; the message names the layer and the way out."""


class FolderError(ValueError):
    """A folder is not a whole, unaltered network of this format; the message says what is wrong."""
