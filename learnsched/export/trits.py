"""Five ternary digits a byte: 3^5 = 243 of a byte's 256 values."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from learnsched.export.errors import FolderError

_POWERS = 3 ** np.arange(5)


def pack(values: NDArray[np.int64]) -> bytes:
    """The integers -1, 0 and 1 in C order, five a byte; the last byte is filled up with -1.

    A byte is ``Σ_i 3^i (value_i + 1)``.

    Raises:
        ValueError: a value is not -1, 0 or 1.

    Example:
        >>> list(pack(np.array([0, 1, -1, -1, -1, 1])))
        [7, 2]
    """
    flat = np.asarray(values).ravel()
    if not np.isin(flat, (-1, 0, 1)).all():
        raise ValueError("trits are -1, 0 and 1")
    digits = np.zeros(-(-len(flat) // 5) * 5, dtype=np.int64)
    digits[: len(flat)] = flat + 1
    return (digits.reshape(-1, 5) @ _POWERS).astype(np.uint8).tobytes()


def unpack(content: bytes, count: int) -> NDArray[np.int64]:
    """The first ``count`` integers of :func:`pack`'s bytes.

    Raises:
        FolderError: there are too many bytes or too few, or one stands for no five digits.

    Example:
        >>> unpack(bytes([7, 2]), 6).tolist()
        [0, 1, -1, -1, -1, 1]
    """
    if len(content) != -(-count // 5):
        raise FolderError(f"{count} trits take {-(-count // 5)} bytes, got {len(content)}")
    numbers = np.frombuffer(content, dtype=np.uint8).astype(np.int64)
    if (numbers >= 243).any():
        raise FolderError("a byte of trits must be below 243; the file is of another format")
    digits = numbers[:, None] // _POWERS % 3
    if (digits.ravel()[count:] != 0).any():
        raise FolderError("the last byte of trits must be filled up with -1")
    return digits.ravel()[:count] - 1
