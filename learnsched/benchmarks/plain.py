"""Plain training of networks one by one: the float network, and peers that have their own layers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from learnsched.batch_norm import reestimate_batch_norm_
from learnsched.data import DataSet, Split
from learnsched.meta.tasks import Task

# From a float network, a policy and the task to the network to train and its optimizer, which has a
# learning rate of 1.
Prepare = Callable[[nn.Module, Any, Task], tuple[nn.Module, torch.optim.Optimizer]]


def adam(model: nn.Module, policy: Any, task: Task) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The network as it is, and the optimizer of the inner loop."""
    return model, torch.optim.Adam(model.parameters(), lr=1.0)


def train(
    prepare: Prepare,
    task: Task,
    data: DataSet,
    rates: Sequence[float],
    policies: Sequence[Any],
    runs: int,
    split: Split,
) -> Tensor:
    """Accuracy on a split of every rate and policy, shape ``(len(rates), runs)``.

    Initial weights, batches and learning rates are those of :meth:`Task.build`: Adam, a cosine from
    the maximum to 0, and batch norm statistics re-estimated on the last training batches.

    Args:
        prepare: what is done to the float network before training.
        task: network, data, horizon, regime.
        data: the data set of the task.
        rates: maxima of the learning rate.
        policies: one for each rate, given to ``prepare``.
        runs: seeds of each.
        split: what accuracy is measured on.
    """
    members = tuple(rate for rate in rates for _ in range(runs))
    networks, order = replace(task, learning_rates=members, runs=runs).floats(data)
    repeated = [policy for policy in policies for _ in range(runs)]
    accuracies = []
    for model, rate, policy, batches in zip(
        networks, members, repeated, itertools.cycle(order), strict=False
    ):
        prepared, optimizer = prepare(model, policy, task)
        _fit(prepared, optimizer, rate, data, batches.flatten(0, 1))
        reestimate_batch_norm_(prepared, (data.train.x[index] for index in batches[-1][:20]))
        accuracies.append(_accuracy(prepared, split))
    return torch.tensor(accuracies, dtype=torch.double).view(len(rates), runs)


def _fit(
    model: nn.Module, optimizer: torch.optim.Optimizer, rate: float, data: DataSet, order: Tensor
) -> None:
    scales = [group["lr"] for group in optimizer.param_groups]
    for step, index in enumerate(order):
        for group, scale in zip(optimizer.param_groups, scales, strict=True):
            # Not warm_cosine, which divides before it multiplies: every fifth rate has another last bit.
            group["lr"] = scale * rate * 0.5 * (1 + math.cos(math.pi * step / len(order)))
        optimizer.zero_grad()
        F.cross_entropy(model(data.train.x[index]), data.train.y[index]).backward()
        optimizer.step()


@torch.no_grad()
def _accuracy(model: nn.Module, split: Split) -> float:
    model.eval()
    correct = [
        (model(x).argmax(-1) == y).sum()
        for x, y in zip(split.x.split(500), split.y.split(500), strict=True)
    ]
    return float(torch.stack(correct).sum()) / len(split)
