"""Files that are whole or absent: written beside their place, then renamed over it."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path whose file takes the place of ``path`` when the block ends without error.

    A file that was there before hands on its permissions; behind a link it is the file that is replaced.

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
    target = Path(os.path.realpath(path))
    temporary = hidden(target)
    try:
        temporary.touch(exist_ok=False)
        yield temporary
        sync(temporary)
        if target.exists():
            temporary.chmod(stat.S_IMODE(target.stat().st_mode))
        os.replace(temporary, target)
    except BaseException as error:
        with suppress(OSError):  # there is none where the folder is missing
            temporary.unlink()
        if isinstance(error, OSError) and error.errno is not None and _of_temporary(error, target):
            error.filename = str(path)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, whole or not at all.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.txt"
        >>> write_text(path, "whole")
        >>> path.read_text()
        'whole'
    """
    write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write(path: str | Path, writer: Callable[[Path], object]) -> None:
    """Let ``writer`` write a file, whole or not at all.

    Example:
        >>> import tempfile, torch
        >>> path = Path(tempfile.mkdtemp()) / "last.pt"
        >>> write(path, lambda temporary: torch.save({"epoch": 3}, temporary))
        >>> torch.load(path)
        {'epoch': 3}
    """
    with replacing(path) as temporary:
        writer(temporary)


def hidden(path: Path) -> Path:
    """A name beside a path that nothing has."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{path.suffix}")


def sync(path: Path) -> None:
    """Have what was written to a file on the disk."""
    with path.open("rb") as written:
        os.fsync(written.fileno())


def _of_temporary(error: OSError, target: Path) -> bool:
    """Whether an error names no file, as of a full disk, or one that means nothing to the user."""
    if error.filename is None:
        return True
    return error.filename2 is None and Path(error.filename).name.startswith(f".{target.name}.")
