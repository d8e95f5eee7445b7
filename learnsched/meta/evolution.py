"""Evolution strategies in schedule space: a gradient from outer losses alone.

Every member of a task trains under many perturbed copies of its own schedule, all as one population.
The perturbations live on a few knots per output and layer, so that hundreds of runs, not hundreds of
thousands, give a gradient; they come in antithetic pairs that share weights, data and random numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from learnsched.meta.estimators import (
    Inner,
    Rollout,
    ScheduleEstimate,
    perturbation_generator,
    run_forward,
    table_rollout,
)
from learnsched.schedule import FIELDS

# What a policy learns: means are not perturbed.
LEARNED_FIELDS = tuple(i for i, name in enumerate(FIELDS) if not name.endswith("mean"))
_RELATIVE = tuple(i for i, name in enumerate(FIELDS) if name.endswith("backward_std"))
_FRACTION = FIELDS.index("fraction")


@dataclass(frozen=True)
class EvolutionStrategies:
    """Antithetic evolution strategies on knots of the schedule, a regression estimate.

    Coordinates are the values at ``knots`` equally spaced progresses of a piecewise linear change of
    each output of each layer (of all layers at once if ``by_layer`` is False): an absolute change of
    forward std and fraction where they are inside their range, a relative one of backward std. The
    loss differences of the pairs are regressed on the perturbations; the gradient of smallest norm
    with these directional derivatives is returned. It is the gradient of the loss *smoothed* by the
    perturbations: a chaotic run, whose derivative means nothing, still has one.

    Args:
        pairs: antithetic pairs of each member.
        std: standard deviation of the absolute perturbations.
        relative_std: the same of the relative ones.
        knots: values over the run.
        by_layer: whether layers are perturbed independently.
        seed: of the perturbations, together with the inner loop's own.
        ridge: share of the mean square of the perturbations added to the regression's diagonal.

    Raises:
        ValueError: an argument is out of range.

    Source:
        Salimans et al. 2017 (arXiv:1703.03864), Metz et al. 2019 (arXiv:1810.10180).

    Example:
        >>> from learnsched.data import load
        >>> from learnsched.meta.estimators import policy_rollout
        >>> from learnsched.meta.tasks import Task
        >>> from learnsched.policies import LearnedPolicy, MetaNetwork
        >>> task = Task("mlp", "digits", width=4, depth=2, horizon=2, steps=2, batch=16,
        ...             bits="ternary/2-bit", learning_rates=(0.01, 0.02), fine_tuning=False, seed=0)
        >>> inner = task.build(load("digits"))
        >>> rollout = policy_rollout(LearnedPolicy(MetaNetwork()), inner.run, members=2)
        >>> estimate = EvolutionStrategies(pairs=2)(inner, rollout)
        >>> estimate.gradient.shape  # epochs, members, layers, fields
        torch.Size([2, 2, 2, 7])
    """

    pairs: int = 16
    std: float = 0.1
    relative_std: float = 0.3
    knots: int = 3
    by_layer: bool = True
    seed: int = 0
    ridge: float = 1.0

    def __post_init__(self) -> None:
        if self.pairs < 1 or self.knots < 1:
            raise ValueError(f"pairs and knots must be at least 1, got {self.pairs}, {self.knots}")
        positive = all(0 < std < math.inf for std in (self.std, self.relative_std))
        if not (positive and 0 <= self.ridge < math.inf):
            raise ValueError(f"both std must be positive and ridge at least 0, got {self}")

    def __call__(self, inner: Inner, rollout: Rollout) -> ScheduleEstimate:
        with torch.enable_grad():
            _, table, _ = run_forward(inner, rollout)
        centre = table.detach()
        basis = tangent_basis(
            centre,
            self.knots,
            by_layer=self.by_layer,
            absolute=self.std,
            relative=self.relative_std,
        )
        generator = perturbation_generator(self.seed, inner.seed)
        members, count = basis.shape[:2]
        noise = torch.randn(self.pairs, members, count, generator=generator).to(centre)
        change = torch.einsum("mcthf,pmc->pmthf", basis, noise)
        losses = [self._losses(inner, centre, sign * change) for sign in (1.0, -1.0)]
        difference = (losses[0] - losses[1]) / 2
        ours = regression(noise, difference, self.ridge)
        return ScheduleEstimate(
            table,
            lift(basis, ours).permute(1, 0, 2, 3),
            (losses[0] + losses[1]).mean(0) / 2,
        )

    def _losses(self, inner: Inner, centre: Tensor, change: Tensor) -> Tensor:
        """Outer losses of the changed schedules, shape ``(pairs, members)``."""
        pairs, members = change.shape[:2]
        tables = centre.transpose(0, 1) + change
        tables = valid(tables).flatten(0, 1).transpose(0, 1)
        many = inner.repeated(pairs)
        with torch.no_grad():
            states, table, _ = run_forward(many, table_rollout(tables))
            return many.outer_loss(states[-1], table[-1]).view(pairs, members)


def tangent_basis(
    table: Tensor,
    knots: int,
    *,
    by_layer: bool,
    absolute: float = 0.1,
    relative: float = 0.3,
) -> Tensor:
    """The schedule-space directions of the coordinates, at a given schedule.

    Args:
        table: settings, shape ``(horizon, members, layers, len(FIELDS))``.
        knots: values over the run; one moves the whole run alike.
        by_layer: a coordinate of its own for each layer.
        absolute: size of the directions of forward std and fraction.
        relative: size of those of backward std, as a share of it.

    Returns:
        shape ``(members, coordinates, horizon, layers, len(FIELDS))``.
    """
    horizon, _, layers, fields = table.shape
    hats = _hats(horizon, knots).to(table)
    groups = torch.eye(layers).to(table) if by_layer else torch.ones(1, layers).to(table)
    outputs = torch.eye(fields)[list(LEARNED_FIELDS)].to(table)
    plain = torch.einsum("kt,gl,of->ogktlf", hats, groups, outputs).flatten(0, 2)
    size = torch.ones_like(table)
    size[..., list(_RELATIVE)] = relative * table[..., list(_RELATIVE)]
    # At the ends of a range derivatives are one-sided, and nothing moves the terminal conditions.
    others = [i for i in LEARNED_FIELDS if i not in _RELATIVE]
    inside = table > 0
    inside[..., _FRACTION] &= table[..., _FRACTION] < 1
    if horizon > 1:
        inside[-1] = False
    size[..., others] = absolute * inside[..., others].to(table)
    return plain.unsqueeze(0) * size.transpose(0, 1).unsqueeze(1)


def lift(basis: Tensor, coordinates: Tensor) -> Tensor:
    """The smallest gradient whose derivatives along the basis are the given ones.

    Args:
        basis: shape ``(members, coordinates, ...)``.
        coordinates: derivatives, shape ``(members, coordinates)``.

    Returns:
        shape ``(members, ...)``.
    """
    flat = basis.flatten(2)
    gram = flat @ flat.transpose(1, 2)
    # Coordinates that move nothing make it singular; LAPACK's least squares is not reproducible.
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal += 1e-6 * diagonal.amax(dim=1, keepdim=True)
    weights = torch.linalg.solve(gram, coordinates.unsqueeze(-1))
    return (flat.transpose(1, 2) @ weights).squeeze(-1).view(basis[:, 0].shape)


def project(basis: Tensor, gradient: Tensor) -> Tensor:
    """Derivatives of a schedule-space gradient along the basis, the reverse of :func:`lift`.

    Args:
        basis: shape ``(members, coordinates, horizon, layers, fields)``.
        gradient: shape ``(horizon, members, layers, fields)``.
    """
    return torch.einsum("mcthf,tmhf->mc", basis, gradient)


def valid(tables: Tensor) -> Tensor:
    """Perturbed schedules, shape ``(..., horizon, layers, fields)``, put back into their ranges."""
    result = tables.clamp(min=0)
    fraction = result[..., _FRACTION].clamp(max=1).cummax(dim=-2).values
    return torch.cat(
        [result[..., :_FRACTION], fraction.unsqueeze(-1), result[..., _FRACTION + 1 :]], dim=-1
    )


def regression(noise: Tensor, difference: Tensor, ridge: float) -> Tensor:
    """Slopes of loss differences on perturbations, for each member.

    Args:
        noise: shape ``(pairs, members, coordinates)``.
        difference: shape ``(pairs, members)``.
        ridge: share of the mean square added to the diagonal.

    Returns:
        shape ``(members, coordinates)``.
    """
    design = noise.transpose(0, 1)
    pairs, count = design.shape[1:]
    gram = design.transpose(1, 2) @ design
    penalty = ridge * pairs * torch.eye(count).to(gram)
    right = design.transpose(1, 2) @ difference.T.unsqueeze(-1)
    return torch.linalg.solve(gram + penalty, right).squeeze(-1)


def _hats(horizon: int, knots: int) -> Tensor:
    """Piecewise linear functions of progress that are 1 at their own knot, ``(knots, horizon)``."""
    if knots == 1 or horizon == 1:
        return torch.ones(1, horizon)
    position = torch.linspace(0, knots - 1, horizon)
    return (1 - (position - torch.arange(knots).unsqueeze(1)).abs()).clamp(min=0)
