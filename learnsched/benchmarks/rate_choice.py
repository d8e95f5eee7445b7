"""A method on a task at its best learning rate, all else as it comes.

The choice is by validation accuracy smoothed over neighbouring rates: differences between single rates
are mostly noise, and luck with them would look like a better method.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from learnsched.benchmarks.search import Budget, Train
from learnsched.data import load
from learnsched.meta.tasks import Task

# A list of four or five rates may grow by so many where its best is at an end.
EXTENSIONS = 2

# Rates are searched from here to 25 times as much.
_LOWEST_RATE = {"adam": 2e-3, "adamw": 2e-3, "momentum": 2e-2, "sgd": 1e-1}


class Choice(NamedTuple):
    """Learning rates in ascending order, the validation score of each, and the rate that was chosen."""

    rates: list[float]
    validation: list[float]
    best: float


def choose(
    rates: Sequence[float],
    score: Callable[[Sequence[float]], Sequence[float]],
    *,
    extensions: int = 0,
) -> Choice:
    """The rate of best smoothed score, of a list that grows where its best is at an end.

    Args:
        rates: ascending, at least two where the list may grow.
        score: from learning rates to their validation scores.
        extensions: how often at most the list goes on beyond its best, by the ratio of the two rates
            at that end, which is rounded to three digits.

    Example:
        >>> found = choose((1.0, 2.0, 4.0), lambda rates: [-abs(r - 8) for r in rates], extensions=3)
        >>> found.rates, found.best
        ([1.0, 2.0, 4.0, 8.0, 16.0], 8.0)
    """
    listed, validation = list(rates), list(score(rates))
    for _ in range(extensions):
        best = int(smoothed(torch.tensor(validation)).argmax())
        if 0 < best < len(listed) - 1:
            break
        at, neighbour = (0, 1) if best == 0 else (len(listed), -2)
        further = [float(f"{listed[best] ** 2 / listed[neighbour]:.3g}")]
        validation[at:at] = score(further)
        listed[at:at] = further
    return Choice(listed, validation, listed[int(smoothed(torch.tensor(validation)).argmax())])


def measure(
    task: Task,
    name: str,
    train: Train,
    policy: Any,
    rates: Sequence[float],
    budget: Budget,
    *,
    extensions: int = 0,
) -> dict[str, Any]:
    """Validation accuracy of every learning rate, and test accuracy of fresh seeds at the best.

    The list of rates may grow at its ends, as :func:`choose` says.
    """
    data = load(task.data)

    def validated(rates: Sequence[float]) -> list[float]:
        policies, runs = [policy] * len(rates), budget.trial_runs
        return train(task, data, rates, policies, runs, data.validation).mean(1).tolist()

    choice = choose(rates, validated, extensions=extensions)
    final = replace(task, seed=task.seed + 1)
    test = train(final, data, [choice.best], [policy], budget.runs, data.test)
    return {
        "method": name,
        "cell": task.name,
        "rates": choice.rates,
        "validation": choice.validation,
        "learning_rate": choice.best,
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
