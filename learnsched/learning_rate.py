"""The learning rate that a schedule is made for, as a factor on its maximum."""

from __future__ import annotations

import math

from learnsched.schedule import Policy, RunInfo


def warm_cosine(progress: float, warm_until: float = 0.0) -> float:
    """Linear from 0 to 1, then a cosine to 0.

    Args:
        progress: share of the optimizer steps, in [0, 1].
        warm_until: where the cosine begins, in [0, 1); 0 leaves the warm-up out.

    Source:
        Goyal et al. 2017 (arXiv:1706.02677), section 2.2; Loshchilov and Hutter 2017
        (arXiv:1608.03983), equation 5.

    Example:
        >>> [round(warm_cosine(u, 0.2), 3) for u in (0.0, 0.1, 0.2, 0.6, 1.0)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if progress < warm_until:
        return progress / warm_until
    return 0.5 * (1 + math.cos(math.pi * (progress - warm_until) / (1 - warm_until)))


def learning_rate_factor(policy: Policy, run: RunInfo, progress: float) -> float:
    """A policy's own factor on the learning rate; a cosine where it has none.

    Args:
        policy: asked for ``learning_rate_factor(run, progress)``, if it has that.
        run: the run.
        progress: share of the optimizer steps, in [0, 1].

    Example:
        >>> from learnsched.policies import BaseCurve, StraightThrough
        >>> from learnsched.schedule import LayerInfo
        >>> run = RunInfo((LayerInfo("fc", 10, 3, 4),), horizon=5)
        >>> policies = (StraightThrough(), BaseCurve(warm_until=0.4))
        >>> [round(learning_rate_factor(p, run, 0.1), 3) for p in policies]
        [0.976, 0.25]
    """
    own = getattr(policy, "learning_rate_factor", None)
    return warm_cosine(progress) if own is None else float(own(run, progress))
