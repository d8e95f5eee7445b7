"""Incremental network quantization: which weights are frozen on their level, and when.

A layer's *membership* says for each weight whether it is frozen (1) or free (0). The hard rule
freezes whole weights; the soft rule is smooth in the fraction, so that the fraction can be learned,
and tends to the hard rule as its width goes to 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from learnsched.choices import check_choice
from learnsched.levels import LevelSet

PARTITIONS = ("magnitude", "random", "redraw", "settled")


def check_partition(name: str) -> None:
    """Refuse what names no order in which INQ takes weights.

    Raises:
        ValueError: the partition is unknown.
    """
    check_choice("partition", name, PARTITIONS)


def priority(
    x: Tensor, levels: LevelSet, partition: str, generator: torch.Generator | None = None
) -> Tensor:
    """How early INQ takes each weight; the largest values first.

    Args:
        x: weights in units of their scale, any shape.
        levels: their level set.
        partition: ``magnitude``, largest first (Zhou et al. 2017); ``random``, a random order;
            ``redraw``, a random order drawn anew each time, whose frozen weights are released
            (RPR, Cavigelli and Benini 2020); ``settled``, farthest from the nearest threshold first:
            the weights whose codes have stopped moving.
        generator: random numbers of ``random`` and ``redraw``.

    Returns:
        tensor of ``x``'s shape.

    Raises:
        ValueError: the partition is unknown.

    Example:
        >>> from learnsched import ternary
        >>> x = torch.tensor([0.6, 0.0, 2.0])
        >>> priority(x, ternary(), "settled").argsort(descending=True).tolist()
        [2, 1, 0]
    """
    check_partition(partition)
    if partition == "magnitude":
        return x.abs()
    if partition == "settled":
        distance = torch.full_like(x, math.inf)
        for threshold in levels.thresholds:
            distance = torch.minimum(distance, (x - threshold).abs())
        return distance
    return torch.rand(x.shape, dtype=x.dtype, device=x.device, generator=generator)


def hard_membership(order: Tensor, frozen: Tensor, fraction: float, *, redraw: bool) -> Tensor:
    """Freeze the share ``fraction`` of the weights.

    Args:
        order: priorities, any shape.
        frozen: membership so far (0 or 1), same shape; those weights stay frozen unless ``redraw``.
        fraction: in [0, 1]; the number of frozen weights is rounded to the nearest.
        redraw: release the weights that were frozen before.

    Returns:
        membership of the same shape, 0 or 1.

    Raises:
        ValueError: the fraction is out of range, or below the share that is already frozen.

    Example:
        >>> order = torch.tensor([3.0, 1.0, 2.0, 0.0])
        >>> hard_membership(order, torch.zeros(4), 0.5, redraw=False).tolist()
        [1.0, 0.0, 1.0, 0.0]
    """
    check_fraction(fraction)
    count = round(fraction * order.numel())
    kept = torch.zeros_like(order, dtype=torch.bool) if redraw else frozen > 0
    more = count - int(torch.count_nonzero(kept))
    if more < 0:
        raise ValueError(
            f"the fraction may not decrease: {count - more} of {order.numel()} weights are frozen, "
            f"{fraction} would leave {count}"
        )
    return (kept | _first(order, ~kept, more)).to(order.dtype)


def _first(order: Tensor, free: Tensor, count: int) -> Tensor:
    """The ``count`` free entries of highest priority, the earlier ones of equals; others are False.

    A selection, not a sort, and neither where none or all are wanted: layers are large, epochs many.
    """
    if count == 0:
        return torch.zeros_like(free)
    priorities = order[free].nan_to_num(math.inf, math.inf, -math.inf)
    if count == len(priorities):
        return free
    least = priorities.kthvalue(len(priorities) - count + 1).values
    above = priorities > least
    equal = priorities == least
    chosen = above | (equal & (equal.cumsum(0) <= count - above.sum()))
    return torch.zeros_like(free).masked_scatter(free, chosen)


def soft_membership(order: Tensor, frozen: Tensor, fraction: Tensor, width: float = 0.05) -> Tensor:
    """The membership that is smooth in the fraction, for meta-training.

    The weight at the share r of the order enters along a smooth step while the fraction moves over a
    range of ``width`` around r, so that fraction 0 freezes nothing and fraction 1 everything.

    Args:
        order: priorities, any shape; carries no gradient.
        frozen: membership so far, same shape, in [0, 1]; it never decreases.
        fraction: scalar tensor in [0, 1]; the gradient flows to it.
        width: length of the smooth step, positive; the hard rule is the limit at 0.

    Returns:
        membership of the same shape, in [0, 1].
    """
    count = order.numel()
    # Weights that are in by half or more come first: their membership outweighs every rank.
    ranks = order.detach().flatten().argsort().argsort().to(order.dtype) / count
    key = ranks + 2 * frozen.detach().flatten()
    place = (key.argsort(descending=True).argsort().to(order.dtype) + 0.5) / count
    step = (((1 + width) * fraction - place) / width).clamp(0, 1)
    smooth = step * step * (3 - 2 * step)
    return torch.maximum(frozen, smooth.view_as(order))


def hold(held: Tensor, frozen: Tensor, projected: Tensor, membership: Tensor) -> Tensor:
    """The values that frozen weights keep: old members their old value, new ones their projection.

    Args:
        held: values held so far.
        frozen: membership so far.
        projected: hard quantization of the weights now.
        membership: new membership, at least ``frozen``.

    Returns:
        held values for the new membership. All arguments and the result share one shape.
    """
    newly = membership - frozen
    # where() rather than a weighted mean for whole memberships: it keeps every bit.
    mixed = (frozen * held + newly * projected) / membership.clamp(min=1e-12)
    kept = torch.where(newly > 0, mixed, held)
    return torch.where(frozen > 0, kept, torch.where(newly > 0, projected, held))


def any_per_channel(membership: Tensor, scale: Tensor) -> Tensor:
    """Where any weight that shares an entry of the scale is frozen, even in part.

    Args:
        membership: of the weights, in [0, 1], shape ``(channels, ...)``.
        scale: of a shape that broadcasts to it.

    Returns:
        booleans of the scale's shape.

    Example:
        >>> membership = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
        >>> any_per_channel(membership, torch.ones(2, 1)).flatten().tolist()
        [True, False]
    """
    alike = [d for d in range(membership.dim()) if scale.dim() == 0 or scale.shape[d] == 1]
    frozen = membership.amax(dim=alike, keepdim=True) if alike else membership
    return frozen.reshape(scale.shape) > 0


def check_fraction(fraction: float) -> None:
    """Refuse what is not a share.

    Raises:
        ValueError: the fraction is not a number in [0, 1].
    """
    if not (math.isfinite(fraction) and 0 <= fraction <= 1):
        raise ValueError(f"an INQ fraction must lie in [0, 1], got {fraction}")
