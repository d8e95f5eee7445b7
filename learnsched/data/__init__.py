"""Data sets with fixed train, validation and test splits, without any download."""

from __future__ import annotations

import os

from learnsched import choices
from learnsched.data import cifar10, digits, fashion_mnist, mnist1d, vectors
from learnsched.data.splits import DataSet, Split, reduced, standardised, stratified

__all__ = ["DATA_SETS", "DataSet", "Split", "load", "reduced", "standardised", "stratified"]

_WITH_PACKAGE = {
    "mnist1d": mnist1d.load,
    "digits": digits.load,
    "noisy_digits": digits.load_noisy,
    "shifted_digits": digits.load_shifted,
    "products": vectors.load_products,
    "clusters": vectors.load_clusters,
    "teacher": vectors.load_teacher,
    "hypercube": vectors.load_hypercube,
    "friedman": vectors.load_friedman,
    "quadrics": vectors.load_quadrics,
}
_FROM_FOLDER = {"fashion_mnist": fashion_mnist.load, "cifar10": cifar10.load}

DATA_SETS = (*_WITH_PACKAGE, *_FROM_FOLDER)


def load(name: str, folder: str | os.PathLike[str] | None = None) -> DataSet:
    """The data set of that name, the same to the bit at each call.

    Inputs are float32, standardised with the train split's mean and standard deviation (of each
    channel); labels are int64.

    Args:
        name: one of :data:`DATA_SETS`.
        folder: where the files of ``fashion_mnist`` or ``cifar10`` are; if None, the environment
            variable ``LEARNSCHED_FASHION_MNIST`` or ``LEARNSCHED_CIFAR10``, or the folder of the
            Debian package ``dataset-fashion-mnist``.

    Raises:
        ValueError: the name is unknown, a folder is given for data without files, or a file is
            truncated or corrupted.
        FileNotFoundError: a file is missing.
        ImportError: the package that the data come with is missing.

    Example:
        >>> data = load("digits")
        >>> data.shape, data.classes, len(data.train), len(data.validation), len(data.test)
        ((1, 8, 8), 10, 1000, 297, 500)
    """
    if name in _FROM_FOLDER:
        return _FROM_FOLDER[name](folder)
    choices.check_choice("data set", name, DATA_SETS)
    if folder is not None:
        raise ValueError(f"{name} is not read from files; leave folder out, got {str(folder)!r}")
    return _WITH_PACKAGE[name]()
