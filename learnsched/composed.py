"""The operations under the annealed quantizer, composed of PyTorch's: for whatever is not compiled."""

from __future__ import annotations

from torch import Tensor

from learnsched import staircase
from learnsched.levels import LevelSet
from learnsched.noise import NoiseShape
from learnsched.staircase import Level


class Composed:
    """A :class:`~learnsched.kernels.Kernel` of the functions of :mod:`learnsched.staircase`."""

    def __init__(
        self, levels: LevelSet, std: Level, mean: Level, noise: NoiseShape, scale: Tensor | None
    ) -> None:
        self._staircase = levels, std, mean, noise
        self._scale = scale

    def value(self, x: Tensor) -> Tensor:
        result = staircase.expectation(self._over(x), *self._staircase)
        return self._times(result).to(x.dtype)

    def slope(self, x: Tensor, grad: Tensor) -> Tensor:
        return staircase.slope(self._over(x), *self._staircase) * grad

    def std_slope(self, x: Tensor, grad: Tensor) -> Tensor:
        each = staircase.std_slope(self._over(x), *self._staircase) * grad
        return self._summed(self._times(each))

    def slope_adjoint(
        self, x: Tensor, grad: Tensor, outer: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        parts = staircase.slope_derivatives(self._over(x), *self._staircase)
        both = outer * grad
        return parts[0] * outer, self._over(parts[1] * both), self._summed(parts[2] * both)

    def std_slope_adjoint(
        self, x: Tensor, grad: Tensor, outer: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        parts = staircase.std_slope_derivatives(self._over(x), *self._staircase)
        scaled = self._times(outer)
        of_std = self._summed(parts[2] * grad * scaled)
        return parts[0] * scaled, parts[1] * grad * outer, of_std

    def _over(self, x: Tensor) -> Tensor:
        return x if self._scale is None else x / self._scale

    def _times(self, x: Tensor) -> Tensor:
        return x if self._scale is None else x * self._scale

    def _summed(self, x: Tensor) -> Tensor:
        """To the shape of the std."""
        std = self._staircase[1]
        return x.sum_to_size(std.shape) if isinstance(std, Tensor) else x.sum()
