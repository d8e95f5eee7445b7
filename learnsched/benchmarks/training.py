"""Training under a method of the comparison: all rates and policies of a task as one population."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch

from learnsched.benchmarks import search
from learnsched.benchmarks.methods import Method
from learnsched.benchmarks.search import Budget, Found, Train
from learnsched.data import DataSet
from learnsched.meta.rollout import run_forward
from learnsched.meta.tasks import Task
from learnsched.schedule import Policy


def tune(method: Method, task: Task, data: DataSet, budget: Budget, seed: int) -> Found:
    """The learning rate and policy of best mean validation accuracy."""
    return search.tune(trained(method), method.suggest, [(task, data)], budget, seed)


def train(
    method: Method,
    task: Task,
    data: DataSet,
    rates: Sequence[float],
    policies: Sequence[Policy | None],
    runs: int,
    split: Any,
) -> torch.Tensor:
    """Accuracy on a split of every rate and policy, shape ``(len(rates), runs)``."""
    members = tuple(rate for rate in rates for _ in range(runs))
    repeated = [policy for policy in policies if policy is not None for _ in range(runs)]
    inner = replace(task, learning_rates=members, runs=runs).build(
        data,
        noise=method.noise,
        partition=method.partition,
        membership_width=0.0,
        eps=1e-8,
        config=method.config(task.bits),
        mode=method.mode,
        prepare=method.prepare,
    )
    inner.rates = method.rates(repeated, inner.run)
    # Sampled forward values draw from the global generator.
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(task.seed)
        state, table, _ = run_forward(
            inner, method.rollout(inner, repeated), hardened=method.hardened
        )
        accuracy = inner.accuracy(state, table[-1], split.x, split.y)
    return accuracy.view(len(rates), runs)


def trained(method: Method) -> Train:
    """:func:`train` of a method."""
    return cast(Train, functools.partial(train, method))
