"""The 8 × 8 digits that come with scikit-learn (Alpaydin and Kaynak 1998)."""

from __future__ import annotations

import torch

from learnsched.data.splits import DataSet, Split, standardised, stratified

_SIZES = (1000, 297, 500)
_SEED = 1998


def load() -> DataSet:
    """Train (1000), validation (297) and test (500), a fixed stratified choice.

    Inputs have shape ``(samples, 1, 8, 8)``.

    Raises:
        ImportError: the package ``scikit-learn`` is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("digits come with scikit-learn; pip install scikit-learn") from error
    source = load_digits()
    x = torch.tensor(source.images, dtype=torch.float32).unsqueeze(1)
    y = torch.tensor(source.target, dtype=torch.int64)
    train, validation, test = (Split(x[i], y[i]) for i in stratified(y, _SIZES, _SEED))
    return standardised("digits", train, validation, test, classes=10)
