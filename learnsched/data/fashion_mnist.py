"""Fashion-MNIST (Xiao et al. 2017) from its four gzip files in IDX layout."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from pathlib import Path

import torch
from torch import Tensor

from learnsched.data.folders import find
from learnsched.data.splits import DataSet, Split, parted, standardised

_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
_CLASSES = 10
_SEED = 2017


def load(folder: str | os.PathLike[str] | None = None) -> DataSet:
    """Train and validation, 11 to 1 of the published training images (55000, 5000), and test.

    Inputs have shape ``(samples, 1, 28, 28)``; the validation split is a fixed stratified choice.

    Args:
        folder: where the gzip files are; if None, the environment variable
            ``LEARNSCHED_FASHION_MNIST``, or the folder of the Debian package.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is truncated, corrupted or not of this data set.
    """
    paths = find(
        _FILES,
        folder,
        variable="LEARNSCHED_FASHION_MNIST",
        default="/usr/share/datasets/fashion-mnist",
        source="apt-get install dataset-fashion-mnist, or get the four files elsewhere",
    )
    known, test = _read(*paths[:2]), _read(*paths[2:])
    validation, train = parted(known, 12, _SEED)
    return standardised("fashion_mnist", train, validation, test, _CLASSES)


def _read(images: Path, labels: Path) -> Split:
    x, y = read_idx(images), read_idx(labels)
    if x.shape[1:] != (28, 28):
        raise ValueError(f"{images} must hold images of 28 × 28, got shape {tuple(x.shape)}")
    if y.shape != x.shape[:1]:
        raise ValueError(
            f"{labels} must hold {len(x)} labels, one an image, got shape {tuple(y.shape)}"
        )
    if bool((y >= _CLASSES).any()):
        raise ValueError(f"{labels} must hold labels below {_CLASSES}, got {int(y.max())}")
    return Split(x.unsqueeze(1), y.long())


def read_idx(path: Path) -> Tensor:
    """The bytes of a gzip file in IDX layout: a magic number, the sizes, the values.

    Returns:
        uint8 tensor of the shape that the file states.

    Raises:
        ValueError: the file is not gzip, not IDX of bytes, truncated or too long.
    """
    advice = "fetch the file again"
    try:
        content = gzip.decompress(path.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file ({error}); {advice}") from error
    magic, dimensions = content[:3], content[3] if len(content) > 3 else 0
    start = 4 + 4 * dimensions
    if magic != b"\0\0\x08" or not dimensions or len(content) < start:
        raise ValueError(
            f"{path} must begin with the IDX magic number 00 00 08 and its sizes, "
            f"got {content[:4].hex(' ') or 'nothing'} in {len(content)} bytes; {advice}"
        )
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    if len(content) - start != math.prod(shape):
        raise ValueError(
            f"{path} states the shape {tuple(shape)}, {math.prod(shape)} bytes, "
            f"but holds {len(content) - start}; {advice}"
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[start:].reshape(shape)
