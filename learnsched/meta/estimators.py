"""Gradients of the outer loss with respect to a schedule.

An estimator knows the inner loop only as a protocol: state in, state out. It gives one gradient for
each member of a task in *schedule space*, shape (horizon, members, layers, fields); what chains it
through a policy's network is the same for all estimators, as telemetry carries no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from learnsched.meta.inner import InnerState
from learnsched.policies.learned import LearnedPolicy
from learnsched.schedule import FIELDS, RunInfo, Telemetry

# Epoch and telemetry to settings of shape (members, layers, len(FIELDS)).
Rollout = Callable[[int, Telemetry], Tensor]

_FRACTION = FIELDS.index("fraction")


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

    def telemetry(self, state: InnerState, losses: list[Tensor]) -> Telemetry: ...

    def repeated(self, count: int) -> Inner:
        """``count`` copies of all members, one after the other, of the same weights and data."""
        ...


@dataclass(frozen=True)
class Estimate:
    """A gradient in schedule space.

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


class Estimator(Protocol):
    """What gives the gradient of the outer loss of each member of a task."""

    def __call__(self, inner: Inner, rollout: Rollout) -> Estimate:
        """Run the inner loop under the rollout's schedule and estimate the gradient."""
        ...


@dataclass(frozen=True)
class Unrolled:
    """Backpropagation through the whole inner run, with memory that does not grow with the horizon.

    The forward pass keeps the state at the start of every epoch and no graph; the backward pass runs
    each epoch again, last one first, and hands the adjoint of the state on (checkpointing at epochs;
    ``torch.utils.checkpoint`` does not nest with the gradients inside the inner loop).

    Args:
        damping: factor on the second-order path, in [0, 1]. Less than 1 contracts chaotic runs, whose
            gradients explode, at the price of a bias.

    Raises:
        ValueError: the damping leaves [0, 1].

    Example:
        >>> from learnsched.data import load
        >>> from learnsched.meta.tasks import Task
        >>> from learnsched.policies import LearnedPolicy, MetaNetwork
        >>> task = Task("mlp", "digits", width=4, depth=2, horizon=2, steps=2, batch=16,
        ...             bits="ternary/2-bit", learning_rates=(0.01, 0.02), fine_tuning=False, seed=0)
        >>> inner = task.build(load("digits"))
        >>> rollout = policy_rollout(LearnedPolicy(MetaNetwork()), inner.run, members=2)
        >>> estimate = Unrolled(damping=0.5)(inner, rollout)
        >>> estimate.gradient.shape  # epochs, members, layers, fields
        torch.Size([2, 2, 2, 7])
    """

    damping: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.damping <= 1:
            raise ValueError(f"damping must be in [0, 1], got {self.damping}")

    def __call__(self, inner: Inner, rollout: Rollout) -> Estimate:
        states, table, _ = run_forward(inner, rollout)
        last = inner.run.horizon - 1
        settings = table[last].detach().requires_grad_()
        leaves = _leaves(states[-1])
        loss = inner.outer_loss(InnerState(leaves, states[-1].step), settings)
        adjoint, at_end = _pullback([loss], [torch.ones_like(loss)], leaves, settings)
        gradients = [at_end]
        for epoch in range(last, -1, -1):
            settings = table[epoch].detach().requires_grad_()
            leaves = _leaves(states[epoch])
            state, _ = inner.epoch(
                InnerState(leaves, states[epoch].step),
                settings,
                epoch,
                track=True,
                damping=self.damping,
            )
            adjoint, of_settings = _pullback(list(state.tensors), adjoint, leaves, settings)
            gradients.append(of_settings)
        gradients[1] = gradients[1] + gradients[0]
        return Estimate(table, torch.stack(gradients[:0:-1]), loss.detach())


def clipped(gradient: Tensor, limit: float | Tensor) -> Tensor:
    """Each member's gradient, scaled down to the limit's norm; 0 where it is not finite.

    Args:
        gradient: shape ``(horizon, members, layers, len(FIELDS))``.
        limit: the largest norm, positive.
    """
    norms = gradient.transpose(0, 1).flatten(1).norm(dim=1)
    factor = torch.where(norms.isfinite(), (limit / norms.clamp(min=1e-12)).clamp(max=1.0), 0.0)
    return torch.nan_to_num(gradient, posinf=0.0, neginf=0.0) * factor.view(1, -1, 1, 1)


