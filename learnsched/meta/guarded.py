"""Backpropagation where it can be trusted, evolution strategies where it has exploded."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from learnsched.meta.estimators import Inner, Rollout, ScheduleEstimate
from learnsched.meta.evolution import EvolutionStrategies, check_in_nats
from learnsched.meta.unrolled import Unrolled


@dataclass(frozen=True)
class Guarded:
    """The unrolled gradient, unless the run is chaotic: then that of evolution strategies.

    A run is taken for chaotic if the median norm of its members' unrolled gradients is above a limit,
    or not finite. Under 2-bit activations such norms are mostly below 1; under ternary ones, whose
    backward std has to be small, they are tens, and the members' directions have nothing in common.
    Only those tasks pay for the evolution, which costs two or three times the unroll.

    Args:
        unrolled: the cheap estimate, of every task.
        evolution: the estimate of chaotic tasks.
        limit: largest trusted median norm, positive.

    Raises:
        ValueError: the limit is not positive, or the objective of the evolution is not the loss.

    Example:
        >>> from learnsched.data import load
        >>> from learnsched.meta.rollout import PolicyRollout
        >>> from learnsched.meta.tasks import Task
        >>> from learnsched.policies import LearnedPolicy, MetaNetwork
        >>> task = Task(family="mlp", data="digits", width=4, depth=2, horizon=2, steps=2, batch=16,
        ...             bits="ternary/2-bit", learning_rates=(0.01, 0.02), fine_tuning=False, seed=0)
        >>> inner = task.build(load("digits"))
        >>> rollout = PolicyRollout(LearnedPolicy(MetaNetwork()), inner.run, members=2)
        >>> Guarded(limit=5.0)(inner, rollout).gradient.shape  # epochs, members, layers, fields
        torch.Size([2, 2, 2, 7])
    """

    unrolled: Unrolled = field(default_factory=lambda: Unrolled(damping=0.5))
    evolution: EvolutionStrategies = field(default_factory=lambda: EvolutionStrategies(pairs=8))
    limit: float = 3.0

    def __post_init__(self) -> None:
        if not self.limit > 0:
            raise ValueError(f"the limit must be positive, got {self.limit}")
        check_in_nats(self.evolution)

    def __call__(self, inner: Inner, rollout: Rollout) -> ScheduleEstimate:
        estimate = self.unrolled(inner, rollout)
        norms = estimate.norms.nan_to_num(nan=math.inf).sort().values
        if float(norms[len(norms) // 2]) <= self.limit:  # of two in the middle, the larger
            return estimate
        return self.evolution(inner, rollout)
