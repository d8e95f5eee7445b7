"""A method on a task at its best learning rate, all else as it comes.

The choice is by validation accuracy smoothed over neighbouring rates: differences between single rates
are mostly noise, and luck with them would look like a better method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from learnsched.benchmarks.search import Budget, Train
from learnsched.data import load
from learnsched.meta.tasks import Task

# Rates are searched from here to 25 times as much.
_LOWEST_RATE = {"adam": 2e-3, "adamw": 2e-3, "momentum": 2e-2, "sgd": 1e-1}


def measure(
    task: Task, name: str, train: Train, policy: Any, rates: Sequence[float], budget: Budget
) -> dict[str, Any]:
    """Validation accuracy of every learning rate, and test accuracy of fresh seeds at the best."""
    data = load(task.data)
    policies, runs = [policy] * len(rates), budget.trial_runs
    validation = train(task, data, rates, policies, runs, data.validation).mean(1)
    rate = rates[int(smoothed(validation).argmax())]
    final = replace(task, seed=task.seed + 1)
    test = train(final, data, [rate], [policy], budget.runs, data.test)
    return {
        "method": name,
        "cell": task.name,
        "rates": list(rates),
        "validation": validation.tolist(),
        "learning_rate": rate,
        "test": test.flatten().tolist(),
    }


def rates_of(task: Task, count: int) -> list[float]:
    """Learning rates for a task's optimizer, even in logarithms, the last 25 times the first."""
    lowest = _LOWEST_RATE[task.optimizer]
    return [lowest * 25 ** (i / max(1, count - 1)) for i in range(count)]


def smoothed(accuracy: Tensor) -> Tensor:
    """Means over neighbouring learning rates with weights ¼, ½, ¼, the ends repeated.

    Example:
        >>> smoothed(torch.tensor([0.0, 0.0, 1.0, 0.0])).tolist()
        [0.0, 0.25, 0.5, 0.25]
    """
    padded = torch.cat([accuracy[:1], accuracy, accuracy[-1:]])
    return (padded[:-2] + 2 * accuracy + padded[2:]) / 4
