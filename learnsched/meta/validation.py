"""How well the hard networks do that a learned policy trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from learnsched.data import DataSet
from learnsched.meta.rollout import begin, run_forward, terminal_settings
from learnsched.meta.tasks import Task
from learnsched.policies.learned import LearnedPolicy


def hard_errors(
    policy: LearnedPolicy,
    task: Task,
    data: DataSet,
    device: str | torch.device = "cpu",
    **options: Any,
) -> Tensor:
    """Share of the validation data that each member's hard network gets wrong.

    Args:
        policy: sets the schedule.
        task: what is trained.
        data: its data set.
        device: where.
        options: of :meth:`Task.build`.

    Returns:
        shape ``(members,)``, in [0, 1], on the CPU.

    Example:
        >>> from learnsched.data import load
        >>> from learnsched.policies import MetaNetwork
        >>> task = Task(family="mlp", data="digits", width=4, depth=2, horizon=2, steps=2, batch=16,
        ...             bits="ternary/2-bit", learning_rates=(0.01, 0.02), fine_tuning=False, seed=0)
        >>> errors = hard_errors(LearnedPolicy(MetaNetwork()), task, load("digits"))
        >>> errors.shape, bool(((errors > 0) & (errors < 1)).all())
        (torch.Size([2]), True)
    """
    inner, rollout = begin(policy, task, data, device, membership_width=0.0, **options)
    x, y = (part.to(device) for part in (data.validation.x, data.validation.y))
    with torch.no_grad():
        state, table, _ = run_forward(inner, rollout)
        last = terminal_settings(table[-1], inner.run, inner.run.horizon - 1)
        return 1 - inner.accuracy(state, last, x, y).cpu()
