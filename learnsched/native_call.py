"""Calls of the compiled kernels: tensors, level sets and tables as C sees them."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from learnsched import staircase
from learnsched.levels import LevelSet
from learnsched.noise import NOISE_CODES


class _Staircase(ctypes.Structure):
    """A level set and the noise."""

    _fields_ = (
        ("thresholds", ctypes.c_void_p),
        ("gaps", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("count", ctypes.c_long),
        ("whole", ctypes.c_long),
        ("noise", ctypes.c_long),
        ("step", ctypes.c_float),
    )


class Table(ctypes.Structure):
    """A tensor as rows, each with a scale, std and mean of its own, or one for all."""

    _fields_ = (
        ("rows", ctypes.c_long),
        ("columns", ctypes.c_long),
        ("threads", ctypes.c_long),
        ("scale", ctypes.c_void_p),
        ("std", ctypes.c_void_p),
        ("mean", ctypes.c_void_p),
        ("scale_stride", ctypes.c_long),
        ("std_stride", ctypes.c_long),
        ("mean_stride", ctypes.c_long),
    )


class Call:
    """One call of the compiled kernels.

    Args:
        library: the kernels.
        levels: the level set.
        noise: name of the noise shape.
        table: the tensor's rows, and addresses of their numbers.
        kept: scale, std and mean, the tensors at these addresses.
    """

    __slots__ = ("_address", "_kept", "_library", "_std_shape", "_table")

    def __init__(
        self,
        library: ctypes.CDLL,
        levels: LevelSet,
        noise: str,
        table: Table,
        kept: tuple[Tensor | None, Tensor, Tensor],
    ) -> None:
        self._library = library
        made = _staircase(levels, noise)
        self._address = made[0]
        self._table = ctypes.addressof(table)
        self._std_shape = kept[1].shape
        self._kept = (made, table, kept)  # what the kernels are given by address must stay alive

    def value(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        self._library.learnsched_value(self._address, self._table, x.data_ptr(), out.data_ptr())
        return out

    def slope(self, x: Tensor, grad: Tensor) -> Tensor:
        x, grad = x.contiguous(), _like(grad, x)
        out = torch.empty_like(x)
        self._library.learnsched_slope(
            self._address, self._table, x.data_ptr(), grad.data_ptr(), out.data_ptr()
        )
        return out

    def std_slope(self, x: Tensor, grad: Tensor) -> Tensor:
        x, grad = x.contiguous(), _like(grad, x)
        out = x.new_empty(self._std_shape)
        self._library.learnsched_std_slope(
            self._address, self._table, x.data_ptr(), grad.data_ptr(), out.data_ptr()
        )
        return out

    def slope_adjoint(
        self, x: Tensor, grad: Tensor, outer: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, grad, outer = x.contiguous(), _like(grad, x), _like(outer, x)
        return self._adjoint(self._library.learnsched_slope_adjoint, x, grad, outer)

    def std_slope_adjoint(
        self, x: Tensor, grad: Tensor, outer: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, grad, outer = x.contiguous(), _like(grad, x), outer.to(x.dtype).contiguous()
        return self._adjoint(self._library.learnsched_std_slope_adjoint, x, grad, outer)

    def _adjoint(
        self, kernel: Callable[..., None], x: Tensor, grad: Tensor, outer: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        of_grad, of_x = torch.empty_like(x), torch.empty_like(x)
        of_std = x.new_empty(self._std_shape)
        kernel(
            self._address,
            self._table,
            x.data_ptr(),
            grad.data_ptr(),
            outer.data_ptr(),
            of_grad.data_ptr(),
            of_x.data_ptr(),
            of_std.data_ptr(),
        )
        return of_grad, of_x, of_std


def _like(grad: Tensor, x: Tensor) -> Tensor:
    return grad.expand_as(x).to(x.dtype).contiguous()


@functools.lru_cache(maxsize=256)
def _staircase(levels: LevelSet, noise: str) -> tuple[int, _Staircase, tuple[Tensor, ...]]:
    """The address of a level set as the kernels want it, and what must stay alive with it."""
    numbers = (levels.thresholds, levels.gaps, levels.values)
    # Whatever the default device: their addresses are read.
    arrays = tuple(torch.tensor(n, dtype=torch.float32, device="cpu") for n in numbers)
    kind = NOISE_CODES[noise]
    step, whole = staircase.spacing(levels)
    made = _Staircase(*(a.data_ptr() for a in arrays), len(levels.thresholds), whole, kind, step)
    return ctypes.addressof(made), made, arrays
