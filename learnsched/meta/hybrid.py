"""Backpropagation and evolution strategies combined, each where it is the better one."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from learnsched.meta.estimators import Inner, Rollout, ScheduleEstimate, clipped
from learnsched.meta.evolution import (
    LEARNED_FIELDS,
    EvolutionStrategies,
    check_in_nats,
    project,
    tangent_basis,
)
from learnsched.meta.unrolled import Unrolled


@dataclass(frozen=True)
class Hybrid:
    """Weighs two gradients by the inverse of their mean square error, for each output of the policy.

    The unrolled gradient is precise, and may be far off: the surrogate derivatives of hard quantizers
    and damping bias it. That of evolution strategies is noisy, and true to the hard loss up to its
    smoothing. The variances are seen in the spread over members; the bias is what of the distance
    between the two means they do not explain. Members that have an estimate which is not finite, as in a
    run that diverged, count in neither statistic; where it is the unrolled one, evolution has the word.

    Args:
        unrolled: the precise one; its members are clipped to their median norm.
        evolution: the unbiased one; coordinates are compared on its knots.

    Raises:
        ValueError: the objective of the evolution is not the loss; when called, the task has one member
            only, which has no spread.

    Source:
        Metz et al. 2019 (arXiv:1810.10180), section 3.2, without a bias.

    Example:
        >>> from learnsched.data import load
        >>> from learnsched.meta.rollout import PolicyRollout
        >>> from learnsched.meta.tasks import Task
        >>> from learnsched.policies import LearnedPolicy, MetaNetwork
        >>> task = Task(family="mlp", data="digits", width=4, depth=2, horizon=2, steps=2, batch=16,
        ...             bits="ternary/2-bit", learning_rates=(0.01, 0.02), fine_tuning=False, seed=0)
        >>> inner = task.build(load("digits"))
        >>> rollout = PolicyRollout(LearnedPolicy(MetaNetwork()), inner.run, members=2)
        >>> estimate = Hybrid(evolution=EvolutionStrategies(pairs=2))(inner, rollout)
        >>> estimate.gradient.shape  # epochs, members, layers, fields
        torch.Size([2, 2, 2, 7])
    """

    unrolled: Unrolled = field(default_factory=lambda: Unrolled(damping=0.5))
    evolution: EvolutionStrategies = field(default_factory=lambda: EvolutionStrategies(pairs=8))

    def __post_init__(self) -> None:
        check_in_nats(self.evolution)

    def __call__(self, inner: Inner, rollout: Rollout) -> ScheduleEstimate:
        if len(inner.initial().tensors[0]) < 2:
            raise ValueError("a hybrid needs tasks of two members or more, to see their spread")
        ours = self.unrolled(inner, rollout)
        theirs = self.evolution(inner, rollout)
        finite = _finite(ours)
        typical = ours.norms[finite].median() if bool(finite.any()) else ours.norms.new_ones(())
        usable = finite & _finite(theirs)
        precise = clipped(ours.gradient, typical)
        basis = tangent_basis(
            ours.settings.detach(), self.evolution.knots, by_layer=self.evolution.by_layer
        )
        share = ours.gradient.new_zeros(ours.gradient.shape[-1])
        share[list(LEARNED_FIELDS)] = share_of_precise(
            _by_field(project(basis, precise)[usable]),
            _by_field(project(basis, theirs.gradient)[usable]),
        )
        shares = torch.where(finite.view(1, -1, 1, 1), share, 0.0)
        return ScheduleEstimate(
            ours.settings, torch.lerp(theirs.gradient, precise, shares), theirs.loss
        )


def _finite(estimate: ScheduleEstimate) -> Tensor:
    """Whether each member's estimate is finite."""
    return estimate.norms.isfinite() & estimate.loss.isfinite()


def _by_field(coordinates: Tensor) -> Tensor:
    return coordinates.unflatten(1, (len(LEARNED_FIELDS), -1))


def share_of_precise(precise: Tensor, unbiased: Tensor) -> Tensor:
    """Weight of the first estimate in each group, in [0, 1].

    Args:
        precise: one estimate a member, shape ``(members, groups, coordinates)``; may be biased.
        unbiased: the same of an estimator without a bias.

    Returns:
        shape ``(groups,)``; 0 if there are fewer than two members, which show no spread.
    """
    members = len(precise)
    if members < 2:
        return precise.new_zeros(precise.shape[1])
    noise = [estimate.var(dim=0).sum(-1) / members for estimate in (precise, unbiased)]
    distance = (precise.mean(0) - unbiased.mean(0)).square().sum(-1)
    bias = (distance - noise[0] - noise[1]).clamp(min=0)
    error = noise[0] + bias
    return noise[1] / (error + noise[1]).clamp(min=1e-30)
