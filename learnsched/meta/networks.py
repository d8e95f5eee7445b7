"""The families of small networks that meta-training and evaluation train."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from learnsched.meta.transformer import LAYERS, Transformer

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Family:
    """A kind of network, of any width and of several depths.

    Attributes:
        make: from the shape of an input, width, depth and number of classes to a float network. It
            draws its weights from torch's global generator. Members train stacked, so all are of one
            class, whose forward ``torch.func.vmap`` can map: no branch in it may depend on numbers.
        inputs: the shape of inputs that it takes: a size, or a name where any will do, and the same one
            wherever that name stands; None takes all shapes.
        least: fewest weight layers.
        more: how many more weight layers every larger network has.

    Example:
        >>> images = Family(lambda shape, width, depth, classes: nn.Flatten(), (1, "side", "side"))
        >>> [images.takes(shape) for shape in ((1, 8, 8), (1, 8, 6), (3, 8, 8), (8,))]
        [True, False, False, False]
    """

    make: Callable[[Shape, int, int, int], nn.Module]
    inputs: tuple[int | str, ...] | None = None
    least: int = 2
    more: int = 1

    def takes(self, shape: Shape) -> bool:
        """Whether inputs of a shape suit it."""
        if self.inputs is None:
            return True
        if len(shape) != len(self.inputs):
            return False
        sizes: dict[int | str, int] = {}
        return all(
            size == (wanted if isinstance(wanted, int) else sizes.setdefault(wanted, size))
            for size, wanted in zip(shape, self.inputs, strict=True)
        )


def check_depth(name: str, depth: int, families: Mapping[str, Family] | None = None) -> None:
    """Refuse a number of weight layers that no network of a family has.

    Args:
        name: of the family.
        depth: weight layers.
        families: by name; those of this module if None.

    Raises:
        ValueError: there is no such network.
    """
    family = (families or FAMILIES)[name]
    if depth < family.least or (depth - family.least) % family.more:
        some = ", ".join(str(family.least + n * family.more) for n in range(3))
        raise ValueError(f"family {name} has {some}, ... weight layers, got depth {depth}")


def mlp(inputs: int, width: int, depth: int, classes: int) -> nn.Module:
    """``depth`` linear layers, batch norm and ReLU between them."""
    layers: list[nn.Module] = [nn.Flatten()]
    size = inputs
    for _ in range(depth - 1):
        layers += [nn.Linear(size, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
        size = width
    return nn.Sequential(*layers, nn.Linear(size, classes))


def cnn1d(length: int, width: int, depth: int, classes: int, kernel: int = 5) -> nn.Module:
    """``depth - 1`` convolutions, the first two with stride 2, and a linear layer.

    Args:
        length: of the signals.
        width: channels.
        depth: weight layers.
        classes: of the data.
        kernel: of the first convolution, an odd number; those of the others are half as wide.
    """
    layers: list[nn.Module] = [nn.Unflatten(1, (1, length))]
    channels = 1
    for index in range(depth - 1):
        stride = 2 if index < 2 else 1
        taps = kernel if index == 0 else kernel // 2 + 1
        layers += [
            nn.Conv1d(channels, width, taps, stride, taps // 2, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(),
        ]
        channels = width
        length = (length + stride - 1) // stride
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * length, classes))


def cnn2d(
    side: int,
    width: int,
    depth: int,
    classes: int,
    norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
) -> nn.Module:
    """``depth - 1`` convolutions, the first two with stride 2, and a linear layer.

    Args:
        side: of the square images.
        width: channels.
        depth: weight layers.
        classes: of the data.
        norm: from the channels to what follows each convolution.
    """
    layers: list[nn.Module] = []
    channels = 1
    for index in range(depth - 1):
        stride = 2 if index < 2 else 1
        layers += [
            nn.Conv2d(channels, width, 3, stride, 1, bias=False),
            norm(width),
            nn.ReLU(),
        ]
        channels, side = width, (side + stride - 1) // stride
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * side**2, classes))


class ResidualBlock(nn.Module):
    """Two convolutions around which the input is added, before the last ReLU.

    Args:
        width: channels.

    Example:
        >>> import torch
        >>> tuple(ResidualBlock(4)(torch.zeros(2, 4, 7, 7)).shape)
        (2, 4, 7, 7)
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as ``x``, ``(batch, channels, height, width)``."""
        result: Tensor = self.relu(x + self.branch(x))
        return result


def residual(side: int, width: int, depth: int, classes: int) -> nn.Module:
    """Two convolutions with stride 2, ``(depth - 3) / 2`` residual blocks, and a linear layer.

    Raises:
        ValueError: ``depth`` is even or below 5, which no whole number of blocks has.
    """
    check_depth("residual", depth)
    layers: list[nn.Module] = []
    for channels in (1, width):
        layers += [
            nn.Conv2d(channels, width, 3, 2, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        side = (side + 1) // 2
    layers += [ResidualBlock(width) for _ in range((depth - 3) // 2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * side**2, classes))


def vgg(side: int, width: int, depth: int, classes: int) -> nn.Module:
    """Convolutions in pairs, each pair pooled and twice as wide as the one before, then two linear.

    Args:
        side: of the square images.
        width: channels of the first pair.
        depth: weight layers: two or more pairs of convolutions and the two linear layers.
        classes: of the data.

    Raises:
        ValueError: ``depth`` is odd or below 6.
    """
    check_depth("vgg", depth)
    layers: list[nn.Module] = []
    channels = 1
    for pair in range(depth // 2 - 1):
        for _ in range(2):
            layers += [
                nn.Conv2d(channels, width << pair, 3, 1, 1, bias=False),
                nn.BatchNorm2d(width << pair),
                nn.ReLU(),
            ]
            channels = width << pair
        layers.append(nn.MaxPool2d(2))
        side //= 2
    hidden = 2 * channels
    layers += [nn.Flatten(), nn.Linear(channels * side**2, hidden, bias=False)]
    return nn.Sequential(*layers, nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, classes))


def separable(width: int, depth: int, classes: int) -> nn.Module:
    """A convolution, depthwise ones, each with a pointwise one behind it, a pool, and a linear layer.

    Args:
        width: channels.
        depth: weight layers.
        classes: of the data.

    Raises:
        ValueError: ``depth`` is odd or below 4.
    """
    check_depth("separable", depth)
    kernels = [nn.Conv2d(1, width, 3, 2, 1, bias=False)]
    for pair in range((depth - 2) // 2):
        stride = 2 if pair == 0 else 1
        kernels += [
            nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False),
            nn.Conv2d(width, width, 1, bias=False),
        ]
    layers = [part for kernel in kernels for part in (kernel, nn.BatchNorm2d(width), nn.ReLU())]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def transformer(shape: Shape, width: int, depth: int, classes: int) -> nn.Module:
    """A linear layer for each token, ``(depth - 2) / 4`` blocks, and a linear layer.

    A token is a row of an image, or four samples of a signal.

    Raises:
        ValueError: ``depth`` less 2 is no multiple of 4, the width none of the heads, or a signal's
            length none of 4.
    """
    check_depth("transformer", depth)
    token = shape[-1] if len(shape) > 1 else 4
    return Transformer(math.prod(shape), token, width, (depth - 2) // LAYERS, classes)


_IMAGE = (1, "side", "side")

FAMILIES: Mapping[str, Family] = {
    "mlp": Family(lambda shape, *sizes: mlp(math.prod(shape), *sizes)),
    "cnn1d": Family(lambda shape, *sizes: cnn1d(shape[0], *sizes), ("features",)),
    "cnn1d_wide": Family(
        lambda shape, width, depth, classes: cnn1d(shape[0], width, depth, classes, kernel=9),
        ("features",),
    ),
    "cnn2d": Family(lambda shape, *sizes: cnn2d(shape[-1], *sizes), _IMAGE),
    "cnn2d_group": Family(
        lambda shape, width, depth, classes: cnn2d(
            shape[-1], width, depth, classes, norm=lambda channels: nn.GroupNorm(2, channels)
        ),
        _IMAGE,
    ),
    "separable": Family(lambda shape, *sizes: separable(*sizes), _IMAGE, least=4, more=2),
    "transformer": Family(transformer, least=2 + LAYERS, more=LAYERS),
    "residual": Family(lambda shape, *sizes: residual(shape[-1], *sizes), _IMAGE, least=5, more=2),
    "vgg": Family(lambda shape, *sizes: vgg(shape[-1], *sizes), _IMAGE, least=6, more=2),
}
