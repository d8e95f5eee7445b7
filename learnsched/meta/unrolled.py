"""Backpropagation through the inner run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from learnsched.choices import whole_number
from learnsched.meta.estimators import Inner, Rollout, ScheduleEstimate
from learnsched.meta.inner import InnerState
from learnsched.meta.rollout import run_forward, terminal_settings


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
        >>> from learnsched.meta.rollout import PolicyRollout
        >>> from learnsched.meta.tasks import Task
        >>> from learnsched.policies import LearnedPolicy, MetaNetwork
        >>> task = Task(family="mlp", data="digits", width=4, depth=2, horizon=2, steps=2, batch=16,
        ...             bits="ternary/2-bit", learning_rates=(0.01, 0.02), fine_tuning=False, seed=0)
        >>> inner = task.build(load("digits"))
        >>> rollout = PolicyRollout(LearnedPolicy(MetaNetwork()), inner.run, members=2)
        >>> estimate = Unrolled(damping=0.5)(inner, rollout)
        >>> estimate.gradient.shape  # epochs, members, layers, fields
        torch.Size([2, 2, 2, 7])
    """

    damping: float = 1.0
    truncation: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.damping <= 1:
            raise ValueError(f"damping must be in [0, 1], got {self.damping}")
        if self.truncation is not None:
            whole_number("truncation", self.truncation)

    def __call__(self, inner: Inner, rollout: Rollout) -> ScheduleEstimate:
        states: list[InnerState] = []
        _, table, _ = run_forward(inner, rollout, visit=states.append)
        last = inner.run.horizon - 1
        window = self.truncation or inner.run.horizon
        gradients = []
        for epoch in range(last, -1, -1):
            if (last - epoch) % window == 0:
                # The network that is judged is hard: settings reach its loss through training alone.
                hard = terminal_settings(table[epoch], inner.run, last).detach()
                leaves = _leaves(states[epoch + 1])
                at_end = inner.outer_loss(InnerState(leaves, states[epoch + 1].step), hard)
                adjoint = _pullback([at_end], [torch.ones_like(at_end)], leaves)
                if epoch == last:
                    loss = at_end.detach()
            settings = table[epoch].detach().requires_grad_()
            leaves = _leaves(states[epoch])
            state, _ = inner.epoch(
                InnerState(leaves, states[epoch].step),
                settings,
                epoch,
                track=True,
                damping=self.damping,
            )
            *adjoint, of_settings = _pullback(list(state.tensors), adjoint, [*leaves, settings])
            gradients.append(of_settings)
        return ScheduleEstimate(table, torch.stack(gradients[::-1]), loss)


def _leaves(state: InnerState) -> tuple[Tensor, ...]:
    return tuple(t.detach().requires_grad_() for t in state.tensors)


def _pullback(
    outputs: list[Tensor], adjoint: list[Tensor], inputs: Sequence[Tensor]
) -> list[Tensor]:
    """The adjoint of what goes into an epoch from that of what comes out of it."""
    pairs = [(o, a) for o, a in zip(outputs, adjoint, strict=True) if o.requires_grad]
    before = torch.autograd.grad(
        [o for o, _ in pairs],
        list(inputs),
        [a for _, a in pairs],
        allow_unused=True,
        materialize_grads=True,
    )
    return list(before)
