"""The methods that are compared, each with its own parameters and their ranges for the search."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from learnsched.meta.estimators import Rollout, policy_rollout, table_rollout
from learnsched.meta.inner import InnerLoop
from learnsched.policies import (
    AdditiveNoiseAnnealing,
    IncrementalQuantization,
    LearnedPolicy,
    MetaNetwork,
    Relaxed,
    StraightThrough,
)
from learnsched.schedule import Policy, plan


class Trial(Protocol):
    """What a method asks for its parameters, as optuna.Trial."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any: ...


@dataclass(frozen=True)
class Method:
    """One row of a comparison.

    Attributes:
        name: as in tables.
        noise: shape of the noise of its settings.
        partition: order in which INQ takes weights.
        suggest: from a trial to a policy; None where the policy is learned.
        learned: the learned policy, tuned in nothing.
        hardened: whether accuracy is that of the hard network.
    """

    name: str
    noise: str
    partition: str
    suggest: Callable[[Trial], Policy] | None = None
    learned: LearnedPolicy | None = None
    hardened: bool = True

    def rollout(self, inner: InnerLoop, policies: list[Policy]) -> Rollout:
        """The settings of every member, whose policies are given."""
        if self.learned is not None:
            return policy_rollout(self.learned, inner.run, inner.population.members)
        plans: dict[Policy, torch.Tensor] = {}
        for policy in policies:
            if policy not in plans:
                plans[policy] = plan(policy, inner.run, hardened=self.hardened).table.float()
        return table_rollout(torch.stack([plans[policy] for policy in policies], dim=1))


def straight_through(trial: Trial) -> Policy:
    """Two widths of backward noise."""
    return StraightThrough(
        trial.suggest_float("weight_backward_std", 0.2, 3.0, log=True),
        trial.suggest_float("activation_backward_std", 0.2, 3.0, log=True),
    )


def annealing(noise: str) -> Callable[[Trial], Policy]:
    """Initial std, end, power, synchronisation of layers, and two widths of backward noise."""

    def suggest(trial: Trial) -> Policy:
        return AdditiveNoiseAnnealing(
            std=trial.suggest_float("std", 0.1, 0.6),
            end=trial.suggest_float("end", 0.3, 1.0),
            power=trial.suggest_float("power", 0.5, 2.0),
            interval=trial.suggest_categorical("interval", ["overlapped", "same_start"]),
            backward_std=trial.suggest_float("backward_std", 0.2, 3.0, log=True),
            activation_backward_std=trial.suggest_float(
                "activation_backward_std", 0.2, 3.0, log=True
            ),
            noise=noise,
        )

    return suggest


def incremental(partition: str) -> Callable[[Trial], Policy]:
    """The paper's fractions for 2 bits, when they start, and the activations' noise."""

    def suggest(trial: Trial) -> Policy:
        return IncrementalQuantization(
            2,
            partition=partition,
            start=trial.suggest_float("start", 0.0, 0.9),
            activation_backward_std=trial.suggest_float(
                "activation_backward_std", 0.2, 3.0, log=True
            ),
        )

    return suggest


def relaxed(trial: Trial) -> Policy:
    """The width of the noise."""
    return Relaxed(trial.suggest_float("std", 0.2, 0.8))


def hand_coded() -> list[Method]:
    """Every method of the field that the comparison tunes."""
    return [
        Method("straight-through", "normal", "settled", straight_through),
        Method("ANA, normal", "normal", "settled", annealing("normal")),
        Method("ANA, uniform", "uniform", "settled", annealing("uniform")),
        Method("INQ, magnitude", "uniform", "magnitude", incremental("magnitude")),
        Method("INQ, settled", "uniform", "settled", incremental("settled")),
    ]


def upper_bound() -> Method:
    """The relaxed network: the practical upper bound, not hard."""
    return Method("relaxed (never hard)", "normal", "settled", relaxed, hardened=False)


def learned(policy: LearnedPolicy) -> Method:
    """The learned policy; only its learning rate is searched."""
    return Method("learned", policy.noise, policy.partition, learned=policy)


def start_of(policy: LearnedPolicy) -> Method:
    """The hand-coded curve that a learned policy starts from: the same with a fresh network."""
    fresh = LearnedPolicy(MetaNetwork(), policy.base, policy.domain, open_loop=True)
    return replace(learned(fresh), name="learned, before meta-training")
