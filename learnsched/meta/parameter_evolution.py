"""Evolution strategies in the space of a policy's parameters.

Nothing is chained: whole networks are perturbed, and what telemetry does to a run is part of the
gradient. The price is the variance of thousands of coordinates in place of dozens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from learnsched.choices import whole_number
from learnsched.meta.estimators import (
    Inner,
    ParametricRollout,
    Rollout,
    clip_factors,
    perturbation_generator,
)
from learnsched.meta.rollout import run_forward


@dataclass(frozen=True, eq=False)
class ParameterEstimate:
    """Gradients in parameter space.

    Attributes:
        gradient: of each member's outer loss, shape ``(members, parameters)``.
        loss: outer loss of each member, shape ``(members,)``.
    """

    gradient: Tensor
    loss: Tensor

    @property
    def norms(self) -> Tensor:
        """Norm of each member's gradient, shape ``(members,)``."""
        return self.gradient.norm(dim=1)

    def clipped(self, limit: float | Tensor) -> ParameterEstimate:
        """Each member's gradient scaled down to the limit's norm; 0 where something is not finite."""
        finite = self.norms.isfinite() & self.loss.isfinite()
        usable = torch.where(finite.unsqueeze(1), self.gradient, 0.0)
        return replace(self, gradient=usable * clip_factors(self.norms, limit).unsqueeze(1))

    def parameter_gradient(self, parameters: Sequence[Tensor]) -> Tensor:
        """The mean over members, shape ``(parameters,)``.

        Raises:
            ValueError: the parameters are not as many as were perturbed.
        """
        size = sum(p.numel() for p in parameters)
        if size != self.gradient.shape[1]:
            raise ValueError(f"{self.gradient.shape[1]} parameters were perturbed, got {size}")
        return self.gradient.mean(0)


@dataclass(frozen=True)
class ParameterEvolution:
    """Antithetic evolution strategies on the parameters of the policy's network.

    A pair is two networks, of the parameters plus and minus one perturbation; both schedule all
    members, with the same weights, data and random numbers. With differences d_p of a member's losses
    and perturbations ε_p of standard deviation σ, its gradient is the mean of ``d_p ε_p / (2σ²)``.

    Args:
        pairs: antithetic pairs.
        std: standard deviation σ of the perturbation of each parameter.
        seed: of the perturbations, together with the inner loop's own.

    Raises:
        ValueError: an argument is out of range.

    Source:
        Salimans et al. 2017 (arXiv:1703.03864), section 2.

    Example:
        >>> from learnsched.data import load
        >>> from learnsched.meta.rollout import PolicyRollout
        >>> from learnsched.meta.tasks import Task
        >>> from learnsched.policies import LearnedPolicy, MetaNetwork
        >>> task = Task(family="mlp", data="digits", width=4, depth=2, horizon=2, steps=2, batch=16,
        ...             bits="ternary/2-bit", learning_rates=(0.01, 0.02), fine_tuning=False, seed=0)
        >>> inner, policy = task.build(load("digits")), LearnedPolicy(MetaNetwork(2, 2))
        >>> estimate = ParameterEvolution(pairs=2)(inner, PolicyRollout(policy, inner.run, members=2))
        >>> estimate.parameter_gradient(list(policy.network.parameters())).shape
        torch.Size([125])
    """

    pairs: int = 32
    std: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        whole_number("pairs", self.pairs)
        if not 0 < self.std < math.inf:
            raise ValueError(f"std must be positive and finite, got {self.std}")

    def __call__(self, inner: Inner, rollout: ParametricRollout) -> ParameterEstimate:
        noise = perturbations(self.pairs, rollout.parameters, self.seed, inner.seed)
        plus, minus = (
            self._losses(inner, rollout.changed(sign * self.std * noise)) for sign in (1.0, -1.0)
        )
        difference = (plus - minus) / (2 * self.std)
        gradient = torch.einsum("pm,pn->mn", difference, noise) / self.pairs
        return ParameterEstimate(gradient, (plus + minus).mean(0) / 2)

    @torch.no_grad()
    def _losses(self, inner: Inner, rollout: Rollout) -> Tensor:
        """Outer losses under the changed networks, shape ``(pairs, members)``."""
        many = inner.repeated(self.pairs)
        state, table, _ = run_forward(many, rollout)
        return many.outer_loss(state, table[-1]).view(self.pairs, -1)


def perturbations(pairs: int, like: Tensor, seed: int, inner_seed: int) -> Tensor:
    """Standard normal, shape ``(pairs, parameters)``; the same for the same seeds."""
    generator = perturbation_generator(seed, inner_seed)
    return torch.randn(pairs, like.numel(), generator=generator).to(like)