def run_forward(
    inner: Inner, rollout: Rollout, *, hardened: bool = True
) -> tuple[list[InnerState], Tensor, list[Tensor]]:
    """Train without a graph, the settings closed-loop from the rollout.

    Args:
        inner: what to train.
        rollout: what makes the settings.
        hardened: whether the terminal conditions hold; without, a relaxed network stays relaxed.

    Returns:
        states at the start of every epoch and at the end, ``horizon + 1`` of them; settings, shape
        ``(horizon, members, layers, len(FIELDS))``, attached to the rollout's graph; mean training
        losses of the epochs.

    Example:
        >>> from learnsched.data import load
        >>> from learnsched.meta.tasks import Task
        >>> from learnsched.policies import LearnedPolicy, MetaNetwork
        >>> task = Task("mlp", "digits", width=4, depth=2, horizon=2, steps=2, batch=16,
        ...             bits="ternary/2-bit", learning_rates=(0.01, 0.02), fine_tuning=False, seed=0)
        >>> inner = task.build(load("digits"))
        >>> rollout = policy_rollout(LearnedPolicy(MetaNetwork()), inner.run, members=2)
        >>> states, settings, losses = run_forward(inner, rollout)
        >>> len(states), settings.shape, losses[0].shape
        (3, torch.Size([2, 2, 2, 7]), torch.Size([2]))
    """
    states = [inner.initial()]
    rows: list[Tensor] = []
    losses: list[Tensor] = []
    for epoch in range(inner.run.horizon):
        settings = rollout(epoch, inner.telemetry(states[-1], losses))
        if hardened:
            settings = terminal_settings(settings, inner.run, epoch)
        state, loss = inner.epoch(states[-1], settings.detach(), epoch, track=False)
        states.append(state)
        rows.append(settings)
        losses.append(loss)
    return states, torch.stack(rows), losses


def terminal_settings(settings: Tensor, run: RunInfo, epoch: int) -> Tensor:
    """:func:`learnsched.schedule.terminal` for tensors of shape ``(..., len(FIELDS))``."""
    if epoch < run.horizon - 1:
        return settings
    keep = torch.tensor([name.endswith("backward_std") for name in FIELDS], device=settings.device)
    end = settings.new_zeros(len(FIELDS))
    end[_FRACTION] = 1.0 if run.horizon > 1 else 0.0
    return torch.where(keep, settings, end)


def policy_rollout(policy: LearnedPolicy, run: RunInfo, members: int) -> Rollout:
    """The settings of a learned policy for runs that are trained together; epoch 0 starts anew.

    Example:
        >>> from learnsched.data import load
        >>> from learnsched.meta.tasks import Task
        >>> from learnsched.policies import LearnedPolicy, MetaNetwork
        >>> task = Task("mlp", "digits", width=4, depth=2, horizon=2, steps=2, batch=16,
        ...             bits="ternary/2-bit", learning_rates=(0.01, 0.02), fine_tuning=False, seed=0)
        >>> inner = task.build(load("digits"))
        >>> rollout = policy_rollout(LearnedPolicy(MetaNetwork()), inner.run, members=2)
        >>> settings = rollout(0, inner.telemetry(inner.initial(), []))
        >>> settings.shape, settings.requires_grad  # members, layers, fields
        (torch.Size([2, 2, 7]), True)
    """
    state: dict[str, Tensor] = {}

    def rollout(epoch: int, telemetry: Telemetry) -> Tensor:
        nonlocal state
        if epoch == 0:
            state = policy.initial_state(run, (members,))
        settings, state = policy.tensors(run, epoch, telemetry, state)
        return settings

    return rollout


def table_rollout(table: Tensor) -> Rollout:
    """Given settings of shape ``(horizon, members, layers, len(FIELDS))``, whatever is measured."""
    return lambda epoch, telemetry: table[epoch]


def _leaves(state: InnerState) -> tuple[Tensor, ...]:
    return tuple(t.detach().requires_grad_() for t in state.tensors)


def _pullback(
    outputs: list[Tensor], adjoint: list[Tensor], leaves: tuple[Tensor, ...], settings: Tensor
) -> tuple[list[Tensor], Tensor]:
    """The adjoint of an epoch's inputs from that of its outputs, and the gradient of its settings."""
    pairs = [(o, a) for o, a in zip(outputs, adjoint, strict=True) if o.requires_grad]
    *before, of_settings = torch.autograd.grad(
        [o for o, _ in pairs],
        [*leaves, settings],
        [a for _, a in pairs],
        allow_unused=True,
        materialize_grads=True,
    )
    return list(before), of_settings
