"""CIFAR-10 (Krizhevsky 2009) from the six files of its binary version."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from learnsched.data.folders import find
from learnsched.data.splits import DataSet, Split, parted, standardised

_FILES = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")
_SHAPE = (3, 32, 32)
_RECORD = 1 + 3 * 32 * 32
_CLASSES = 10
_SEED = 2009


def load(folder: str | os.PathLike[str] | None = None) -> DataSet:
    """Train and validation, 9 to 1 of the published training images (45000, 5000), and test.

    Inputs have shape ``(samples, 3, 32, 32)``; the validation split is a fixed stratified choice.

    Args:
        folder: where the binary files are; if None, the environment variable
            ``LEARNSCHED_CIFAR10``.

    Raises:
        FileNotFoundError: no folder is named, or a file is missing.
        ValueError: a file is truncated, corrupted or not of this data set.
    """
    paths = find(
        _FILES,
        folder,
        variable="LEARNSCHED_CIFAR10",
        default=None,
        source="get the binary version of CIFAR-10 (cifar-10-batches-bin)",
    )
    known, test = _read(paths[:-1]), _read(paths[-1:])
    validation, train = parted(known, 10, _SEED)
    return standardised("cifar10", train, validation, test, _CLASSES)


def _read(paths: Sequence[Path]) -> Split:
    """Records of one label and 32 × 32 values of red, of green and of blue, row by row."""
    records = []
    for path in paths:
        content = bytearray(path.read_bytes())
        if not content or len(content) % _RECORD:
            raise ValueError(
                f"{path} must hold whole records of {_RECORD} bytes, got {len(content)} bytes; "
                "fetch the file again"
            )
        rows = torch.frombuffer(content, dtype=torch.uint8).reshape(-1, _RECORD)
        if bool((rows[:, 0] >= _CLASSES).any()):
            raise ValueError(
                f"{path} must hold labels below {_CLASSES}, got {int(rows[:, 0].max())}; "
                "is it the binary version of CIFAR-10?"
            )
        records.append(rows)
    rows = torch.cat(records)
    return Split(rows[:, 1:].reshape(-1, *_SHAPE), rows[:, 0].long())
