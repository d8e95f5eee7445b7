"""The kernels as operators of torch, ``torch.ops.learnsched.*``, for what traces and does not run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from learnsched import kernels
from learnsched.levels import LevelSet
from learnsched.noise import noise_shape


def aligned(
    batch: int, in_dims: tuple[Any, ...], args: tuple[Any, ...], full: int
) -> tuple[Any, ...]:
    """Arguments under a vmap, with the mapped dimension first and as many others as broadcasting needs.

    The first ``full`` of them have the shape of the result, and all get the mapped dimension.
    """
    mapped = zip(args, in_dims, strict=True)
    rank = max(a.dim() - (d is not None) for a, d in mapped if isinstance(a, Tensor))

    def moved(place: int, arg: Any, dim: int | None) -> Any:
        if not isinstance(arg, Tensor):
            return arg
        if dim is None:
            return arg.expand(batch, *arg.shape) if place < full else arg
        arg = arg.movedim(dim, 0)
        return arg.reshape(len(arg), *[1] * (rank - arg.dim() + 1), *arg.shape[1:])

    return tuple(moved(i, a, d) for i, (a, d) in enumerate(zip(args, in_dims, strict=True)))


@functools.lru_cache(maxsize=256)
def _level_set(values: tuple[float, ...], thresholds: tuple[float, ...]) -> LevelSet:
    return LevelSet(values, thresholds)


_TAIL = "Tensor x, Tensor std, Tensor mean, Tensor? scale, float[] values, float[] thresholds, str noise"
# arguments from std on
_AFTER_X = 6
_LIBRARY = torch.library.Library("learnsched", "DEF")


def _define(
    name: str,
    leading: str,
    result: str,
    function: Callable[..., Any],
    like: Callable[..., Any],
) -> None:
    """Register an operator: its schema, its computation, and the shapes of its results."""
    _LIBRARY.define(f"{name}({leading}{_TAIL}) -> {result}")

    def compute(*args: Any) -> Any:
        *tensors, x, std, mean, scale, values, thresholds, noise = args
        levels = _level_set(tuple(values), tuple(thresholds))
        return function(*tensors, x, levels, std, mean, noise_shape(noise), scale)

    def mapped(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        batch, full = info.batch_size, len(args) - _AFTER_X
        std, std_dim = args[full], in_dims[full]
        shape = std.shape if std_dim is None else std.movedim(std_dim, 0).shape[1:]
        if like is not _like_x and std_dim is None:  # each member has a sum of its own
            args = (*args[:full], std.expand(batch, *std.shape), *args[full + 1 :])
            in_dims = (*in_dims[:full], 0, *in_dims[full + 1 :])
        operator = getattr(torch.ops.learnsched, name)
        result = operator(*aligned(batch, in_dims, args, full))
        if like is _like_x:
            return result, 0
        if like is _like_std:
            return result.reshape(batch, *shape), 0
        *both, of_std = result
        return (*both, of_std.reshape(batch, *shape)), (0, 0, 0)

    _LIBRARY.impl(name, compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"learnsched::{name}", like, lib=_LIBRARY)
    torch.library.register_vmap(f"learnsched::{name}", mapped, lib=_LIBRARY)


def _like_x(*args: Any) -> Tensor:
    return torch.empty_like(args[-7], memory_format=torch.contiguous_format)


def _like_std(*args: Any) -> Tensor:
    return torch.empty_like(args[-6], memory_format=torch.contiguous_format)


def _like_all(*args: Any) -> tuple[Tensor, ...]:
    return _like_x(*args), _like_x(*args), _like_std(*args)


_define("value", "", "Tensor", kernels.value, _like_x)
_define("slope", "Tensor grad, ", "Tensor", kernels.slope, _like_x)
_define("std_slope", "Tensor grad, ", "Tensor", kernels.std_slope, _like_std)
_TRIPLE = "(Tensor, Tensor, Tensor)"
_define("slope_adjoint", "Tensor outer, Tensor grad, ", _TRIPLE, kernels.slope_adjoint, _like_all)
_define(
    "std_slope_adjoint",
    "Tensor outer, Tensor grad, ",
    _TRIPLE,
    kernels.std_slope_adjoint,
    _like_all,
)
