"""The four noise shapes whose expectation softens a staircase, each in units of its own std."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

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
        curvature: the derivative of the density, elementwise; 0 at kinks and jumps.
        half_width: where the support ends; infinite for normal and logistic.
        lipschitz: largest value of the density.
        sample: draws a tensor like its first argument, from its second (a generator or None).
    """

    name: str
    cdf: Callable[[Tensor], Tensor]
    density: Callable[[Tensor], Tensor]
    curvature: Callable[[Tensor], Tensor]
    half_width: float
    lipschitz: float
    sample: Callable[[Tensor, torch.Generator | None], Tensor]


def _rand(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.rand(like.shape, dtype=like.dtype, device=like.device, generator=generator)


def _uniform_cdf(z: Tensor) -> Tensor:
    return (z / (2 * _UNIFORM_HALF_WIDTH) + 0.5).clamp(0, 1)


def _uniform_density(z: Tensor) -> Tensor:
    return (z.abs() <= _UNIFORM_HALF_WIDTH).to(z.dtype) / (2 * _UNIFORM_HALF_WIDTH)


def _uniform_curvature(z: Tensor) -> Tensor:
    return torch.zeros_like(z)


def _uniform_sample(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return (2 * _rand(like, generator) - 1) * _UNIFORM_HALF_WIDTH


def _triangular_cdf(z: Tensor) -> Tensor:
    u = (z / _TRIANGULAR_HALF_WIDTH).clamp(-1, 1)
    return 0.5 + u - 0.5 * u * u.abs()


def _triangular_density(z: Tensor) -> Tensor:
    return (1 - z.abs() / _TRIANGULAR_HALF_WIDTH).clamp(min=0) / _TRIANGULAR_HALF_WIDTH


def _triangular_curvature(z: Tensor) -> Tensor:
    return -z.sign() * (z.abs() < _TRIANGULAR_HALF_WIDTH) / _TRIANGULAR_HALF_WIDTH**2


def _triangular_sample(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return (_rand(like, generator) + _rand(like, generator) - 1) * _TRIANGULAR_HALF_WIDTH


def _normal_density(z: Tensor) -> Tensor:
    return torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


def _normal_curvature(z: Tensor) -> Tensor:
    return -z * _normal_density(z)


def _normal_sample(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)


def _logistic_cdf(z: Tensor) -> Tensor:
    return torch.sigmoid(z / _LOGISTIC_SCALE)


def _logistic_density(z: Tensor) -> Tensor:
    p = torch.sigmoid(z / _LOGISTIC_SCALE)
    return p * (1 - p) / _LOGISTIC_SCALE


def _logistic_curvature(z: Tensor) -> Tensor:
    p = torch.sigmoid(z / _LOGISTIC_SCALE)
    return p * (1 - p) * (1 - 2 * p) / _LOGISTIC_SCALE**2


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
            _uniform_curvature,
            _UNIFORM_HALF_WIDTH,
            1 / (2 * _UNIFORM_HALF_WIDTH),
            _uniform_sample,
        ),
        NoiseShape(
            "triangular",
            _triangular_cdf,
            _triangular_density,
            _triangular_curvature,
            _TRIANGULAR_HALF_WIDTH,
            1 / _TRIANGULAR_HALF_WIDTH,
            _triangular_sample,
        ),
        NoiseShape(
            "normal",
            torch.special.ndtr,
            _normal_density,
            _normal_curvature,
            math.inf,
            1 / math.sqrt(2 * math.pi),
            _normal_sample,
        ),
        NoiseShape(
            "logistic",
            _logistic_cdf,
            _logistic_density,
            _logistic_curvature,
            math.inf,
            1 / (4 * _LOGISTIC_SCALE),
            _logistic_sample,
        ),
    )
}


def noise_shape(name: str) -> NoiseShape:
    """The noise shape called ``name``.

    Raises:
        ValueError: there is no such shape.

    Example:
        >>> noise_shape("logistic").half_width
        inf
    """
    if name not in NOISES:
        raise ValueError(f"unknown noise {name!r}; choose one of {', '.join(sorted(NOISES))}")
    return NOISES[name]
