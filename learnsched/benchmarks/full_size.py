"""Does it hold where networks are trained in earnest? All of Fashion-MNIST, ten times the steps seen.

    torchrun --standalone --nproc-per-node 2 -m learnsched.benchmarks.full_size [--tasks NAME …]
        [--methods NAME …] [--artefact default] [--known PATH] [--peers] [--quick] [--seed N]
        [--json PATH]

Networks on all 55,000 training images, 3,440 steps. Hand-coded methods come with what a search found
for them on 4,000 of those images (the accuracy benchmark's records), the learned schedule as it is, and
again in fewer epochs; the learning rate alone is chosen anew, on validation data, from a list that goes
on where its best is at an end. With ``--peers`` public packages come, too, as they were tuned there, in
the environment of :mod:`learnsched.benchmarks.peers`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from learnsched.benchmarks import carried
from learnsched.benchmarks import methods as field
from learnsched.benchmarks.campaign import one_of_the_ranks, recorded
from learnsched.benchmarks.command_line import GOES_ON, command_line
from learnsched.benchmarks.environment import describe
from learnsched.benchmarks.methods import Method
from learnsched.benchmarks.rate_choice import EXTENSIONS, measure
from learnsched.benchmarks.records import HAND_CODED, RELAXED, read
from learnsched.benchmarks.search import Budget, Train
from learnsched.benchmarks.statistics import best, gap_closed
from learnsched.benchmarks.training import trained
from learnsched.intervals import interval
from learnsched.meta import processes
from learnsched.meta.tasks import Task, task_of
from learnsched.policies import LearnedPolicy
from learnsched.tables import markdown


@dataclass(frozen=True)
class FullSize:
    """A task, and the cell of the accuracy benchmark whose search its rivals come from."""

    task: Task
    tuned_on: str


def _fashion(family: str, depth: int, *, fine_tuned: bool = False) -> Task:
    return task_of(
        ("fashion_mnist", family, 16, depth, 8, 430),
        batch=128,
        bits="ternary/2-bit",
        learning_rates=(0.01,),
        fine_tuning=fine_tuned,
        seed=277_000,
    )


TASKS = {
    "convolutional": FullSize(_fashion("cnn2d", 5), "fashion-cnn-40-epochs"),
    "residual": FullSize(_fashion("residual", 7), "fashion-residual"),
    "fine-tuned": FullSize(_fashion("cnn2d", 5, fine_tuned=True), "fashion-cnn-fine-tuned"),
}
QUICK = FullSize(
    task_of(
        ("digits", "cnn2d", 4, 3, 2, 3),
        batch=16,
        bits="ternary/2-bit",
        learning_rates=(0.01,),
        fine_tuning=False,
        seed=277_000,
    ),
    "fashion-cnn-40-epochs",
)
RATES = (0.004, 0.01, 0.025, 0.06)

# Of the hand-coded methods, the best over all of the grid, and the best on its Fashion-MNIST.
STRONGEST = ("ANA, triangular", "ANA, normal, warm-up")

# Shares of the epochs in which the learned schedule runs, too.
SHORTER = (0.5, 0.75)

_BUDGET = Budget(rounds=1, trials=len(RATES), trial_runs=1, runs=3)


@dataclass(frozen=True)
class Row:
    """What is trained: a method by name, how, its policy, the task with the epochs that it gets."""

    name: str
    train: Train
    policy: Any
    task: Task


def _row(method: Method, policy: Any, task: Task) -> Row:
    return Row(method.name, trained(method), policy, task)


def compared(
    learned: LearnedPolicy, full: FullSize, records: Sequence[Mapping[str, Any]]
) -> list[Row]:
    """The learned schedule, its start, rivals as they were tuned, the relaxed network.

    Rivals are the hand-coded methods that were best in the cell on validation data and on test data,
    and the strongest over the grid. The learned schedule comes in fewer epochs, too.

    Args:
        learned: the schedule.
        full: the task.
        records: of the accuracy benchmark.

    Raises:
        KeyError: there is no record of a rival, or of the relaxed network, in the cell.
    """
    task = full.task
    methods = {
        method.name: method for method in (*field.hand_coded(task.bits), field.upper_bound())
    }
    there = carried.in_cell(records, full.tuned_on).values()
    found = [r for r in there if r["role"] == HAND_CODED and r["method"] in methods]
    foremost = [
        max(found, key=score, default={"method": STRONGEST[0]})["method"]
        for score in (lambda r: r["validation"], lambda r: np.mean(r["test"]))
    ]
    names = list(dict.fromkeys([*foremost, *STRONGEST, field.upper_bound().name]))
    known = carried.in_cell(records, full.tuned_on, names)
    own = field.learned(learned)
    rows = [_row(own, None, task), _row(field.start_of(learned), None, task)]
    for name in names:
        rows.append(_row(methods[name], carried.tuned(methods[name].suggest, known[name]), task))
    for share in SHORTER:
        short = replace(task, horizon=round(share * task.horizon))
        rows.append(_row(replace(own, name=f"{own.name}, {short.horizon} epochs"), None, short))
    return rows


def public(full: FullSize, records: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Peers as they were tuned in the task's cell.

    Raises:
        KeyError: there is no record of one in the cell.
        ModuleNotFoundError: a peer is not installed in this environment.
    """
    from learnsched.benchmarks import peers

    found = peers.entries(full.task.bits)
    known = carried.in_cell(records, full.tuned_on, [entry.name for entry in found])
    return [Row(e.name, e.train, carried.tuned(e.suggest, known[e.name]), full.task) for e in found]


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: test accuracy in %, the first row's margin, validation accuracy by rate; gap closed.

    The gap is that of the relaxed network to the best hand-coded method on test data.
    """
    own = 100 * np.asarray(records[0]["test"])
    rates = sorted({rate for record in records for rate in record["rates"]})
    heads = [f"validation at {rate:g}" for rate in rates]
    rows = [["method", "test accuracy", f"{records[0]['method']} − it", "rate", *heads]]
    for record in records:
        accuracy = 100 * np.asarray(record["test"])
        validation = dict(zip(record["rates"], record["validation"], strict=True))
        rows.append(
            [
                record["method"],
                f"{accuracy.mean():.1f}",
                interval((own - accuracy) / 100).text("+") if record is not records[0] else "",
                f"{record['learning_rate']:g}",
                *(f"{100 * validation[r]:.1f}" if r in validation else "" for r in rates),
            ]
        )
    roles = {method.name: HAND_CODED for method in field.hand_coded()}
    roles[field.upper_bound().name] = RELAXED
    found = {r["method"]: {**r, "role": roles.get(r["method"])} for r in records}
    rival, closed = best(found), gap_closed(found, records[0]["method"])
    if rival is None or closed is None:
        return markdown(rows)
    return f"{markdown(rows)}\n\ngap closed, from {rival['method']}: {100 * closed:.0f} %"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    from learnsched.pretrained import load_pretrained

    parser = command_line(
        __doc__,
        quick="a small network on digits instead",
        json=GOES_ON,
        seed="added to the tasks'",
        artefact=True,
    )
    carried.add_known(parser)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[*TASKS], help="which; all")
    parser.add_argument("--peers", action="store_true", help="torchao's PARQ and Brevitas, too")
    parser.add_argument("--methods", nargs="+", help="by their names in the table; all")
    options = parser.parse_args(arguments)
    chosen = {"quick": QUICK} if options.quick else {name: TASKS[name] for name in options.tasks}
    learned, tuned = load_pretrained(options.artefact), read(options.known)
    jobs = {
        (name, row.name): (name, row)
        for name, full in chosen.items()
        for row in [
            *compared(learned, full, tuned),
            *(public(full, tuned) if options.peers else ()),
        ]
        if options.methods is None or row.name in options.methods
    }

    def work(job: tuple[str, Row]) -> list[dict[str, Any]]:
        name, row = job
        task = replace(row.task, seed=row.task.seed + options.seed)
        made = measure(task, row.name, row.train, row.policy, RATES, _BUDGET, extensions=EXTENSIONS)
        return [{"task": name} | made | {"commit": describe()["commit"]}]

    def progress(record: dict[str, Any]) -> None:
        accuracy = 100 * np.mean(record["test"])
        print(f"{record['task']}, {record['method']}: {accuracy:.1f}", flush=True)

    with one_of_the_ranks():
        records = recorded(
            options.json,
            jobs,
            work,
            lambda record: (record["task"], record["method"]),
            progress=progress,
            seed=options.seed,
            quick=options.quick,
        )
        if processes.rank() == 0:
            for name in chosen:
                print(f"\n{name}\n\n{table([r for r in records if r['task'] == name])}")


if __name__ == "__main__":
    main()
