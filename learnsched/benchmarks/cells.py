"""The cells of the accuracy benchmark: data × network × horizon × bits × regime.

No width here is among those that meta-training (:mod:`learnsched.meta.presets`) trains on for the same
family of networks; some depths of CNNs are, and some widths are those of its validation tasks, on other
seeds and horizons. Fashion-MNIST is not seen there at all.
"""

from __future__ import annotations

from dataclasses import dataclass

from learnsched.benchmarks.search import Budget
from learnsched.data import DataSet, load, reduced
from learnsched.meta.tasks import Task, task_of


@dataclass(frozen=True)
class Cell:
    """One task of the comparison, with how much of its data is used.

    Attributes:
        name: short and unique, for tables and file names.
        task: network, horizon, bits and regime.
        train: training examples at most.
        validation: validation examples at most: for the search.
        test: test examples at most: for the final runs.
    """

    name: str
    task: Task
    train: int = 4000
    validation: int = 1000
    test: int = 2000

    def data(self) -> DataSet:
        """The part of the data set that the cell uses, the same at each call."""
        return reduced(load(self.task.data), self.train, self.validation, self.test)


@dataclass(frozen=True)
class Grid:
    """Cells and what every method gets in each of them."""

    cells: tuple[Cell, ...]
    budget: Budget

    def chosen(self, names: list[str] | None) -> tuple[Cell, ...]:
        """The cells of these names, all if None or empty.

        Raises:
            ValueError: there is no cell of a name.
        """
        known = [cell.name for cell in self.cells]
        for name in names or ():
            if name not in known:
                raise ValueError(f"no cell {name!r}; the grid has {', '.join(known)}")
        return tuple(cell for cell in self.cells if not names or cell.name in names)


def _task(
    *row: str | int,
    bits: str = "ternary/2-bit",
    fine_tuned: bool = False,
    batch: int = 32,
    float_ends: bool = False,
) -> Task:
    """A task by data, family, width, depth, horizon and steps an epoch."""
    return task_of(
        row,
        batch=batch,
        bits=bits,
        learning_rates=(0.01,),
        fine_tuning=fine_tuned,
        seed=88_000,
        float_ends=float_ends,
    )


# Data sets alternate, so that a comparison that ends early has some of each.
_SMALL = (
    Cell("fashion-cnn", _task("fashion_mnist", "cnn2d", 8, 5, 8, 32)),
    Cell("signal-cnn-wide-long", _task("mnist1d", "cnn1d", 24, 7, 15, 40)),
    Cell("fashion-mlp", _task("fashion_mnist", "mlp", 48, 5, 9, 40)),
    Cell("signal-cnn-fine-tuned", _task("mnist1d", "cnn1d", 20, 5, 10, 30, fine_tuned=True)),
    Cell("fashion-residual", _task("fashion_mnist", "residual", 7, 7, 8, 25)),
    Cell("signal-cnn-binary", _task("mnist1d", "cnn1d", 20, 5, 12, 30, bits="binary/binary")),
    Cell("fashion-cnn-fine-tuned", _task("fashion_mnist", "cnn2d", 8, 5, 6, 32, fine_tuned=True)),
    Cell("signal-cnn-deep", _task("mnist1d", "cnn1d", 10, 8, 12, 30)),
    Cell("digits-cnn", _task("digits", "cnn2d", 12, 5, 10, 30)),
    Cell("signal-cnn-ternary", _task("mnist1d", "cnn1d", 20, 5, 12, 30, bits="ternary/ternary")),
    Cell("fashion-cnn-binary", _task("fashion_mnist", "cnn2d", 8, 5, 8, 32, bits="binary/binary")),
    Cell("signal-mlp", _task("mnist1d", "mlp", 96, 5, 12, 40)),
    Cell(
        "fashion-cnn-binary-weights",
        _task("fashion_mnist", "cnn2d", 8, 5, 8, 32, bits="binary/2-bit"),
    ),
    # Weights alone: from random ones, and in the regime of INQ's paper.
    Cell("fashion-cnn-weights", _task("fashion_mnist", "cnn2d", 8, 5, 8, 32, bits="ternary/real")),
    Cell(
        "signal-cnn-weights-fine-tuned",
        _task("mnist1d", "cnn1d", 20, 5, 10, 30, bits="ternary/real", fine_tuned=True),
    ),
)

# Searched like the small ones; the last two take as long as five and eight of them.
_MEDIUM = (
    Cell("fashion-cnn-float-ends", _task("fashion_mnist", "cnn2d", 8, 6, 8, 32, float_ends=True)),
    Cell("fashion-cnn-40-epochs", _task("fashion_mnist", "cnn2d", 8, 5, 40, 32)),
    Cell("signal-cnn-60-epochs", _task("mnist1d", "cnn1d", 24, 7, 60, 40)),
)

_MORE = (
    Cell("fashion-vgg", _task("fashion_mnist", "vgg", 6, 8, 15, 100), 12_000, 5000, 10_000),
    Cell(
        "fashion-cnn-long",
        _task("fashion_mnist", "cnn2d", 24, 7, 30, 187, batch=64),
        12_000,
        5000,
        10_000,
    ),
    Cell(
        "fashion-residual-wide",
        _task("fashion_mnist", "residual", 24, 9, 20, 187, batch=64),
        12_000,
        5000,
        10_000,
    ),
    Cell(
        "fashion-mlp-ternary",
        _task("fashion_mnist", "mlp", 128, 5, 20, 187, bits="ternary/ternary", batch=64),
        12_000,
        5000,
        10_000,
    ),
)

_BUDGET = Budget(rounds=2, trials=8, trial_runs=1, runs=6)

GRIDS: dict[str, Grid] = {
    "quick": Grid(
        (Cell("quick", _task("digits", "mlp", 20, 3, 5, 6), 500, 200, 200),),
        Budget(rounds=1, trials=2, trial_runs=1, runs=2),
    ),
    "small": Grid(_SMALL, _BUDGET),
    "medium": Grid((*_SMALL, *_MEDIUM), _BUDGET),
    "full": Grid((*_SMALL, *_MEDIUM, *_MORE), Budget(rounds=4, trials=8, trial_runs=2, runs=8)),
}
