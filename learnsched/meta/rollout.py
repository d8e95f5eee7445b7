"""Inner runs under a schedule: what makes the settings, and training forward along them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from learnsched.data import DataSet
from learnsched.learning_rate import learning_rate_factor
from learnsched.meta.estimators import Inner, Rollout
from learnsched.meta.inner import InnerLoop, InnerState
from learnsched.meta.tasks import Task
from learnsched.policies.base_curve import loss_gain
from learnsched.policies.learned import LearnedPolicy
from learnsched.schedule import (
    BACKWARD_STDS,
    FIELDS,
    FORWARD_STDS,
    FRACTION,
    Policy,
    RunInfo,
    Telemetry,
)


def run_forward(
    inner: Inner,
    rollout: Rollout,
    *,
    hardened: bool = True,
    visit: Callable[[InnerState], None] | None = None,
) -> tuple[InnerState, Tensor, list[Tensor]]:
    """Train without a graph, the settings closed-loop from the rollout.

    Args:
        inner: what to train.
        rollout: what makes the settings.
        hardened: whether the terminal conditions hold; without, a relaxed network stays relaxed.
        visit: called with the state at the start of every epoch and at the end, ``horizon + 1`` times.

    Returns:
        the state at the end; settings, shape ``(horizon, members, layers, len(FIELDS))``, attached to
        the rollout's graph; mean training losses of the epochs.

    Example:
        >>> from learnsched.data import load
        >>> from learnsched.meta.tasks import Task
        >>> from learnsched.policies import LearnedPolicy, MetaNetwork
        >>> task = Task(family="mlp", data="digits", width=4, depth=2, horizon=2, steps=2, batch=16,
        ...             bits="ternary/2-bit", learning_rates=(0.01, 0.02), fine_tuning=False, seed=0)
        >>> inner = task.build(load("digits"))
        >>> rollout = PolicyRollout(LearnedPolicy(MetaNetwork()), inner.run, members=2)
        >>> state, settings, losses = run_forward(inner, rollout)
        >>> state.step, settings.shape, losses[0].shape
        (4, torch.Size([2, 2, 2, 7]), torch.Size([2]))
    """
    visit = visit or (lambda state: None)
    state = inner.initial()
    visit(state)
    rows: list[Tensor] = []
    losses: list[Tensor] = []
    for epoch in range(inner.run.horizon):
        settings = rollout(epoch, inner.telemetry(state, losses))
        if hardened:
            settings = terminal_settings(settings, inner.run, epoch)
        state, loss = inner.epoch(state, settings.detach(), epoch, track=False)
        visit(state)
        rows.append(settings)
        losses.append(loss)
    return state, torch.stack(rows), losses


def terminal_settings(settings: Tensor, run: RunInfo, epoch: int) -> Tensor:
    """:func:`learnsched.schedule.terminal` for tensors of shape ``(..., len(FIELDS))``."""
    if epoch < run.horizon - 1:
        return settings
    end = settings.new_zeros(len(FIELDS))
    end[FRACTION] = 1.0 if run.horizon > 1 else 0.0
    return torch.where(_mask(BACKWARD_STDS, settings.device), settings, end)


def _mask(columns: tuple[int, ...], device: torch.device) -> Tensor:
    """Whether each field is one of the columns, shape ``(len(FIELDS),)``."""
    return torch.tensor([column in columns for column in range(len(FIELDS))], device=device)


class PolicyRollout:
    """The settings of a learned policy for runs that are trained together; epoch 0 starts anew.

    Args:
        policy: what makes the settings.
        run: what is trained.
        members: runs.

    Example:
        >>> from learnsched.data import load
        >>> from learnsched.meta.tasks import Task
        >>> from learnsched.policies import LearnedPolicy, MetaNetwork
        >>> task = Task(family="mlp", data="digits", width=4, depth=2, horizon=2, steps=2, batch=16,
        ...             bits="ternary/2-bit", learning_rates=(0.01, 0.02), fine_tuning=False, seed=0)
        >>> inner = task.build(load("digits"))
        >>> rollout = PolicyRollout(LearnedPolicy(MetaNetwork()), inner.run, members=2)
        >>> settings = rollout(0, inner.telemetry(inner.initial(), []))
        >>> settings.shape, settings.requires_grad  # members, layers, fields
        (torch.Size([2, 2, 7]), True)
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
        for vector in self.parameters + changes:
            network = copy.deepcopy(self._policy.network).requires_grad_(False)
            vector_to_parameters(vector, network.parameters())
            policy = self._policy.replaced(network=network)
            rollouts.append(PolicyRollout(policy, self._run, self._members))

        def rollout(epoch: int, telemetry: Telemetry) -> Tensor:
            starts = range(0, len(telemetry.loss), self._members)
            seen = [telemetry[start : start + self._members] for start in starts]
            each = zip(rollouts, seen, strict=True)
            return torch.cat([one(epoch, part) for one, part in each])

        return rollout


