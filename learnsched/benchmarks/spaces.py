"""What a search may choose of each hand-coded method: its own parameters and their ranges.

Every range holds the published setting, and what is known to be strong: backward noise of 0.3 to 3
level steps, and a network that is hard from 0.3 of the run to its end. Activations of two or three
levels around 0 want a narrower one: :func:`within`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from learnsched.meta.tasks import BITS
from learnsched.policies import (
    AdditiveNoiseAnnealing,
    BaseCurve,
    IncrementalQuantization,
    PiecewiseAffine,
    Relaxed,
    RelaxedQuantization,
    StraightThrough,
)
from learnsched.policies.annealing import INTERVALS
from learnsched.policies.annealing_grid import PUBLISHED_MEAN
from learnsched.policies.incremental import IDENTITY_STD
from learnsched.schedule import Policy

# The sign of BinaryNet passes a gradient where its argument lies within the levels: uniform noise
# half a step to both sides, as wide as INQ's identity. The sampling of BinaryConnect is the same.
CLIPPED_IDENTITY_STD = IDENTITY_STD

# Noise whose half-width is a level step, or of shapes without bounds, whose parameter is one; as
# standard deviations. What is published for ANA 2022 is 0.14 (logistic) to 0.5 of that.
ONE_STEP = {
    "uniform": 1 / math.sqrt(3),
    "triangular": 1 / math.sqrt(6),
    "normal": 1.0,
    "logistic": math.pi / math.sqrt(3),
}

# Cumulative fractions to search: INQ's by their bits, and late ones by halves for RPR.
FRACTIONS: dict[str, int | tuple[float, ...]] = {
    "2 bits": 2,
    "3 bits": 3,
    "4 bits": 4,
    "5 bits": 5,
    "rpr": (0.9, 0.95, 0.975, 0.9875, 1.0),
}


class Trial(Protocol):
    """What a method asks for its parameters, as optuna.Trial."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any: ...


Suggest = Callable[[Trial], Policy]
_Policy = TypeVar("_Policy")

SIGNED_ACTIVATIONS = ("ternary/ternary", "binary/binary")

# By how much the ranges of the activations' backward noise reach further down.
_NARROWER = 5.0


@dataclass(frozen=True)
class _NarrowActivations:
    trial: Trial

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        if log and name.startswith("activation_backward"):
            low /= _NARROWER
        return self.trial.suggest_float(name, low, high, log=log)

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any:
        return self.trial.suggest_categorical(name, choices)


@dataclass(frozen=True)
class _RealActivations:
    trial: Trial

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        if name.startswith("activation_"):
            return high
        return self.trial.suggest_float(name, low, high, log=log)

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any:
        return self.trial.suggest_categorical(name, choices)


def within(suggest: Callable[[Trial], _Policy], bits: str) -> Callable[[Trial], _Policy]:
    """The space with the parameters, and the ranges of them, that suit the activations.

    With levels around 0 thresholds lie where activations are densest, and every one of them is a
    step away from the next: a gradient as wide as a step is mostly wrong, so that its width is
    searched from a fifth of the usual range's lower end on. Where activations are real, what
    concerns them has no effect and is not searched.

    Args:
        suggest: from a trial to a policy, or to a peer's parameters.
        bits: a key of :data:`learnsched.meta.tasks.BITS`.
    """
    if bits in SIGNED_ACTIVATIONS:
        return lambda trial: suggest(_NarrowActivations(trial))
    if BITS[bits][1] is None:
        return lambda trial: suggest(_RealActivations(trial))
    return suggest


def straight_through(trial: Trial) -> StraightThrough:
    """Two widths of backward noise."""
    return StraightThrough(
        trial.suggest_float("weight_backward_std", 0.2, 3.0, log=True),
        trial.suggest_float("activation_backward_std", 0.2, 3.0, log=True),
    )


def straight_through_moving(trial: Trial) -> StraightThrough:
    """Widths of the backward noise in the first and the last epoch."""
    return StraightThrough(
        trial.suggest_float("weight_backward_std", 0.3, 4.0, log=True),
        trial.suggest_float("activation_backward_std", 0.2, 3.0, log=True),
        weight_backward_end=trial.suggest_float("weight_backward_end", 0.2, 3.0, log=True),
        activation_backward_end=trial.suggest_float("activation_backward_end", 0.2, 3.0, log=True),
    )


def straight_through_uniform(trial: Trial) -> StraightThrough:
    """Two widths of uniform backward noise; the clipped identity is at 0.29 steps."""
    return replace(straight_through(trial), noise="uniform")


def binary_connect(trial: Trial) -> StraightThrough:
    """Weights drawn with the hard sigmoid's probability, and two widths of backward noise."""
    return replace(straight_through_uniform(trial), weight_sample_std=CLIPPED_IDENTITY_STD)


def annealing(noise: str) -> Suggest:
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


