"""What a change to the base curve is worth: the same runs under several variants of it, paired.

Each task of a study is trained with the base curve of the default schedule for its level sets and
regime, changed in one number at a time, down to the same seeds. A variant has the best of the study's
learning rates by mean validation accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from learnsched.benchmarks.campaign import one_of_the_ranks, recorded
from learnsched.benchmarks.command_line import KEEPS, command_line
from learnsched.benchmarks.curve_search import at_best_rate
from learnsched.data import load
from learnsched.intervals import interval
from learnsched.meta import processes
from learnsched.meta.presets import PRESETS
from learnsched.meta.tasks import Task, task_of
from learnsched.policies import BaseCurve
from learnsched.schedule import RunInfo
from learnsched.tables import markdown

BITS = ("ternary/2-bit", "ternary/ternary", "binary/binary", "ternary/real")


class Comparison(Protocol):
    """What is compared, and how the result is kept and told."""

    def variants(self, curve: BaseCurve) -> Sequence[BaseCurve]:
        """From a base curve to what is compared."""
        ...

    def record(self, run: RunInfo, accuracies: list[list[float]]) -> dict[str, Any]:
        """What is stored of a run and the accuracies, a list over seeds for each variant."""
        ...

    def table(self, records: Sequence[dict[str, Any]]) -> str:
        """All records, in Markdown."""
        ...


@dataclass(frozen=True)
class Study:
    """Tasks, and what is compared on them.

    Attributes:
        rows: data set, family, width, depth, epochs and steps an epoch of each network.
        regimes: whether to fine-tune, in the order of the tasks.
        seed: of the tasks.
        rates: learning rates.
        runs: seeds of each variant.
        comparison: of variants of the base curve.
        quick: which task a quick run takes.
    """

    rows: tuple[tuple[str, str, int, int, int, int], ...]
    regimes: tuple[bool, ...]
    seed: int
    rates: tuple[float, ...]
    runs: int
    comparison: Comparison
    quick: int = 0

    def tasks(self, bits: str) -> list[Task]:
        """Every network in every regime."""
        return [
            task_of(
                row, batch=32, bits=bits, learning_rates=(), fine_tuning=fine_tuning, seed=self.seed
            )
            for fine_tuning in self.regimes
            for row in self.rows
        ]

    def measure(self, task: Task, runs: int, seed: int) -> dict[str, Any]:
        """The record of one task."""
        data, task = load(task.data), replace(task, seed=task.seed + seed)
        run = task.run_of(data)
        compared = self.comparison.variants(PRESETS["standard"].base.nearest(run))
        accuracies = at_best_rate(task, data, compared, self.rates, runs).tolist()
        return {
            "task": task.name,
            "bits": task.bits,
            "fine_tuning": task.fine_tuning,
            **self.comparison.record(run, accuracies),
        }

    def main(self, description: str | None, arguments: Sequence[str] | None = None) -> None:
        """The command line."""
        parser = command_line(description, quick="one task, two seeds", json=KEEPS)
        parser.add_argument("--bits", nargs="*", choices=BITS, default=list(BITS))
        options = parser.parse_args(arguments)
        tasks = [task for bits in options.bits for task in self.tasks(bits)]
        runs = self.runs
        if options.quick:
            tasks, runs = tasks[self.quick : self.quick + 1], 2
        with one_of_the_ranks():
            records = recorded(
                options.json,
                {task.name: task for task in tasks},
                lambda task: [self.measure(task, runs, options.seed)],
                lambda record: str(record["task"]),
                seed=options.seed,
                rates=list(self.rates),
                runs=runs,
                quick=options.quick,
            )
            if processes.rank() == 0:
                print(self.comparison.table(records))


@dataclass(frozen=True)
class Sweep:
    """A comparison: one number of the curve at several values, the others with the first.

    Attributes:
        key: under which records keep the values.
        word: what they are called in tables.
        values: in order.
        variant: from the curve and a value to what is compared.
    """

    key: str
    word: str
    values: tuple[float, ...]
    variant: Callable[[BaseCurve, float], BaseCurve]

    def variants(self, curve: BaseCurve) -> list[BaseCurve]:
        """One for each value."""
        return [self.variant(curve, value) for value in self.values]

    def record(self, run: RunInfo, accuracies: list[list[float]]) -> dict[str, Any]:
        """The values and their accuracies."""
        return {self.key: list(self.values), "accuracies": accuracies}

    def table(self, records: Sequence[dict[str, Any]]) -> str:
        """Markdown: points gained on the first value; then their means by regime and bits."""
        words = [f"{self.word} {value:g}" for value in self.values[1:]]
        rows = [["task", "without", *words]]
        groups: dict[str, list[np.ndarray]] = {}
        for record in records:
            found = gains(record)
            without = 100 * np.mean(record["accuracies"][0])
            cells = (interval(gain).text("+") for gain in found)
            rows.append([record["task"], f"{without:.1f}", *cells])
            regime = "fine-tuned" if record["fine_tuning"] else "from scratch"
            groups.setdefault(f"{record['bits']}, {regime}, mean", []).append(found.mean(1))
        for name, means in groups.items():
            rows.append([name, "", *(f"{100 * gain:+.1f}" for gain in np.mean(means, axis=0))])
        return markdown(rows)


def gains(record: dict[str, Any]) -> np.ndarray:
    """What each value of a sweep but the first gains, shape ``(values - 1, seeds)``."""
    accuracies = np.asarray(record["accuracies"])
    return accuracies[1:] - accuracies[0]
