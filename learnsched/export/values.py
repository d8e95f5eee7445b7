"""What is known of a tensor while a network is translated, and the numbers behind quantizers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from learnsched.export import graph as g
from learnsched.finalize import IntegerWeights
from learnsched.modules import TRANSPOSED

Doubles = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Integer:
    """An integer tensor that stands for ``integer * scale + bias``.

    Attributes:
        node: whose output it is.
        scale: one number, or one a channel; positive.
        bias: one number a channel, or None.
        low: least integer, one or one a channel.
        high: greatest integer.
    """

    node: str
    scale: Doubles
    bias: Doubles | None
    low: g.Integers
    high: g.Integers

    @property
    def plain(self) -> bool:
        """Whether every channel has the same scale, and no bias: what a product can take."""
        return not self.scale.ndim and self.bias is None

    def decode(self, integers: g.Integers) -> Doubles:
        """The real numbers that integers of shape ``(many, channels)`` stand for."""
        value = integers * self.scale
        return value if self.bias is None else value + self.bias


def joined(node: str, values: Sequence[Integer], channels: Sequence[int]) -> Integer:
    """Integer tensors one after the other along the channels, the output of ``node``."""

    def whole(parts: list[NDArray[Any]]) -> NDArray[Any]:
        every = [np.broadcast_to(p, n) for p, n in zip(parts, channels, strict=True)]
        return np.concatenate(every)

    scale = whole([value.scale for value in values])
    if all(value.plain for value in values) and (scale == scale[0]).all():
        scale = np.asarray(scale[0])
    bias = None
    if any(value.bias is not None for value in values):
        bias = whole([np.zeros(()) if v.bias is None else v.bias for v in values])
    low, high = whole([v.low for v in values]), whole([v.high for v in values])
    return Integer(node, scale, bias, low, high)


@dataclass(frozen=True)
class Real:
    """A real tensor: the output of the node."""

    node: str


class Pending:
    """A pointwise operation: part of what a quantizer after it decides, or else a real operation."""


Value = Integer | Real | Pending


def integer_levels(values: tuple[float, ...], name: str = "custom") -> g.IntegerLevels | None:
    """The levels as multiples of the largest unit there is, or None if that takes over 16 bits.

    Example:
        >>> integer_levels((-0.5, 0.0, 0.75)).integers
        (-2, 0, 3)
    """
    whole = [value.as_integer_ratio() for value in map(float, values)]
    common = math.lcm(*(denominator for _, denominator in whole))
    numerators = [numerator * (common // denominator) for numerator, denominator in whole]
    divisor = math.gcd(*numerators)
    integers = tuple(numerator // divisor for numerator in numerators)
    if max(map(abs, integers)) >= 2**15:
        return None
    return g.IntegerLevels(integers, divisor / common, name)


def weight_levels(module: nn.Module, weights: IntegerWeights | None) -> g.IntegerLevels | None:
    """The integer levels of a layer's weight; None if it is real or has no such levels."""
    if weights is None:
        return None
    quantizer: Any = module.weight_quantizer
    return integer_levels(weights.values, quantizer.levels.name)


def channels_first(module: nn.Module, weight: NDArray[Any]) -> NDArray[Any]:
    """A layer's weight, shape ``(channels, inputs / groups, ...)`` whatever the layer."""
    if isinstance(module, TRANSPOSED):
        return g.swap_channels(weight, module.groups)
    return weight


def weight_integers(
    module: nn.Module, weights: IntegerWeights, levels: g.IntegerLevels
) -> tuple[g.Integers, Doubles]:
    """A weight's integers, output channels first, and the scale of each channel."""
    codes = channels_first(module, weights.codes.numpy())
    scales = np.broadcast_to(weights.scale.double().numpy(), weights.codes.shape)
    scale = channels_first(module, scales).reshape(len(codes), -1)[:, 0] * levels.unit
    return np.array(levels.integers, dtype=np.int64)[codes], scale