def table_rollout(table: Tensor) -> Rollout:
    """Given settings of shape ``(horizon, members, layers, len(FIELDS))``, whatever is measured."""
    return lambda epoch, telemetry: table[epoch]


def following_rollout(table: Tensor, power: Tensor) -> Rollout:
    """Given settings whose forward std follows each member's loss, see :class:`BaseCurve`.

    Args:
        table: shape ``(horizon, members, layers, len(FIELDS))``.
        power: shape ``(members,)``.
    """
    forward = _mask(FORWARD_STDS, table.device)

    def rollout(epoch: int, telemetry: Telemetry) -> Tensor:
        gain = loss_gain(telemetry.loss, power.to(telemetry.loss)).view(-1, 1, 1)
        return torch.where(forward, table[epoch] * gain, table[epoch])

    return rollout


def learning_rates(policy: Policy, run: RunInfo) -> Tensor:
    """The policy's factors on the learning rate, step by step.

    Args:
        policy: any.
        run: whose steps an epoch are known.

    Returns:
        shape ``(horizon * steps, 1)``, for :attr:`InnerLoop.rates`.

    Example:
        >>> from learnsched.policies import BaseCurve
        >>> from learnsched.schedule import LayerInfo
        >>> run = RunInfo((LayerInfo("fc", 10, 3, 4),), horizon=2, steps_per_epoch=2)
        >>> learning_rates(BaseCurve(warm_until=0.5), run).flatten().tolist()
        [0.0, 0.5, 1.0, 0.5]
    """
    return step_by_step(partial(learning_rate_factor, policy, run), run)


def step_by_step(factor: Callable[[float], float], run: RunInfo) -> Tensor:
    """A factor on the learning rate, by progress, as a column; see :func:`learning_rates`."""
    if run.steps is None:
        raise ValueError("a factor for each step needs a RunInfo with steps_per_epoch; give it")
    total = run.steps
    return torch.tensor([[factor(step / total)] for step in range(total)])


def begin(
    policy: LearnedPolicy,
    task: Task,
    data: DataSet,
    device: str | torch.device = "cpu",
    **options: Any,
) -> tuple[InnerLoop, PolicyRollout]:
    """The inner loop of a task, under the policy's learning rate, and the policy's settings.

    Args:
        policy: sets the schedule.
        task: what is trained.
        data: its data set.
        device: where.
        options: of :meth:`Task.build`.

    Example:
        >>> from learnsched.data import load
        >>> from learnsched.policies import MetaNetwork
        >>> task = Task(family="mlp", data="digits", width=4, depth=2, horizon=2, steps=2, batch=16,
        ...             bits="ternary/2-bit", learning_rates=(0.01, 0.02), fine_tuning=False, seed=0)
        >>> inner, rollout = begin(LearnedPolicy(MetaNetwork()), task, load("digits"))
        >>> inner.run.horizon, inner.rates.shape
        (2, torch.Size([4, 1]))
    """
    inner = task.build(data, device=device, **options)
    inner.rates = learning_rates(policy, inner.run).to(device)
    return inner, PolicyRollout(policy, inner.run, len(task.learning_rates))
