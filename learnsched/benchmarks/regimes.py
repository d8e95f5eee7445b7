"""Kinds of runs that are tuned for themselves, and networks drawn at random for each of them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from learnsched.meta.mix import Mix
from learnsched.meta.tasks import Task


class Regime(NamedTuple):
    """Level sets, by their name in a task, and where training starts.

    Example:
        >>> str(Regime("ternary/2-bit", fine_tuning=True))
        'ternary/2-bit, fine-tuned'
    """

    bits: str
    fine_tuning: bool

    @classmethod
    def of(cls, task: Task) -> Regime:
        """That of a task."""
        return cls(task.bits, task.fine_tuning)

    def __str__(self) -> str:
        return f"{self.bits}{', fine-tuned' * self.fine_tuning}"


def drawn(mix: Mix, counts: Mapping[Regime, int], seed: int) -> list[Task]:
    """Tasks of a mix whose bits and starts are those of each regime, so many of it.

    One of each regime in turn, so that a campaign that ends early has some of all. A regime has networks
    of its own, and those of a smaller count are the first of a larger one.
    """
    kinds = []
    for index, (regime, count) in enumerate(counts.items()):
        own = replace(mix, bits=((regime.bits, 1.0),), fine_tuning=float(regime.fine_tuning))
        kinds.append([own.sample(seed, 1000 * index + i)[0] for i in range(count)])
    return [task for turn in itertools.zip_longest(*kinds) for task in turn if task]
