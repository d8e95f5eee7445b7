"""Gradients of the outer loss with respect to a schedule, and through it to a policy's network.

An estimator knows the inner loop only as a protocol: state in, state out. Most give one gradient for
each member of a task in *schedule space*, shape (horizon, members, layers, fields), and chain it
through the policy's network with telemetry held at what it was: telemetry carries no gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

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

    def outer_error(self, state: InnerState, settings: Tensor) -> Tensor: ...

    def telemetry(self, state: InnerState, losses: list[Tensor]) -> Telemetry: ...

    def repeated(self, count: int) -> Inner:
        """``count`` copies of all members, one after the other, of the same weights and data."""
        ...


class Estimate(Protocol):
    """Gradients of the members' outer losses, in whatever space the estimator works.

    Attributes:
        loss: outer loss of each member, shape ``(members,)``.
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


@dataclass(frozen=True)
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
    """What gives the gradient of the outer loss of each member of a task."""

    def __call__(self, inner: Inner, rollout: ParametricRollout) -> Estimate:
        """Run the inner loop under the rollout's schedule and estimate the gradient."""
        ...


@dataclass(frozen=True)
class Unrolled:
    """Backpropagation through the whole inner run, with memory that does not grow with the horizon.

    The forward pass keeps the state at the start of every epoch and no graph; the backward pass runs
    each epoch again, last one first, and hands the adjoint of the state on (checkpointing at epochs;
    ``torch.utils.checkpoint`` does not nest with the gradients inside the inner loop).

    With a truncation, the run is cut into windows of as many epochs, the last one whole. The state is
    carried from window to window, the adjoint is not: the settings of a window get the gradient of the
    outer loss that the network would have at the window's end if it were hardened there. Windows bound
    how far a chaotic run can blow a gradient up, and teach a policy to be good soon.

    Args:
        damping: factor on the second-order path, in [0, 1]. Less than 1 contracts chaotic runs, whose
            gradients explode, at the price of a bias.
        truncation: epochs of a window, at least 1; the whole run if None.

    Raises:
        ValueError: an argument is out of range.

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
    truncation: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.damping <= 1:
            raise ValueError(f"damping must be in [0, 1], got {self.damping}")
        if self.truncation is not None and self.truncation < 1:
            raise ValueError(f"truncation must be at least one epoch, got {self.truncation}")

    def __call__(self, inner: Inner, rollout: Rollout) -> ScheduleEstimate:
        states, table, _ = run_forward(inner, rollout)
        last = inner.run.horizon - 1
        window = self.truncation or inner.run.horizon
        gradients = []
        for epoch in range(last, -1, -1):
            if (last - epoch) % window == 0:
                hard = terminal_settings(table[epoch], inner.run, last).detach().requires_grad_()
                leaves = _leaves(states[epoch + 1])
                at_end = inner.outer_loss(InnerState(leaves, states[epoch + 1].step), hard)
                adjoint, of_hard = _pullback([at_end], [torch.ones_like(at_end)], leaves, hard)
                if epoch == last:
                    loss, of_last = at_end.detach(), of_hard
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
        gradients[0] = gradients[0] + of_last
        return ScheduleEstimate(table, torch.stack(gradients[::-1]), loss)


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


class PolicyRollout:
    """The settings of a learned policy for runs that are trained together; epoch 0 starts anew.

    Args:
        policy: what makes the settings.
        run: what is trained.
        members: runs.
    """

    def __init__(self, policy: LearnedPolicy, run: RunInfo, members: int) -> None:
        self._policy, self._run, self._members = policy, run, members
        self._state: dict[str, Tensor] = {}

    @property
    def parameters(self) -> Tensor:
        """The network's parameters, flat, detached."""
        return parameters_to_vector(self._policy.network.parameters()).detach()

    def __call__(self, epoch: int, telemetry: Telemetry) -> Tensor:
        if epoch == 0:
            self._state = self._policy.initial_state(self._run, (self._members,))
        settings, self._state = self._policy.tensors(self._run, epoch, telemetry, self._state)
        return settings

    def changed(self, changes: Tensor) -> Rollout:
        """See :meth:`ParametricRollout.changed`."""
        rollouts = []
        for change in changes:
            policy = copy.copy(self._policy)
            policy.network = copy.deepcopy(self._policy.network).requires_grad_(False)
            vector_to_parameters(self.parameters + change, policy.network.parameters())
            rollouts.append(PolicyRollout(policy, self._run, self._members))

        def rollout(epoch: int, telemetry: Telemetry) -> Tensor:
            parts = [
                field.split(self._members)
                for field in (telemetry.loss, telemetry.loss_trend, telemetry.weight_error)
            ]
            each = zip(rollouts, *parts, strict=True)
            return torch.cat([one(epoch, Telemetry(*seen)) for one, *seen in each])

        return rollout


def policy_rollout(policy: LearnedPolicy, run: RunInfo, members: int) -> PolicyRollout:
    """The settings of a learned policy for ``members`` runs that are trained together.

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
    return PolicyRollout(policy, run, members)


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
