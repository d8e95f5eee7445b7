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
from learnsched.torch_state import can_look

Level = float | Tensor

# Narrower noise counts as none: its inverse squared, in the gradients, would overflow to NaN.
NARROWEST = 1e-12
# Infinite numbers are taken for these, far beyond where any density is 0: times that they would be NaN.
_FARTHEST, _FARTHEST_STDS = 1e30, 1e4


def expectation(x: Tensor, levels: LevelSet, std: Level, mean: Level, noise: NoiseShape) -> Tensor:
    """``E[σ(x + mean + std ν)]``; the hard staircase, to the bit, where ``std`` is 0.

    A std of no more than :data:`NARROWEST` counts as 0, here and below.
    """
    shifted = x if _is_zero(mean) else x + mean
    if _everywhere_hard(std):
        return levels.quantize(shifted)
    inverse = _inverse(std)
    first, *thresholds = levels.thresholds
    soft = noise.cdf((shifted - first).mul_(inverse))
    soft.mul_(levels.gaps[0]).add_(levels.values[0])
    for threshold, gap in zip(thresholds, levels.gaps[1:], strict=True):
        soft.add_(noise.cdf((shifted - threshold).mul_(inverse)), alpha=gap)
    soft.clamp_(levels.values[0], levels.values[-1])
    if _everywhere_soft(std):
        return soft
    return torch.where(_soft(std, x), soft, levels.quantize(shifted))


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
    # half precision may not hold the distance to a threshold
    return torch.where(_soft(std, x), result, levels.quantize(x + mean))


def probabilities(
    x: Tensor, levels: LevelSet, std: Level, mean: Level, noise: NoiseShape
) -> list[Tensor]:
    """Probability of each level under the noise, ``K + 1`` tensors of ``x``'s shape."""
    edges = [torch.ones_like(x)]
    for threshold in levels.thresholds:
        distance = x + mean - threshold
        hard = (distance >= 0).to(x.dtype)
        soft = noise.cdf(distance * _inverse(std))
        edges.append(torch.where(_soft(std, x), soft, hard))
    edges.append(torch.zeros_like(x))
    return [a - b for a, b in zip(edges, edges[1:], strict=False)]


def slope(x: Tensor, levels: LevelSet, std: Level, mean: Level, noise: NoiseShape) -> Tensor:
    """Derivative of the expectation in ``x``, and in ``mean``; 0 where ``std`` is 0."""
    inverse = _inverse(std)
    (total,) = _sums(x, levels, inverse, mean, lambda z: (noise.density(z),))
    return total.mul_(inverse)


def std_slope(x: Tensor, levels: LevelSet, std: Level, mean: Level, noise: NoiseShape) -> Tensor:
    """Derivative of the expectation in ``std``; 0 where ``std`` is 0."""
    inverse = _inverse(std)
    (total,) = _sums(x, levels, inverse, mean, lambda z: (noise.density(z).mul_(z),))
    return total.mul_(-inverse)


def slope_derivatives(
    x: Tensor, levels: LevelSet, std: Level, mean: Level, noise: NoiseShape
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`slope`, its derivative in ``x`` (and ``mean``), and its derivative in ``std``."""
    inverse = _inverse(std)

    def terms(z: Tensor) -> tuple[Tensor, ...]:
        density, curvature = noise.derivatives(z)
        return density, curvature, torch.addcmul(density, z, curvature)

    value, in_x, in_std = _sums(x, levels, inverse, mean, terms)
    square = inverse * inverse
    return value.mul_(inverse), in_x.mul_(square), in_std.mul_(-square)


def std_slope_derivatives(
    x: Tensor, levels: LevelSet, std: Level, mean: Level, noise: NoiseShape
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`std_slope`, its derivative in ``x`` (and ``mean``), and its derivative in ``std``."""
    inverse = _inverse(std)

    def terms(z: Tensor) -> tuple[Tensor, ...]:
        density, curvature = noise.derivatives(z)
        in_x = curvature.mul_(z).add_(density)
        return density.mul_(z), in_x, torch.addcmul(density, z, in_x)

    value, in_x, in_std = _sums(x, levels, inverse, mean, terms)
    square = inverse * inverse
    return value.mul_(-inverse), in_x.mul_(-square), in_std.mul_(square)


def spacing(levels: LevelSet) -> tuple[float, bool]:
    """What makes a level set cheap, for the compiled kernels.

    Returns:
        the step between thresholds if all steps and gaps are even, else 0; whether the levels are
        neighbouring integers, and rounding half up finds them.

    Example:
        >>> from learnsched.levels import ternary
        >>> spacing(ternary()), spacing(LevelSet((0.0, 1.0, 4.0)))
        ((1.0, True), (0.0, False))
    """
    thresholds = levels.thresholds
    steps = {b - a for a, b in zip(thresholds, thresholds[1:], strict=False)}
    even = len(steps) == 1 and len(set(levels.gaps)) == 1
    whole = all(
        gap == 1 and threshold == lower + 0.5 and lower == int(lower)
        for gap, threshold, lower in zip(levels.gaps, thresholds, levels.values, strict=False)
    )
    return (steps.pop() if even else 0.0), whole


def _sums(
    x: Tensor,
    levels: LevelSet,
    inverse: Level,
    mean: Level,
    terms: Callable[[Tensor], tuple[Tensor, ...]],
) -> tuple[Tensor, ...]:
    """``Σ Δ_k term((x + mean - t_k) / std)`` of each term; the terms may be overwritten."""
    shifted = (x if _is_zero(mean) else x + mean).clamp(-_FARTHEST, _FARTHEST)
    totals: tuple[Tensor, ...] = ()
    for threshold, gap in zip(levels.thresholds, levels.gaps, strict=True):
        parts = terms(((shifted - threshold) * inverse).clamp(-_FARTHEST_STDS, _FARTHEST_STDS))
        if totals:
            for total, part in zip(totals, parts, strict=True):
                total.add_(part, alpha=gap)
        else:
            totals = parts if gap == 1 else tuple(part.mul_(gap) for part in parts)
    return totals


def _inverse(std: Level) -> Level:
    """``1 / std``, and 0 where ``std`` is 0, which makes every derivative vanish there."""
    if isinstance(std, Tensor):
        return torch.where(std > NARROWEST, 1 / std, 0.0)
    return 1 / std if std > NARROWEST else 0.0


def _soft(std: Level, like: Tensor) -> Tensor:
    return torch.as_tensor(std, device=like.device) > NARROWEST


def _everywhere_hard(std: Level) -> bool:
    if isinstance(std, Tensor):
        return can_look(std) and not bool((std > NARROWEST).any())
    return std <= NARROWEST


def _everywhere_soft(std: Level) -> bool:
    if isinstance(std, Tensor):
        return can_look(std) and bool((std > NARROWEST).all())
    return True


def _is_zero(mean: Level) -> bool:
    """Whether a mean that can be read without a price is 0 throughout, as it is in most methods."""
    if isinstance(mean, Tensor):
        return can_look(mean) and not bool(mean.any())
    return mean == 0
