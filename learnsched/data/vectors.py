"""Vectors without any order among their numbers, as in tables: classes by a formula, made on the spot.

Each set has 4000 samples to train on, 1000 for validation and 1000 for tests, always the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from learnsched.data.splits import DataSet, Split, standardised

_SIZES = (4000, 1000, 1000)
_COUNT = sum(_SIZES)


def load_products() -> DataSet:
    """The sign of a sum of two products and one of 20 normal numbers; no single one tells the class.

    Inputs have shape ``(samples, 20)``; two classes.
    """
    x = torch.randn(_COUNT, 20, generator=_generator(1))
    return _data("products", x, x[:, 0] * x[:, 1] + x[:, 2] * x[:, 3] + 0.5 * x[:, 4] > 0, 2)


def load_clusters() -> DataSet:
    """Forty Gaussian clouds that overlap a little, four of each class.

    Inputs have shape ``(samples, 20)``; ten classes.
    """
    generator = _generator(2)
    centres = torch.randn(40, 20, generator=generator)
    chosen = torch.randint(40, (_COUNT,), generator=generator)
    x = centres[chosen] + 0.8 * torch.randn(_COUNT, 20, generator=generator)
    return _data("clusters", x, chosen % 10, 10)


def load_teacher() -> DataSet:
    """What a random network of one hidden layer says of 16 normal numbers.

    Inputs have shape ``(samples, 16)``; six classes.
    """
    generator = _generator(3)
    x = torch.randn(_COUNT, 16, generator=generator)
    first = torch.randn(16, 32, generator=generator) / 4
    second = torch.randn(32, 6, generator=generator) / 32**0.5
    hidden = torch.tanh(2 * x @ first)
    scores = (hidden - hidden.mean(0)) @ second
    return _data("teacher", x, ((scores - scores.mean(0)) / scores.std(0)).argmax(1), 6)


def load_hypercube() -> DataSet:
    """Clouds around corners of a cube in 12 of 30 dimensions, by scikit-learn's ``make_classification``.

    Inputs have shape ``(samples, 30)``; six classes, of which 2 % of the labels are wrong.

    Raises:
        ImportError: the package ``scikit-learn`` is missing.
    """
    make = _from_sklearn("make_classification")
    x, y = make(
        _COUNT, 30, n_informative=12, n_redundant=6, n_classes=6, n_clusters_per_class=2,
        class_sep=1.2, flip_y=0.02, random_state=4,
    )  # fmt: skip
    return _data("hypercube", torch.from_numpy(x), torch.from_numpy(y), 6)


def load_friedman() -> DataSet:
    """In which fifth of its range Friedman's function of five of ten numbers lies, under some noise.

    Inputs have shape ``(samples, 10)``; five classes.

    Raises:
        ImportError: the package ``scikit-learn`` is missing.
    """
    x, y = map(
        torch.from_numpy, _from_sklearn("make_friedman1")(_COUNT, 10, noise=0.5, random_state=5)
    )
    fifths = torch.quantile(y, torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=y.dtype))
    return _data("friedman", x, torch.bucketize(y, fifths, right=True), 5)


def load_quadrics() -> DataSet:
    """The largest of eight sums of 50 normal numbers and of their squares, under much noise.

    Inputs have shape ``(samples, 50)``; eight classes.
    """
    generator = _generator(6)
    x = torch.randn(_COUNT, 50, generator=generator)
    linear = torch.randn(50, 8, generator=generator) / 50**0.5
    square = torch.randn(50, 8, generator=generator) / 50**0.5
    noise = torch.randn(_COUNT, 8, generator=generator)
    return _data("quadrics", x, (x @ linear + 0.7 * x.square() @ square + noise).argmax(1), 8)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _from_sklearn(name: str) -> Callable[..., tuple[Any, Any]]:
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(f"{name} comes with scikit-learn; pip install scikit-learn") from error
    return getattr(datasets, name)


def _data(name: str, x: Tensor, y: Tensor, classes: int) -> DataSet:
    parts = zip(x.float().split(_SIZES), y.long().split(_SIZES), strict=True)
    train, validation, test = (Split(*part) for part in parts)
    return standardised(name, train, validation, test, classes)
