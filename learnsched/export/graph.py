"""A finalized network as a list of integer layers: what every format is written from.

A tensor is either *integer*, standing for ``integer * scale + bias``, or *real*. Arrays are NumPy's,
shapes leave the batch dimension out, channels come first. Nothing here knows of PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Floats = NDArray[np.float32]

# The name of a network's decoded output, whatever its layers are called.
OUTPUT = "output"


@dataclass(frozen=True)
class IntegerLevels:
    """A level set whose levels are whole multiples of a unit.

    Attributes:
        integers: the levels in units of ``unit``, increasing.
        unit: level step in units of the tensor's scale.
        name: of the level set.
    """

    integers: tuple[int, ...]
    unit: float
    name: str

    @property
    def bits(self) -> int:
        """Bits of the two's complement, or unsigned, number that holds every level."""
        low, high = self.integers[0], self.integers[-1]
        if low >= 0:
            return max(1, high.bit_length())
        return max((-low - 1).bit_length(), high.bit_length()) + 1

    @property
    def signed(self) -> bool:
        """Whether a level is negative."""
        return self.integers[0] < 0

    @property
    def contiguous(self) -> bool:
        """Whether the levels are neighbouring integers."""
        return self.integers[-1] - self.integers[0] == len(self.integers) - 1


@dataclass(frozen=True, eq=False, kw_only=True)
class Node:
    """One operation.

    Attributes:
        name: of its output: the name of the module, with a number if it is called again.
        inputs: names of the nodes whose outputs it reads.
        shape: of its output, without the batch dimension.
    """

    name: str
    inputs: tuple[str, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class Input(Node):
    """The network's input, real."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Reshape(Node):
    """The same elements in the same order, in another shape."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Quantize(Node):
    """From real to integer: the level of ``x / scale``, divided in float32.

    Attributes:
        levels: what it puts out.
        thresholds: in units of the scale; ``x / scale >= t`` takes the upper level.
        scale: a float32 number, positive.
    """

    levels: IntegerLevels
    thresholds: tuple[float, ...]
    scale: float


@dataclass(frozen=True, eq=False, kw_only=True)
class Window:
    """Where a convolution or a pool looks; one number a spatial dimension.

    Attributes:
        stride: between windows; of a transposed convolution, between the places of its inputs.
        padding: zeros at both sides; of a transposed convolution, what is cut off at both sides.
        dilation: between the elements of a window.
        groups: of a convolution.
        transposed: whether it is a transposed convolution. What it puts out beyond the last window,
            PyTorch's ``output_padding``, follows from the shapes.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    transposed: bool = False


@dataclass(frozen=True, eq=False, kw_only=True)
class Product(Node):
    """A matrix product or convolution of integers with integers; its output is an accumulator.

    Attributes:
        weight: shape ``(channels, inputs / groups, ...)``, of a transposed convolution too.
        levels: the weight's level set.
        window: of a convolution; None for a matrix product.
        low: least value that the accumulator can reach, in each channel.
        high: greatest value, in each channel.
    """

    weight: Integers
    levels: IntegerLevels
    window: Window | None
    low: Integers
    high: Integers


@dataclass(frozen=True, eq=False, kw_only=True)
class Threshold(Node):
    """From accumulators to codes: batch norm, addition, activation and quantization in one.

    The first input is compared, ``code = Σ_k [sign * x >= thresholds[channel, row, k]]``, and the
    level ``levels.integers[code]`` put out. The second input, if there is one, chooses the row: its
    value minus ``row_low``.

    Attributes:
        sign: 1 or -1 for each channel: -1 where codes fall as the accumulator rises (γ < 0).
        thresholds: shape ``(channels, rows, levels - 1)``, not decreasing along the last dimension. The
            least value that ``sign * x`` can take means *always*, one more than the greatest *never*.
        low: least value of ``sign * x``, shape ``(channels,)``.
        high: greatest value of ``sign * x``, shape ``(channels,)``.
        row_low: the second input's value in row 0.
        levels: what it puts out.
        slopes: of the real value that is quantized, in units of the level step, with respect to each
            input, shape ``(inputs, channels)``; None where it is no affine function of them.
    """

    sign: Integers
    thresholds: Integers
    low: Integers
    high: Integers
    row_low: int
    levels: IntegerLevels
    slopes: NDArray[np.float64] | None


@dataclass(frozen=True, eq=False, kw_only=True)
class MaxPool(Node):
    """The greatest value in each window, of integers or of real numbers."""

    kernel: tuple[int, ...]
    window: Window


@dataclass(frozen=True, eq=False, kw_only=True)
class SumPool(Node):
    """The sum of each window, of integers; with ``mean``, the mean of real numbers."""

    kernel: tuple[int, ...]
    window: Window
    mean: bool = False


@dataclass(frozen=True, eq=False, kw_only=True)
class Concat(Node):
    """Its inputs one after the other along the channels, all of them integer or all of them real."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Pad(Node):
    """Zeros around a tensor, integer or real.

    Attributes:
        before: how many ahead of each spatial dimension.
        after: how many behind it.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class Repeat(Node):
    """Every element several times: upsampling to the nearest neighbour.

    Attributes:
        times: how often along each spatial dimension.
    """

    times: tuple[int, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class Decode(Node):
    """From integer to real: ``x * scale + bias``, with one number or one for each channel."""

    scale: Floats
    bias: Floats | None


@dataclass(frozen=True, eq=False, kw_only=True)
class RealProduct(Node):
    """A product with real operands.

    Attributes:
        weight: real; or, if ``levels`` is given, the integers of a quantized weight.
        levels: the weight's level set, None if it is real.
        scale: of each channel, to multiply the result with; None if the weight is real.
        bias: of each channel.
        reason: why it is not an integer product, and the way out, for error messages.
    """

    weight: NDArray[np.float32] | Integers
    levels: IntegerLevels | None
    scale: Floats | None
    bias: Floats | None
    window: Window | None
    reason: str


@dataclass(frozen=True, eq=False, kw_only=True)
class RealAffine(Node):
    """Batch norm of real numbers, ``x * scale + bias`` for each channel."""

    scale: Floats
    bias: Floats


@dataclass(frozen=True, eq=False, kw_only=True)
class RealActivation(Node):
    """A real activation: the ONNX operator ``operator`` with the attribute ``alpha``.

    Attributes:
        operator: Relu, LeakyRelu, Elu, Celu, Selu or PRelu.
        alpha: of LeakyRelu, Elu and Celu.
        slope: of PRelu, one number or one for each channel.
    """

    operator: str
    alpha: float | None = None
    slope: Floats | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class RealAdd(Node):
    """The sum of two real tensors."""


REAL = (RealProduct, RealAffine, RealActivation, RealAdd)
# Integer or real, as what they read.
STRUCTURAL = (Reshape, MaxPool, SumPool, Concat, Pad, Repeat)


def swap_channels(weight: NDArray[Any], groups: int) -> NDArray[Any]:
    """A transposed convolution's weight with its output channels first, or put back from there.

    Args:
        weight: shape ``(inputs, channels / groups, ...)``, or ``(channels, inputs / groups, ...)``.
        groups: of the convolution.

    Example:
        >>> swap_channels(np.zeros((6, 1, 5)), groups=2).shape
        (2, 3, 5)
    """
    grouped = weight.reshape(groups, -1, *weight.shape[1:]).swapaxes(1, 2)
    return grouped.reshape(-1, *grouped.shape[2:])


@dataclass(frozen=True, eq=False)
class Graph:
    """Nodes in order of execution; the last one is the output, a :class:`Decode` or real.

    Attributes:
        nodes: the operations.
        modules: name of the node for every quantizing module of the model, by the module's name.
    """

    nodes: tuple[Node, ...]
    modules: dict[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def __getitem__(self, name: str) -> Node:
        return next(node for node in self.nodes if node.name == name)

    @property
    def output(self) -> Node:
        """The last node."""
        return self.nodes[-1]

    def operations(self, node: Product | RealProduct) -> int:
        """Multiply-accumulates of a product for one sample."""
        transposed = node.window is not None and node.window.transposed
        places = self[node.inputs[0]].shape if transposed else node.shape
        return math.prod(places[1:]) * node.weight.size
