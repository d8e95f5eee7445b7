"""Gradients of the outer loss with respect to a schedule, and through it to a policy's network.

An estimator knows the inner loop only as a protocol: state in, state out. Most give one gradient for
each member of a task in *schedule space*, shape (horizon, members, layers, fields), and chain it
through the policy's network with telemetry held at what it was: telemetry carries no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from learnsched.meta.inner import InnerState
from learnsched.schedule import RunInfo, Telemetry

# Epoch and telemetry to settings of shape (members, layers, len(FIELDS)).
Rollout = Callable[[int, Telemetry], Tensor]


class Inner(Protocol):
    """What an estimator knows of the inner loop; see :class:`learnsched.meta.inner.InnerLoop`."""

    run: RunInfo
    seed: int

    def initial(self) -> InnerState: ...

    def epoch(
        self,
        state: InnerState,
        settings: Tensor,
        epoch: int,
        *,
        track: bool,
        damping: float = 1.0,
    ) -> tuple[InnerState, Tensor]: ...

    def outer_loss(self, state: InnerState, settings: Tensor) -> Tensor: ...

    def outer_error(self, state: InnerState, settings: Tensor) -> Tensor: ...

    def telemetry(self, state: InnerState, losses: list[Tensor]) -> Telemetry: ...

    def repeated(self, count: int) -> Inner:
        """``count`` copies of all members, one after the other, of the same weights and data."""
        ...


class Estimate(Protocol):
    """Gradients of the members' outer losses, in whatever space the estimator works.

    Attributes:
        loss: what is descended, of each member, shape ``(members,)``: the outer loss in nats, or the
            share of errors where an evolution strategy has that for its objective.
    """

    @property
    def loss(self) -> Tensor: ...

    @property
    def norms(self) -> Tensor:
        """Norm of each member's gradient, shape ``(members,)``."""
        ...

    def clipped(self, limit: float | Tensor) -> Estimate:
        """Each member's gradient scaled down to the limit's norm; 0 where something is not finite."""
        ...

    def parameter_gradient(self, parameters: Sequence[Tensor]) -> Tensor:
        """The mean over members in the policy's parameters, shape ``(total size,)``."""
        ...


@dataclass(frozen=True, eq=False)
class ScheduleEstimate:
    """Gradients in schedule space.

    Attributes:
        settings: the schedule that was run, still attached to the policy's graph, shape
            ``(horizon, members, layers, len(FIELDS))``.
        gradient: of each member's outer loss, same shape.
        loss: outer loss of each member, shape ``(members,)``.
    """

    settings: Tensor
    gradient: Tensor
    loss: Tensor

    @property
    def norms(self) -> Tensor:
        """Norm of each member's gradient, shape ``(members,)``."""
        return self.gradient.transpose(0, 1).flatten(1).norm(dim=1)

    def clipped(self, limit: float | Tensor) -> ScheduleEstimate:
        """See :meth:`Estimate.clipped`."""
        usable = torch.where(self.loss.isfinite().view(1, -1, 1, 1), self.gradient, 0.0)
        return replace(self, gradient=clipped(usable, limit))

    def parameter_gradient(self, parameters: Sequence[Tensor]) -> Tensor:
        """See :meth:`Estimate.parameter_gradient`; frees the policy's graph."""
        gradients = torch.autograd.grad(
            self.settings,
            list(parameters),
            self.gradient / len(self.loss),
            allow_unused=True,
            materialize_grads=True,
        )
        return torch.cat([g.flatten() for g in gradients])


class ParametricRollout(Protocol):
    """A rollout whose parameters can be changed."""

    @property
    def parameters(self) -> Tensor:
        """All of them, flat, detached."""
        ...

    def __call__(self, epoch: int, telemetry: Telemetry) -> Tensor: ...

    def changed(self, changes: Tensor) -> Rollout:
        """The settings of all members under each of several changes, one change after the other.

        Args:
            changes: added to the parameters, shape ``(changes, parameters)``.

        Returns:
            a rollout of ``changes × members`` members.
        """
        ...


class Estimator(Protocol):
    """What gives the gradient of the outer loss of each member of a task.

    A run of meta-training knows its estimator by its ``repr``, which therefore has to tell its
    parameters and be the same in every process: that of a frozen dataclass is, a function's is not.
    """

    def __call__(self, inner: Inner, rollout: ParametricRollout) -> Estimate:
        """Run the inner loop under the rollout's schedule and estimate the gradient."""
        ...


def clipped(gradient: Tensor, limit: float | Tensor) -> Tensor:
    """Each member's gradient, scaled down to the limit's norm; 0 where it is not finite.

    Args:
        gradient: shape ``(horizon, members, layers, len(FIELDS))``.
        limit: the largest norm, positive.
    """
    norms = gradient.transpose(0, 1).flatten(1).norm(dim=1)
    factor = clip_factors(norms, limit).view(1, -1, 1, 1)
    return torch.nan_to_num(gradient, posinf=0.0, neginf=0.0) * factor


def clip_factors(norms: Tensor, limit: float | Tensor) -> Tensor:
    """What brings gradients of these norms down to a limit, at most 1; 0 where one is not finite."""
    return torch.where(norms.isfinite(), (limit / norms.clamp(min=1e-12)).clamp(max=1.0), 0.0)


def perturbation_generator(seed: int, inner_seed: int) -> torch.Generator:
    """The random numbers of an evolution strategy, from its own seed and the inner loop's."""
    mixed = (1_000_003 * seed + inner_seed) % 2**32  # the generator reads no more than 32 bits
    return torch.Generator().manual_seed(mixed)
