"""The four noise shapes whose expectation softens a staircase, each in units of its own std."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from learnsched.choices import check_choice

_UNIFORM_HALF_WIDTH = math.sqrt(3.0)
_TRIANGULAR_HALF_WIDTH = math.sqrt(6.0)
_LOGISTIC_SCALE = math.sqrt(3.0) / math.pi


@dataclass(frozen=True)
class NoiseShape:
    """A symmetric distribution of mean 0 and standard deviation 1.

    Attributes:
        name: ``uniform``, ``triangular``, ``normal`` or ``logistic``.
        cdf: cumulative distribution F(z), elementwise.
        density: its derivative f(z), elementwise.
        derivatives: the density and its derivative, elementwise, for the price of one exponential;
            the derivative is 0 at kinks and jumps.
        half_width: where the support ends; infinite for normal and logistic.
        sample: draws a tensor like its first argument, from its second (a generator or None).
    """

    name: str
    cdf: Callable[[Tensor], Tensor]
    density: Callable[[Tensor], Tensor]
    derivatives: Callable[[Tensor], tuple[Tensor, Tensor]]
    half_width: float
    sample: Callable[[Tensor, torch.Generator | None], Tensor]


def _rand(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.rand(like.shape, dtype=like.dtype, device=like.device, generator=generator)


def _uniform_cdf(z: Tensor) -> Tensor:
    return (z / (2 * _UNIFORM_HALF_WIDTH)).add_(0.5).clamp(0, 1)


def _uniform_density(z: Tensor) -> Tensor:
    return (z.abs() <= _UNIFORM_HALF_WIDTH).to(z.dtype).mul_(1 / (2 * _UNIFORM_HALF_WIDTH))


def _uniform_derivatives(z: Tensor) -> tuple[Tensor, Tensor]:
    return _uniform_density(z), torch.zeros_like(z)


def _uniform_sample(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return (2 * _rand(like, generator) - 1) * _UNIFORM_HALF_WIDTH


def _triangular_cdf(z: Tensor) -> Tensor:
    u = (z / _TRIANGULAR_HALF_WIDTH).clamp(-1, 1)
    return (u.abs().mul_(-0.5).add_(1)).mul_(u).add_(0.5)


def _triangular_density(z: Tensor) -> Tensor:
    width = _TRIANGULAR_HALF_WIDTH
    return z.abs().mul_(-1 / width**2).add_(1 / width).relu_()


def _triangular_derivatives(z: Tensor) -> tuple[Tensor, Tensor]:
    inside = (z.abs() < _TRIANGULAR_HALF_WIDTH).to(z.dtype)
    return _triangular_density(z), inside.mul_(z.sign()).mul_(-1 / _TRIANGULAR_HALF_WIDTH**2)


def _triangular_sample(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return (_rand(like, generator) + _rand(like, generator) - 1) * _TRIANGULAR_HALF_WIDTH


def _normal_density(z: Tensor) -> Tensor:
    return (z * z).mul_(-0.5).exp_().mul_(1 / math.sqrt(2 * math.pi))


def _normal_derivatives(z: Tensor) -> tuple[Tensor, Tensor]:
    density = _normal_density(z)
    return density, (z * density).neg_()


def _normal_sample(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)


def _logistic_cdf(z: Tensor) -> Tensor:
    return (z / _LOGISTIC_SCALE).sigmoid_()


def _logistic_density(z: Tensor) -> Tensor:
    return _logistic_derivatives(z)[0]


def _logistic_derivatives(z: Tensor) -> tuple[Tensor, Tensor]:
    p = _logistic_cdf(z)
    density = (1 - p).mul_(p).mul_(1 / _LOGISTIC_SCALE)
    return density, p.mul_(-2).add_(1).mul_(density).mul_(1 / _LOGISTIC_SCALE)


def _logistic_sample(like: Tensor, generator: torch.Generator | None) -> Tensor:
    tiny = torch.finfo(like.dtype).eps
    return torch.logit(_rand(like, generator), eps=tiny) * _LOGISTIC_SCALE


NOISES: dict[str, NoiseShape] = {
    shape.name: shape
    for shape in (
        NoiseShape(
            "uniform",
            _uniform_cdf,
            _uniform_density,
            _uniform_derivatives,
            _UNIFORM_HALF_WIDTH,
            _uniform_sample,
        ),
        NoiseShape(
            "triangular",
            _triangular_cdf,
            _triangular_density,
            _triangular_derivatives,
            _TRIANGULAR_HALF_WIDTH,
            _triangular_sample,
        ),
        NoiseShape(
            "normal",
            torch.special.ndtr,
            _normal_density,
            _normal_derivatives,
            math.inf,
            _normal_sample,
        ),
        NoiseShape(
            "logistic",
            _logistic_cdf,
            _logistic_density,
            _logistic_derivatives,
            math.inf,
            _logistic_sample,
        ),
    )
}

# How kernels are told the shape; the enum of staircase.c is in this order.
NOISE_CODES = {name: code for code, name in enumerate(NOISES)}


def noise_shape(name: str) -> NoiseShape:
    """The noise shape called ``name``.

    Raises:
        ValueError: there is no such shape.

    Example:
        >>> noise_shape("logistic").half_width
        inf
    """
    check_choice("noise", name, sorted(NOISES))
    return NOISES[name]
