"""What export and import refuse."""

from __future__ import annotations


class ExportError(ValueError):
    """A network cannot be written in a format; the message names the layer and the way out.

    Example:
        >>> from torch import nn, zeros
        >>> import learnsched as ls
        >>> net = ls.finalize_(ls.quantize_(nn.Sequential(nn.Linear(2, 2)), ls.ternary()))
        >>> try:
        ...     ls.export_ternary(net, zeros(1, 2), "net")  # its input is not quantized
        ... except ExportError as error:
        ...     print(type(error).__name__)
        ExportError
    """


class FolderError(ValueError):
    """A folder is not a whole, unaltered network of this format; the message says what is wrong.

    Example:
        >>> import pathlib, tempfile
        >>> from learnsched import integer_reference
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> _ = (folder / "manifest.json").write_text("{}")
        >>> try:
        ...     integer_reference(folder)
        ... except FolderError as error:
        ...     print(type(error).__name__)
        FolderError
    """
