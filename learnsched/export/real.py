"""The real operations of a graph in NumPy, to hold real parts against PyTorch's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from learnsched.export import graph as g
from learnsched.export.reference import convolved

Reals = NDArray[np.float32]


def _per_channel(numbers: NDArray[Any], x: Reals) -> Reals:
    return numbers.astype(np.float32).reshape(-1, *[1] * (x.ndim - 2))


def _product(node: g.RealProduct, x: NDArray[Any]) -> Reals:
    y = convolved(x.astype(np.float32), node.weight.astype(np.float32), node.window, node.shape)
    if node.scale is not None:
        y = y * _per_channel(node.scale, y)
    return y if node.bias is None else y + _per_channel(node.bias, y)


def _affine(node: g.RealAffine, x: Reals) -> Reals:
    return x * _per_channel(node.scale, x) + _per_channel(node.bias, x)


def _add(node: g.RealAdd, x: Reals, y: Reals) -> Reals:
    return x + y


def _activation(node: g.RealActivation, x: Reals) -> Reals:
    given = torch.from_numpy(np.asarray(x, np.float32))
    result: Tensor = _ACTIVATIONS[node.operator](node, given)
    return result.numpy()


def _prelu(node: g.RealActivation, x: Tensor) -> Tensor:
    return F.prelu(x, torch.as_tensor(node.slope, dtype=x.dtype).flatten())


_ACTIVATIONS: Mapping[str, Callable[[g.RealActivation, Tensor], Tensor]] = {
    "Relu": lambda node, x: F.relu(x),
    "LeakyRelu": lambda node, x: F.leaky_relu(x, node.alpha or 0.0),
    "Elu": lambda node, x: F.elu(x, node.alpha or 0.0),
    "Celu": lambda node, x: F.celu(x, node.alpha or 0.0),
    "Selu": lambda node, x: F.selu(x),
    "PRelu": _prelu,
}

REAL: Mapping[type[g.Node], Callable[..., NDArray[Any]]] = {
    g.RealProduct: _product,
    g.RealAffine: _affine,
    g.RealActivation: _activation,
    g.RealAdd: _add,
}
