"""Confidence intervals of a mean over runs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval.

    Attributes:
        mean: of shares, as accuracies and their differences are, in [-1, 1].
        low: lower end of the interval.
        high: its upper end.

    Example:
        >>> Interval(0.012, 0.003, 0.021).text("+")
        '+1.2 [+0.3, +2.1]'
    """

    mean: float
    low: float
    high: float

    def text(self, sign: str = "") -> str:
        """In points, hundredths, as in tables; the sign is that of a format, such as ``+``."""
        low, high = 100 * self.low, 100 * self.high
        return f"{100 * self.mean:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def interval(values: ArrayLike) -> Interval:
    """Mean of values and its 95 % interval, by :func:`confidence_interval`.

    Raises:
        ValueError: there are no values.

    Example:
        >>> interval([0.5, 0.5])
        Interval(mean=0.5, low=0.5, high=0.5)
    """
    array = np.asarray(values, dtype=np.float64)
    if not array.size:
        raise ValueError("an interval needs at least one value")
    return Interval(float(array.mean()), *confidence_interval(array))


def confidence_interval(values: ArrayLike) -> tuple[float, float]:
    """Student's 95 % interval of a mean.

    Runs are few: of three, a bootstrap by percentiles would cover 76 % in place of 95, of six 85 %.

    Args:
        values: one number a run, shape ``(runs,)``; one run, or equal ones, have an interval of
            length 0.

    Returns:
        its lower and upper end.

    Source:
        Student 1908; :func:`scipy.stats.t.interval`.

    Example:
        >>> [round(end, 2) for end in confidence_interval([0.4, 0.5, 0.6])]
        [0.25, 0.75]
    """
    from scipy.stats import sem, t

    runs = np.asarray(values, dtype=np.float64)
    mean = float(runs.mean())
    if len(runs) < 2 or np.ptp(runs) == 0:
        return mean, mean
    low, high = t.interval(0.95, len(runs) - 1, mean, sem(runs))
    return float(low), float(high)
