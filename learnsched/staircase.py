"""The expectation of a staircase under noise, and its derivatives, as plain numbers.

Everything here is elementwise on ``x`` in units of the levels; ``std`` and ``mean`` are numbers or
tensors that broadcast to ``x``. Nothing here knows of autograd: :mod:`learnsched.annealed` ties the
pieces together.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from learnsched.levels import LevelSet
from learnsched.noise import NoiseShape

Level = float | Tensor


def expectation(x: Tensor, levels: LevelSet, std: Level, mean: Level, noise: NoiseShape) -> Tensor:
    """``E[σ(x + mean + std ν)]``; the hard staircase, to the bit, where ``std`` is 0."""
    shifted = x + mean
    if _everywhere_hard(std):
        return levels.quantize(shifted)
    inverse = _inverse(std)
    soft = torch.full_like(shifted, levels.values[0])
    for threshold, gap in zip(levels.thresholds, levels.gaps, strict=True):
        soft.add_(noise.cdf((shifted - threshold) * inverse), alpha=gap)
    soft.clamp_(levels.values[0], levels.values[-1])
    if _everywhere_soft(std):
        return soft
    return torch.where(torch.as_tensor(std) > 0, soft, levels.quantize(shifted))


def most_probable(
    x: Tensor, levels: LevelSet, std: Level, mean: Level, noise: NoiseShape
) -> Tensor:
    """The level of largest probability; ties take the upper one, as the hard staircase does."""
    edges = probabilities(x, levels, std, mean, noise)
    best, result = edges[0], torch.full_like(x, levels.values[0])
    for probability, value in zip(edges[1:], levels.values[1:], strict=True):
        takes = probability >= best
        best = torch.where(takes, probability, best)
        result = torch.where(takes, torch.full_like(x, value), result)
    return result


def probabilities(
    x: Tensor, levels: LevelSet, std: Level, mean: Level, noise: NoiseShape
) -> list[Tensor]:
    """Probability of each level under the noise, ``K + 1`` tensors of ``x``'s shape."""
    edges = [torch.ones_like(x)]
    for threshold in levels.thresholds:
        distance = x + mean - threshold
        hard = (distance >= 0).to(x.dtype)
        soft = noise.cdf(distance * _inverse(std))
        edges.append(torch.where(torch.as_tensor(std) > 0, soft, hard))
    edges.append(torch.zeros_like(x))
    return [a - b for a, b in zip(edges, edges[1:], strict=False)]


def slope(x: Tensor, levels: LevelSet, std: Level, mean: Level, noise: NoiseShape) -> Tensor:
    """Derivative of the expectation in ``x``, and in ``mean``; 0 where ``std`` is 0."""
    inverse = _inverse(std)
    return _sum(x, levels, inverse, mean, noise.density) * inverse


def std_slope(x: Tensor, levels: LevelSet, std: Level, mean: Level, noise: NoiseShape) -> Tensor:
    """Derivative of the expectation in ``std``; 0 where ``std`` is 0."""
    inverse = _inverse(std)
    return _sum(x, levels, inverse, mean, lambda z: -z * noise.density(z)) * inverse


def slope_in_x(x: Tensor, levels: LevelSet, std: Level, mean: Level, noise: NoiseShape) -> Tensor:
    """Derivative of :func:`slope` in ``x``, and in ``mean``."""
    inverse = _inverse(std)
    return _sum(x, levels, inverse, mean, noise.curvature) * inverse * inverse


def slope_in_std(x: Tensor, levels: LevelSet, std: Level, mean: Level, noise: NoiseShape) -> Tensor:
    """Derivative of :func:`slope` in ``std``, and of :func:`std_slope` in ``x`` and ``mean``."""
    inverse = _inverse(std)

    def term(z: Tensor) -> Tensor:
        return -(noise.density(z) + z * noise.curvature(z))

    return _sum(x, levels, inverse, mean, term) * inverse * inverse


def std_slope_in_std(
    x: Tensor, levels: LevelSet, std: Level, mean: Level, noise: NoiseShape
) -> Tensor:
    """Derivative of :func:`std_slope` in ``std``."""
    inverse = _inverse(std)

    def term(z: Tensor) -> Tensor:
        return z * (2 * noise.density(z) + z * noise.curvature(z))

    return _sum(x, levels, inverse, mean, term) * inverse * inverse


def _sum(
    x: Tensor, levels: LevelSet, inverse: Level, mean: Level, term: Callable[[Tensor], Tensor]
) -> Tensor:
    """``Σ Δ_k term((x + mean - t_k) / std)``."""
    shifted = x + mean
    total = torch.zeros_like(shifted)
    for threshold, gap in zip(levels.thresholds, levels.gaps, strict=True):
        total.add_(term((shifted - threshold) * inverse), alpha=gap)
    return total


def _inverse(std: Level) -> Level:
    """``1 / std``, and 0 where ``std`` is 0, which makes every derivative vanish there."""
    if isinstance(std, Tensor):
        return torch.where(std > 0, 1 / std, 0.0)
    return 1 / std if std > 0 else 0.0


def _everywhere_hard(std: Level) -> bool:
    if isinstance(std, Tensor):
        return _can_look(std) and not bool((std > 0).any())
    return std == 0


def _everywhere_soft(std: Level) -> bool:
    if isinstance(std, Tensor):
        return _can_look(std) and bool((std > 0).all())
    return True


def _can_look(std: Tensor) -> bool:
    """Whether values can be read without waiting for a device or breaking a compiled graph."""
    return std.device.type == "cpu" and not torch.compiler.is_compiling()
