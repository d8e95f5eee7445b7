"""MNIST-1D (Greydanus 2020): ten digits as signals of 40 samples, generated on the spot."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from learnsched.data.splits import DataSet, Split, standardised

_VALIDATION_SEED = 43
_VALIDATION = 2000


def load() -> DataSet:
    """Train (4000) and test (1000) as published; validation (2000) drawn with another seed.

    Inputs have shape ``(samples, 40)``. The global random states are left as they were.

    Raises:
        ImportError: the package ``mnist1d`` is missing.
    """
    try:
        from mnist1d.data import get_dataset_args, make_dataset
    except ImportError as error:
        raise ImportError("mnist1d needs its generator; pip install mnist1d") from error
    published, fresh = get_dataset_args(), get_dataset_args()
    fresh.seed = _VALIDATION_SEED
    with _random_states_kept():
        standard, other = make_dataset(published), make_dataset(fresh)
    return standardised(
        "mnist1d",
        train=_split(standard["x"], standard["y"]),
        validation=_split(other["x"][:_VALIDATION], other["y"][:_VALIDATION]),
        test=_split(standard["x_test"], standard["y_test"]),
        classes=10,
    )


def _split(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> Split:
    return Split(torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.int64))


@contextmanager
def _random_states_kept() -> Iterator[None]:
    # the generator seeds the global states of random and numpy
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
