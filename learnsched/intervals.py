"""Confidence intervals of a mean over runs."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def bootstrap_interval(values: ArrayLike) -> tuple[float, float]:
    """The percentile bootstrap's 95 % interval of the mean, reproducible.

    Args:
        values: one number a run, shape ``(runs,)``; one run, or equal ones, have an interval of
            length 0.

    Returns:
        its lower and upper end.

    Source:
        Efron and Tibshirani 1993, chapter 13; :func:`scipy.stats.bootstrap`.

    Example:
        >>> low, high = bootstrap_interval([0.4, 0.5, 0.6])
        >>> 0.4 <= low < 0.5 < high <= 0.6
        True
    """
    from scipy.stats import bootstrap

    runs = np.asarray(values, dtype=np.float64)
    if len(runs) < 2 or np.ptp(runs) == 0:
        return float(runs.mean()), float(runs.mean())
    rng = np.random.default_rng(0)
    interval = bootstrap((runs,), np.mean, method="percentile", rng=rng).confidence_interval
    return float(interval.low), float(interval.high)