def annealing_2019(trial: Trial) -> Policy:
    """Layer after layer, linearly; initial std, end, and two widths of backward noise."""
    return AdditiveNoiseAnnealing(
        std=trial.suggest_float("std", 0.1, 0.6),
        end=trial.suggest_float("end", 0.3, 1.0),
        interval="partition",
        backward_std=trial.suggest_float("backward_std", 0.2, 3.0, log=True),
        activation_backward_std=trial.suggest_float("activation_backward_std", 0.2, 3.0, log=True),
        noise="uniform",
    )


def annealing_2022(noise: str, mode: str) -> Suggest:
    """The members of the published grid with one shape and forward value; their std, and the end."""

    def suggest(trial: Trial) -> Policy:
        lowest = 0.1 if noise == "logistic" else 0.2
        factor = trial.suggest_float("std_factor", lowest, 1.5, log=True)
        moving = ["both"] if mode == "expectation" else ["both", "neither"]
        return AdditiveNoiseAnnealing(
            std=ONE_STEP[noise] * factor,
            end=trial.suggest_float("end", 0.3, 1.0),
            interval=trial.suggest_categorical("interval", list(INTERVALS)),
            power=2.0,
            progressive=trial.suggest_categorical("progressive", [False, True]),
            mean=trial.suggest_categorical("mean", [0.0, PUBLISHED_MEAN]),
            noise=noise,
            mode=mode,
            annealed=trial.suggest_categorical("annealed", moving),
        )

    return suggest


def incremental(partition: str) -> Callable[[Trial], IncrementalQuantization]:
    """The paper's fractions for 2 bits, when they start, and the activations' noise."""

    def suggest(trial: Trial) -> IncrementalQuantization:
        return IncrementalQuantization(
            2,
            partition=partition,
            start=trial.suggest_float("start", 0.0, 0.9),
            activation_backward_std=trial.suggest_float(
                "activation_backward_std", 0.2, 3.0, log=True
            ),
        )

    return suggest


def incremental_of(partition: str, fractions: Sequence[str]) -> Suggest:
    """Which fractions, when they start, and the activations' noise."""

    def suggest(trial: Trial) -> Policy:
        policy = incremental(partition)(trial)
        chosen = trial.suggest_categorical("fractions", list(fractions))
        return replace(policy, fractions=FRACTIONS[chosen])

    return suggest


def relaxed_quantization(mode: str) -> Suggest:
    """The std at the start, when the network hardens and in between."""

    def suggest(trial: Trial) -> Policy:
        std = trial.suggest_float("std", 0.2, 2.0, log=True)
        return RelaxedQuantization(
            std,
            std * trial.suggest_float("std_end_factor", 0.1, 1.0, log=True),
            end=trial.suggest_float("end", 0.3, 1.0),
            mode=mode,
        )

    return suggest


def piecewise_affine(trial: Trial) -> Policy:
    """When the slope begins to grow and ends, how suddenly, and two widths of backward noise."""
    end = trial.suggest_float("end", 0.3, 1.0)
    return PiecewiseAffine(
        start=end * trial.suggest_float("start_factor", 0.0, 0.8),
        end=end,
        steepness=trial.suggest_float("steepness", 1.0, 20.0, log=True),
        weight_backward_std=trial.suggest_float("weight_backward_std", 0.2, 3.0, log=True),
        activation_backward_std=trial.suggest_float("activation_backward_std", 0.2, 3.0, log=True),
    )


def base_curve(trial: Trial) -> Policy:
    """All numbers of the closed form that learned policies start from."""
    return BaseCurve(
        weight_forward_std=trial.suggest_float("weight_forward_std", 0.0, 0.6),
        activation_forward_std=trial.suggest_float("activation_forward_std", 0.0, 0.6),
        weight_hard_from=trial.suggest_float("weight_hard_from", 0.3, 1.0),
        activation_hard_from=trial.suggest_float("activation_hard_from", 0.3, 1.0),
        power=trial.suggest_float("power", 0.5, 2.5, log=True),
        weight_backward_std=trial.suggest_float("weight_backward_std", 0.3, 4.0, log=True),
        weight_backward_end=trial.suggest_float("weight_backward_end", 0.3, 3.0, log=True),
        activation_backward_std=trial.suggest_float("activation_backward_std", 0.3, 3.0, log=True),
        activation_backward_end=trial.suggest_float("activation_backward_end", 0.2, 3.0, log=True),
        freeze_from=trial.suggest_float("freeze_from", 0.4, 0.97),
        hard_tilt=trial.suggest_float("hard_tilt", -0.8, 0.8),
        weight_backward_tilt=trial.suggest_float("weight_backward_tilt", -1.2, 1.2),
        activation_backward_tilt=trial.suggest_float("activation_backward_tilt", -1.2, 1.2),
    )


def relaxed(trial: Trial) -> Policy:
    """The width of the noise."""
    return Relaxed(trial.suggest_float("std", 0.2, 0.8))
