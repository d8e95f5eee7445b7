"""Mixes: distributions of tasks, from which every outer step of meta-training draws its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from learnsched.choices import check_choice, whole_number
from learnsched.meta.networks import FAMILIES, check_depth
from learnsched.meta.tasks import BITS, Task, mixed_seed

T = TypeVar("T")

# The fewest optimizer steps of an epoch.
_LEAST_STEPS = 2


@dataclass(frozen=True)
class Mix:
    """A distribution of tasks.

    Attributes:
        architectures: (data, family, widths, depths) to draw from; families by name, those of
            :data:`learnsched.meta.networks.FAMILIES` or the trainer's own.
        horizons: epochs to draw from.
        total_steps: fewest and most optimizer steps of a run, drawn log-uniformly; but an epoch has two
            at least.
        batches: examples a step, to draw from.
        bits: pairs of a key of :data:`learnsched.meta.tasks.BITS` and its weight.
        learning_rates: smallest and largest, drawn log-uniformly for each member.
        fine_tuning: probability to start from a float network.
        members: members of a task.
        tasks: tasks of an outer step.
        alike: tasks in a row that differ in learning rates and seeds only, so that as many ranks
            finish together.

    Raises:
        TypeError: widths, depths, horizons or batches are no tuple to draw from.
        ValueError: there is nothing to draw from, bits are unknown, a family has no network of a depth,
            or a number is out of its range.

    Example:
        >>> mix = Mix(architectures=(("digits", "mlp", (8,), (2, 3)),), horizons=(4, 6),
        ...           total_steps=(20, 60), batches=(32,), bits=(("ternary/2-bit", 1.0),),
        ...           learning_rates=(0.005, 0.05), fine_tuning=0.2, members=8, tasks=2)
        >>> [task.family for task in mix.sample(seed=0, outer_step=3)]
        ['mlp', 'mlp']
    """

    architectures: tuple[tuple[str, str, tuple[int, ...], tuple[int, ...]], ...]
    horizons: tuple[int, ...]
    total_steps: tuple[int, int]
    batches: tuple[int, ...]
    bits: tuple[tuple[str, float], ...]
    learning_rates: tuple[float, float]
    fine_tuning: float
    members: int
    tasks: int
    alike: int = 2

    def __post_init__(self) -> None:
        for name in ("architectures", "bits"):
            _check_not_empty(name, getattr(self, name))
        for _, family, widths, depths in self.architectures:
            _check_whole("widths", widths)
            _check_whole("depths", depths)
            for depth in depths if family in FAMILIES else ():
                check_depth(family, depth)
        _check_whole("horizons", self.horizons)
        _check_whole("batches", self.batches)
        for bits, weight in self.bits:
            check_choice("bits", bits, BITS)
            if not 0 < weight < math.inf:
                raise ValueError(
                    f"the weight of {bits} must be positive, got {weight}; leave out what is never drawn"
                )
        ends = (self.total_steps, self.learning_rates)
        if not all(0 < low <= high < math.inf for low, high in ends):
            raise ValueError(f"ranges go from a positive number up, got {ends}")
        for name in ("members", "tasks", "alike"):
            whole_number(name, getattr(self, name))
        if not 0 <= self.fine_tuning <= 1:
            raise ValueError(f"fine_tuning is a probability in [0, 1], got {self.fine_tuning}")

    @property
    def run_steps(self) -> tuple[float, float]:
        """Fewest and most optimizer steps of a run, but for rounding to whole steps an epoch."""
        ends = zip(self.total_steps, (min(self.horizons), max(self.horizons)), strict=True)
        fewest, most = (max(total, _LEAST_STEPS * horizon) for total, horizon in ends)
        return fewest, most

    def sample(self, seed: int, outer_step: int) -> list[Task]:
        """The tasks of an outer step; the same for the same arguments."""
        generator = torch.Generator().manual_seed(mixed_seed(seed, outer_step))
        tasks: list[Task] = []
        for index in range(self.tasks):
            kind = tasks[-1] if index % self.alike else self._draw(generator)
            task = replace(
                kind,
                learning_rates=self._learning_rates(generator),
                seed=int(torch.randint(2**31, (), generator=generator)),
            )
            tasks.append(task)
        return tasks

    def _draw(self, generator: torch.Generator) -> Task:
        data, family, widths, depths = _choice(self.architectures, generator)
        horizon = _choice(self.horizons, generator)
        weights = torch.tensor([w for _, w in self.bits])
        bits = self.bits[int(torch.multinomial(weights, 1, generator=generator))][0]
        total = _log_uniform(self.total_steps, generator)
        return Task(
            family=family,
            data=data,
            width=_choice(widths, generator),
            depth=_choice(depths, generator),
            horizon=horizon,
            steps=max(_LEAST_STEPS, round(total / horizon)),
            batch=_choice(self.batches, generator),
            bits=bits,
            learning_rates=(),
            fine_tuning=_uniform(generator) < self.fine_tuning,
            seed=0,
        )

    def _learning_rates(self, generator: torch.Generator) -> tuple[float, ...]:
        return tuple(_log_uniform(self.learning_rates, generator) for _ in range(self.members))


def _check_not_empty(name: str, options: Sequence[object]) -> None:
    if not options:
        raise ValueError(f"{name} is empty: there is nothing to draw from")


def _check_whole(name: str, options: Sequence[int]) -> None:
    """Refuse what are no whole numbers from 1 up."""
    if not isinstance(options, Sequence):
        raise TypeError(f"{name} must be a tuple of whole numbers to draw from, got {options!r}")
    _check_not_empty(name, options)
    for option in options:
        whole_number(f"each of {name}", option)


def _choice(options: Sequence[T], generator: torch.Generator) -> T:
    return options[int(torch.randint(len(options), (), generator=generator))]


def _log_uniform(ends: tuple[float, float], generator: torch.Generator) -> float:
    low, high = (math.log(end) for end in ends)
    return math.exp(low + (high - low) * _uniform(generator))


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator))
