"""The 8 × 8 digits that come with scikit-learn (Alpaydin and Kaynak 1998), also noisy, and shifted."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from learnsched.data.splits import DataSet, Split, standardised, stratified

_SIZES = (1000, 297, 500)
_SEED = 1998

# Of the noise, in standard deviations of the images; and noisy copies of a training image.
_NOISE = 0.8
_COPIES = 4

# Of the larger image that a digit is put into, and of its noise.
_SIDE, _CLUTTER = 16, 0.3


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


def load_noisy() -> DataSet:
    """The same digits under Gaussian noise: images in which a network errs as on natural ones.

    Clean digits are learned to 97 % within a hundred steps; of these a small float network gets
    about 85 % right. Each of the 1000 training images comes four times, each time with noise of its
    own; the noise is fixed, and the splits have the images and the sizes of :func:`load` otherwise.

    Raises:
        ImportError: the package ``scikit-learn`` is missing.
    """

    def noisy(digits: Tensor, generator: torch.Generator) -> Tensor:
        return digits + _NOISE * torch.randn(digits.shape, generator=generator)

    return _changed("noisy_digits", noisy)


def load_shifted() -> DataSet:
    """The same digits, each somewhere in an image of 16 × 16 pixels of noise.

    As in natural images, a network needs features that do not depend on the place: in 600 steps a small
    convolutional float network gets 72 to 80 % right, an MLP half. Each of the 1000 training images
    comes at four places; places and noise are fixed, and the splits have the images and the sizes of
    :func:`load` otherwise.

    Raises:
        ImportError: the package ``scikit-learn`` is missing.
    """

    def shifted(digits: Tensor, generator: torch.Generator) -> Tensor:
        count, _, _, side = digits.shape
        x = _CLUTTER * torch.randn(count, 1, _SIDE, _SIDE, generator=generator)
        corners = torch.randint(_SIDE - side + 1, (count, 2), generator=generator).tolist()
        for image, digit, (top, left) in zip(x, digits, corners, strict=True):
            image[:, top : top + side, left : left + side] += digit
        return x

    return _changed("shifted_digits", shifted)


def _changed(name: str, change: Callable[[Tensor, torch.Generator], Tensor]) -> DataSet:
    """The digits, changed at random once and for all, and the training images in several copies."""
    clean = load()
    generator = torch.Generator().manual_seed(_SEED)

    def split(source: Split, copies: int = 1) -> Split:
        digits = source.x.repeat(copies, 1, 1, 1)
        return Split(change(digits, generator), source.y.repeat(copies))

    return standardised(
        name, split(clean.train, _COPIES), split(clean.validation), split(clean.test), classes=10
    )
