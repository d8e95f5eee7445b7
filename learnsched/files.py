"""Files that are whole or absent: written beside their place, then renamed over it."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path whose file takes the place of ``path`` when the block ends without error.

    Raises:
        OSError: the folder cannot be written, the disk is full, or ``path`` is a folder, a device or a
            pipe; ``path`` is as it was.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "a.txt"
        >>> with replacing(target) as temporary:
        ...     _ = temporary.write_text("whole")
        >>> target.read_text()
        'whole'
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file, which could be replaced", str(path))
    temporary = None
    try:
        handle, name = tempfile.mkstemp(
            prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent
        )
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and _of_temporary(error, path):
            error.filename = str(path)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, whole or not at all.

    Example:
        >>> path = Path(tempfile.mkdtemp()) / "a.txt"
        >>> write_text(path, "whole")
        >>> path.read_text()
        'whole'
    """
    write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write(path: str | Path, writer: Callable[[Path], object]) -> None:
    """Let ``writer`` write a file, whole or not at all.

    Example:
        >>> import torch
        >>> path = Path(tempfile.mkdtemp()) / "last.pt"
        >>> write(path, lambda temporary: torch.save({"epoch": 3}, temporary))
        >>> torch.load(path)
        {'epoch': 3}
    """
    with replacing(path) as temporary:
        writer(temporary)


def _of_temporary(error: OSError, path: Path) -> bool:
    """Whether an error names no file, as of a full disk, or one that means nothing to the user."""
    if error.filename is None:
        return True
    return error.filename2 is None and Path(error.filename).name.startswith(f".{path.name}.")


def _umask() -> int:
    # The mask can only be read by setting it.
    mask = os.umask(0)
    os.umask(mask)
    return mask
