"""Integer thresholds: the exact search for them, and the line that reproduces them with room to spare.

**Whose decision counts.** In float32, PyTorch's batch norm, addition and division round. What it decides
for an accumulator is therefore not what algebra says, so the thresholds are not computed: they are
*found*, by asking PyTorch's own modules which code they give to which integer. Every step of theirs
rises (or falls) with its input, rounding included, so a binary search finds the least integer of each
code, and agreement holds by construction for every integer between the ends of the search.

**What PyTorch is asked about.** The number an accumulator stands for, ``integer * scale + bias``,
rounded once. A float32 convolution rounds its partial sums as well, in an order that depends on batch
size, threads and machine, so that a sum that lands on a threshold up to rounding may fall on either side
of it from one call to the next. :func:`learnsched.export.align.align_` moves a network's thresholds
between the integers, where no rounding reaches, without changing what any integer decides.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from learnsched.export.graph import Integers, Threshold
from learnsched.export.values import Doubles


def search(
    code: Callable[[Integers], Integers], low: Integers, high: Integers, rows: int, steps: int
) -> Integers:
    """The least integer that takes each code or a higher one.

    Args:
        code: from integers of shape ``(channels, rows, steps)`` to their codes, 0 to ``steps``; it must
            not fall along a channel and row.
        low: least integer of each channel.
        high: greatest integer of each channel.
        rows: independent searches in each channel.
        steps: number of codes less one.

    Returns:
        int64 array of shape ``(channels, rows, steps)``, between ``low`` and ``high + 1``: the first
        means always, the second never.

    Example:
        >>> ends = np.array([-5]), np.array([5])
        >>> search(lambda n: (2 * n >= 3) + (2 * n >= 99), *ends, rows=1, steps=2).tolist()
        [[[2, 6]]]
    """
    shape = (len(low), rows, steps)
    below = np.broadcast_to(low[:, None, None], shape).astype(np.int64)
    above = np.broadcast_to(high[:, None, None] + 1, shape).astype(np.int64)
    wanted = np.arange(1, steps + 1)
    while (below < above).any():
        middle = (below + above) // 2
        reached = code(middle) >= wanted
        searching = below < above
        above = np.where(searching & reached, middle, above)
        below = np.where(searching & ~reached, middle + 1, below)
    return below


def fit_line(thresholds: Integers, low: Integers, high: Integers) -> tuple[Doubles, Doubles]:
    """Distance ``d`` and start ``c`` of equally spaced real thresholds that decide the same.

    ``c + d * k`` lies as far as it can from every integer that it must keep apart: between
    ``thresholds[k] - 1`` and ``thresholds[k]``, ideally in the middle.

    Args:
        thresholds: of one row, shape ``(channels, steps)``.
        low: least integer of each channel.
        high: greatest integer of each channel.

    Returns:
        ``d`` and ``c``, both of shape ``(channels,)``; ``d`` is positive.

    Example:
        >>> d, c = fit_line(np.array([[0, 2, 4]]), np.array([-9]), np.array([9]))
        >>> [round(float(v[0]), 3) for v in (d, c)]
        [2.0, -0.5]
    """
    steps = np.arange(thresholds.shape[1])
    always, never = thresholds <= low[:, None], thresholds > high[:, None]
    least = np.where(always, -np.inf, thresholds - 1.0)
    most = np.where(never, np.inf, thresholds * 1.0)

    def place(d: Doubles) -> tuple[Doubles, Doubles]:
        """The best start at a distance, and how far the thresholds stay from the integers then."""
        shift = d[:, None] * steps
        return _middle((least - shift).max(1), (most - shift).min(1))

    # The room is concave in the distance: narrow the interval that holds its maximum.
    # Distances too small to matter would make factors that are too large to read.
    left = np.full(len(low), 1 / (2 * len(steps)) if len(steps) > 1 else 1.0)
    right = np.maximum(left, high - low + 2.0) if len(steps) > 1 else left
    for _ in range(80):
        a, b = left + (right - left) / 3, right - (right - left) / 3
        better = place(a)[1] < place(b)[1]
        left, right = np.where(better, a, left), np.where(better, right, b)
    d = (left + right) / 2
    return d, place(d)[0]


def affine(node: Threshold) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    """Factors and offset with which rounding to the nearest integer gives a threshold's codes.

    ``round(Σ_i factor_i * x_i + offset)``, clipped to the codes, where each float32 operation rounds.
    No sum of integers comes near a half, so that neither the rule for halves nor the rounding of
    the sum matters.

    Returns:
        factors of shape ``(inputs, channels)`` and offset of shape ``(channels,)``; None where no such
        numbers are found, as after a bent activation.
    """
    if len(node.inputs) == 1:
        d, c = fit_line(node.thresholds[:, 0], node.low, node.high)
        factors = (node.sign / d)[None]
        offset = 0.5 - c / d
        edge = node.thresholds[:, 0]
        constant = ((edge <= node.low[:, None]) | (edge > node.high[:, None])).all(1)
        factors[0, constant] = 0
        offset[constant] = (edge <= node.low[:, None]).sum(1)[constant]
    else:
        if node.slopes is None:
            return None
        factors, offset = node.slopes, centre(node, node.slopes)[0]
    result = factors.astype(np.float32), offset.astype(np.float32)
    return result if _agrees(node, *result) else None


def centre(node: Threshold, slopes: Doubles) -> tuple[Doubles, Doubles]:
    """The offset of a line of given slopes that keeps its sums farthest from the halves.

    Args:
        node: the thresholds.
        slopes: in codes for each input, shape ``(inputs, channels)``; signed.

    Returns:
        the offset, with which ``round(Σ_i slope_i * x_i + offset)`` is the code, and how far it keeps
        the sums from the halves, in codes; both of shape ``(channels,)``.
    """
    rows = node.row_low + np.arange(node.thresholds.shape[1])
    halves = np.arange(node.thresholds.shape[2]) + 0.5
    slope = np.abs(slopes[0])[:, None, None]
    other = slopes[1][:, None, None] * rows[:, None] if len(slopes) > 1 else 0.0
    edge = node.thresholds
    always = edge <= node.low[:, None, None]
    never = edge > node.high[:, None, None]
    bottom = np.where(never, -np.inf, halves - slope * edge - other).max((1, 2))
    top = np.where(always, np.inf, halves - slope * (edge - 1) - other).min((1, 2))
    return _middle(bottom, top)


def _middle(bottom: Doubles, top: Doubles) -> tuple[Doubles, Doubles]:
    """The middle of an interval and its distance from the ends; a half from the only end there is."""
    ends = np.stack([bottom, top])
    ends = np.where(np.isfinite(ends), ends, ends[::-1] + np.array([[-1.0], [1.0]]))
    ends = np.where(np.isfinite(ends), ends, [[-0.5], [0.5]])
    return ends.mean(0), (ends[1] - ends[0]) / 2


def _agrees(node: Threshold, factors: NDArray[np.float32], offset: NDArray[np.float32]) -> bool:
    """Whether float32 arithmetic gives the right code on both sides of every threshold, with room.

    The sum rises with the signed first input, so that the two sides of a threshold speak for all others.
    The room is more than the two or three operations can round by, in any order, fused or not.
    """
    rows = (node.row_low + np.arange(node.thresholds.shape[1])).astype(np.float32)[:, None]
    steps = node.thresholds.shape[2]
    edges = np.concatenate([node.thresholds - 1, node.thresholds], axis=2)
    edges = np.clip(edges, node.low[:, None, None], node.high[:, None, None])
    expected = (edges[..., None] >= node.thresholds[:, :, None, :]).sum(3)
    factor, shift = np.abs(factors[0]), offset[:, None, None]
    total = edges.astype(np.float32) * factor[:, None, None]
    reach = factor * np.maximum(np.abs(node.low), np.abs(node.high)) + np.abs(offset)
    if len(node.inputs) == 2:
        other = rows * factors[1][:, None, None]
        total = total + other
        reach = reach + np.abs(other).max((1, 2))
    total = total + shift
    room = np.abs(total - np.clip(np.floor(total) + 0.5, 0.5, steps - 0.5))
    right = np.clip(np.round(total), 0, steps) == expected
    return bool((right & (room > 4 * reach[:, None, None] * 2.0**-24)).all())
