"""Convolutions of stacked networks as matrix products.

Under ``vmap`` torch makes a grouped convolution out of the convolutions of many members, and cuDNN then
launches a kernel for each of them: 2,000 launches a layer where one batched matrix product does. On a
CPU there is no difference to speak of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class ConvolutionsAsProducts(TorchFunctionMode):
    """A context in which 1-d and 2-d convolutions without groups or dilation are matrix products.

    Example:
        >>> x, weight = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
        >>> with ConvolutionsAsProducts():
        ...     y = F.conv2d(x, weight, stride=2, padding=1)
        >>> torch.allclose(y, F.conv2d(x, weight, stride=2, padding=1), atol=1e-4)
        True
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        options = kwargs or {}
        if func in (F.conv1d, F.conv2d):
            product = _as_product(*args, **options)
            if product is not None:
                return product
        return func(*args, **options)


def _as_product(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Tensor | None:
    """The convolution, shape ``(batch, channels, ...)``; None if it is not one of the simple ones."""
    spatial = weight.dim() - 2
    if input.dim() != weight.dim() or groups != 1 or isinstance(padding, str):
        return None
    if any(d != 1 for d in _each(dilation, spatial)):
        return None
    sides = [side for p in reversed(_each(padding, spatial)) for side in (p, p)]
    windows = F.pad(input, sides)
    for place, step in enumerate(_each(stride, spatial)):
        windows = windows.unfold(2 + place, weight.shape[2 + place], step)
    equation = "bcxi,oci->box" if spatial == 1 else "bcxyij,ocij->boxy"
    # What comes of the product looks like "channels last", which batch norm refuses under vmap.
    result = torch.einsum(equation, windows, weight).contiguous()
    return result if bias is None else result + bias.view(-1, *[1] * spatial)


def _each(value: int | tuple[int, ...], count: int) -> tuple[int, ...]:
    return (value,) * count if isinstance(value, int) else tuple(value)
