"""Evolution strategies in schedule space: a gradient from outer losses alone.

Every member of a task trains under its own schedule and many perturbed copies of it, all as one
population. The perturbations live on a few knots per output and layer, so that hundreds of runs, not
hundreds of thousands, give a gradient; they come in antithetic pairs that share weights and data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from learnsched.choices import check_choice, whole_number
from learnsched.meta.estimators import Inner, Rollout, ScheduleEstimate, perturbation_generator
from learnsched.meta.rollout import run_forward, terminal_settings
from learnsched.schedule import BACKWARD_STDS, FIELDS, FRACTION, Telemetry

# What a policy learns: means are not perturbed.
LEARNED_FIELDS = tuple(i for i, name in enumerate(FIELDS) if not name.endswith("mean"))


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
        objective: ``loss``, the outer loss, or ``error``, the share of held-out data that the hard
            network gets wrong, which only this estimator can follow; a few networks that are sure of
            their mistakes weigh much in the loss.

    Raises:
        ValueError: an argument is out of range.

    Source:
        Salimans et al. 2017 (arXiv:1703.03864), Metz et al. 2019 (arXiv:1810.10180).

    Example:
        >>> from learnsched.data import load
        >>> from learnsched.meta.rollout import PolicyRollout
        >>> from learnsched.meta.tasks import Task
        >>> from learnsched.policies import LearnedPolicy, MetaNetwork
        >>> task = Task(family="mlp", data="digits", width=4, depth=2, horizon=2, steps=2, batch=16,
        ...             bits="ternary/2-bit", learning_rates=(0.01, 0.02), fine_tuning=False, seed=0)
        >>> inner = task.build(load("digits"))
        >>> rollout = PolicyRollout(LearnedPolicy(MetaNetwork()), inner.run, members=2)
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
    objective: str = "loss"

    def __post_init__(self) -> None:
        for name in ("pairs", "knots"):
            whole_number(name, getattr(self, name))
        positive = all(0 < std < math.inf for std in (self.std, self.relative_std))
        if not (positive and 0 <= self.ridge < math.inf):
            raise ValueError(f"both std must be positive and ridge at least 0, got {self}")
        check_choice("objective", self.objective, ("loss", "error"))

    def __call__(self, inner: Inner, rollout: Rollout) -> ScheduleEstimate:
        many = inner.repeated(1 + 2 * self.pairs)
        perturbed = _Perturbed(self, inner, rollout)
        with torch.no_grad():
            state, table, _ = run_forward(many, perturbed)
            evaluate = many.outer_loss if self.objective == "loss" else many.outer_error
            losses = evaluate(state, table[-1]).view(1 + 2 * self.pairs, -1)
        plus, minus = losses[1:].chunk(2)
        ours = regression(perturbed.noise, (plus - minus) / 2, self.ridge)
        settings = torch.stack(perturbed.rows)
        basis = tangent_basis(
            settings.detach(),
            self.knots,
            by_layer=self.by_layer,
            absolute=self.std,
            relative=self.relative_std,
        )
        return ScheduleEstimate(settings, lift(basis, ours).permute(1, 0, 2, 3), losses[0])


def check_in_nats(evolution: EvolutionStrategies) -> None:
    """Refuse, beside gradients of the loss, a strategy whose gradients are in shares of errors.

    Raises:
        ValueError: its objective is not the loss.
    """
    if evolution.objective != "loss":
        raise ValueError(
            f"beside gradients of the loss, in nats, evolution must have objective 'loss', got "
            f"{evolution.objective!r}; EvolutionStrategies alone can follow the error"
        )


class _Perturbed:
    """The settings of a rollout and, after them, those of every pair: all runs go side by side.

    Attributes:
        rows: the rollout's settings of each epoch so far, attached to its graph.
        noise: the perturbations, shape ``(pairs, members, coordinates)``.
    """

    def __init__(self, evolution: EvolutionStrategies, inner: Inner, rollout: Rollout) -> None:
        self._evolution, self._inner, self._rollout = evolution, inner, rollout
        self.rows: list[Tensor] = []
        self.noise = torch.empty(0)
        self._directions = torch.empty(0)
        self._fraction: Tensor | None = None

    def __call__(self, epoch: int, telemetry: Telemetry) -> Tensor:
        evolution, run = self._evolution, self._inner.run
        first = telemetry[: len(telemetry.loss) // (1 + 2 * evolution.pairs)]
        with torch.enable_grad():
            settings = terminal_settings(self._rollout(epoch, first), run, epoch)
        self.rows.append(settings)
        centre = settings.detach()
        if epoch == 0:
            self._begin(centre)
        size = _size(centre, 0 < epoch == run.horizon - 1, evolution.std, evolution.relative_std)
        change = torch.einsum("chf,pmc->pmhf", self._directions[:, epoch], self.noise) * size
        both = valid(torch.cat([centre + change, centre - change]), self._fraction)
        self._fraction = both[..., FRACTION]
        return torch.cat([centre.unsqueeze(0), both]).flatten(0, 1)

    def _begin(self, centre: Tensor) -> None:
        """Draw the perturbations."""
        evolution, (members, layers, fields) = self._evolution, centre.shape
        self._directions = _directions(
            self._inner.run.horizon, layers, fields, evolution.knots, by_layer=evolution.by_layer
        ).to(centre)
        shape = (evolution.pairs, members, len(self._directions))
        generator = perturbation_generator(evolution.seed, self._inner.seed)
        self.noise = torch.randn(shape, generator=generator).to(centre)


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
    directions = _directions(horizon, layers, fields, knots, by_layer=by_layer).to(table)
    sizes = [
        _size(row, 0 < epoch == horizon - 1, absolute, relative) for epoch, row in enumerate(table)
    ]
    return directions.unsqueeze(0) * torch.stack(sizes, dim=1).unsqueeze(1)


def _directions(horizon: int, layers: int, fields: int, knots: int, *, by_layer: bool) -> Tensor:
    """Where each coordinate acts, shape ``(coordinates, horizon, layers, fields)``."""
    groups = torch.eye(layers) if by_layer else torch.ones(1, layers)
    outputs = torch.eye(fields)[list(LEARNED_FIELDS)]
    return torch.einsum("kt,gl,of->ogktlf", hats(horizon, knots), groups, outputs).flatten(0, 2)


def _size(settings: Tensor, terminal: bool, absolute: float, relative: float) -> Tensor:
    """How far a coordinate of 1 moves each setting, shape ``(members, layers, fields)``.

    At the ends of a range derivatives are one-sided, and nothing moves the terminal conditions.
    """
    inside = (settings > 0) & (not terminal)
    inside[..., FRACTION] &= settings[..., FRACTION] < 1
    size = absolute * inside.to(settings)
    size[..., list(BACKWARD_STDS)] = relative * settings[..., list(BACKWARD_STDS)]
    return size


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


def valid(settings: Tensor, fraction: Tensor | None = None) -> Tensor:
    """Perturbed settings, shape ``(..., layers, fields)``, put back into their ranges.

    Args:
        settings: of one epoch.
        fraction: that of the epoch before, shape ``(..., layers)``, below which it may not fall.
    """
    result = settings.clamp(min=0)
    result[..., FRACTION].clamp_(max=1)
    if fraction is not None:
        result[..., FRACTION] = torch.maximum(result[..., FRACTION], fraction)
    return result


def regression(noise: Tensor, difference: Tensor, ridge: float) -> Tensor:
    """Slopes of loss differences on perturbations, for each member.

    Least squares with a ridge, or with fewer pairs than coordinates, shrinks the slopes. They are
    divided by the mean share of a linear loss's slopes that it keeps, so that their size is right on
    average.

    Args:
        noise: shape ``(pairs, members, coordinates)``.
        difference: shape ``(pairs, members)``.
        ridge: share of the mean square added to the diagonal; positive where pairs are fewer than
            coordinates.

    Returns:
        shape ``(members, coordinates)``.

    Raises:
        ValueError: without a ridge, the slopes are not determined.
    """
    design = noise.transpose(0, 1)
    pairs, count = design.shape[1:]
    if ridge == 0 and pairs < count:
        raise ValueError(
            f"{pairs} pairs do not tell {count} slopes: take more, or a positive ridge"
        )
    gram = design.transpose(1, 2) @ design
    penalty = ridge * pairs * torch.eye(count).to(gram)
    right = design.transpose(1, 2) @ difference.T.unsqueeze(-1)
    solved = torch.linalg.solve(gram + penalty, torch.cat([right, gram], dim=2))
    left = solved[..., 1:].diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
    return solved[..., 0] / left


def hats(horizon: int, knots: int) -> Tensor:
    """Piecewise linear functions of progress that are 1 at their own knot, ``(knots, horizon)``."""
    if knots == 1 or horizon == 1:
        return torch.ones(1, horizon)
    position = torch.linspace(0, knots - 1, horizon)
    return (1 - (position - torch.arange(knots).unsqueeze(1)).abs()).clamp(min=0)
