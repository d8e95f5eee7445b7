"""The methods that are compared, each with its own parameters and their ranges for the search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from learnsched.convert import LayerConfig
from learnsched.meta.estimators import Rollout, policy_rollout, table_rollout
from learnsched.meta.inner import InnerLoop
from learnsched.meta.tasks import BITS
from learnsched.policies import (
    AdditiveNoiseAnnealing,
    IncrementalQuantization,
    LearnedPolicy,
    MetaNetwork,
    Relaxed,
    StraightThrough,
)
from learnsched.schedule import Policy, RunInfo, plan


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
        mode: the forward value while there is noise, see :func:`learnsched.annealed_quantize`.
        levels: from the level sets of a cell to the level sets and scale rules of the method; None
            keeps the cell's, with their customary rules.
        rate: from a policy and the progress of optimizer steps, in [0, 1), to the factor on the
            learning rate; None is the cosine.
        bits: keys of :data:`learnsched.meta.tasks.BITS` that the method applies to.
        source: paper and equation.
    """

    name: str
    noise: str
    partition: str
    suggest: Callable[[Trial], Policy] | None = None
    learned: LearnedPolicy | None = None
    hardened: bool = True
    mode: str = "expectation"
    levels: Callable[[LayerConfig], LayerConfig] | None = None
    rate: Callable[[Any, float], float] | None = None
    bits: tuple[str, ...] = tuple(BITS)
    source: str = ""

    def config(self, bits: str) -> LayerConfig:
        """Level sets and scale rules of the method in a cell of these bits."""
        config = LayerConfig(*BITS[bits])
        return config if self.levels is None else self.levels(config)

    def rates(self, policies: Sequence[Policy], run: RunInfo) -> torch.Tensor | None:
        """Factors on the members' learning rates, step by step; None is the cosine.

        Args:
            policies: one a member.
            run: whose horizon and steps an epoch are known.

        Returns:
            shape ``(horizon * steps, members)``.
        """
        if self.rate is None:
            return None
        total = run.horizon * (run.steps_per_epoch or 1)
        columns = {
            policy: [self.rate(policy, step / total) for step in range(total)]
            for policy in set(policies)
        }
        return torch.tensor([columns[policy] for policy in policies]).T.contiguous()

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


def rivals() -> list[Method]:
    """The strongest hand-coded methods, one or two of each family: what a quick comparison tunes."""
    return [
        Method("straight-through", "normal", "settled", straight_through),
        Method("ANA, normal", "normal", "settled", annealing("normal")),
        Method("ANA, uniform", "uniform", "settled", annealing("uniform")),
        Method("INQ, magnitude", "uniform", "magnitude", incremental("magnitude")),
        Method("INQ, settled", "uniform", "settled", incremental("settled")),
    ]


def hand_coded(bits: str = "ternary/2-bit") -> list[Method]:
    """Every method of the field that applies to these bits."""
    return [method for method in rivals() if bits in method.bits]


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
