"""The geometric path between two std, as hand-coded policies take it."""

from __future__ import annotations


def geometric(start: float, end: float | None, progress: float) -> float:
    """From start to end, by equal factors over equal shares of the run; the start if there is no end.

    :class:`~learnsched.policies.BaseCurve` takes it as ``start * (end / start) ** progress``, whose last
    bit often differs, so that its schedules stay what they were.

    Args:
        start: std in level steps, at least 0; 0 stays 0.
        end: std in level steps, positive.
        progress: of the run, in [0, 1]; both ends are met to the bit.

    Example:
        >>> geometric(4.0, 1.0, 0.5), geometric(4.0, None, 0.5)
        (2.0, 4.0)
    """
    if end is None or progress == 0:
        return start
    return end if progress == 1 else start ** (1 - progress) * end**progress
