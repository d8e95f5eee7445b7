"""One recipe for every network: what is a schedule worth where nobody searches?

    torchrun --standalone --nproc-per-node 2 -m learnsched.benchmarks.tuned_once [--artefact default]
        [--grid medium] [--cells NAME …] [--methods NAME …] [--search ROUNDS TRIALS] [--known PATH]
        [--advised PATH] [--quick] [--seed N] [--json PATH]

Each method is tuned once for each pair of level sets, from scratch and for fine-tuning, on tasks like
meta-training's: its learning rate and all of its parameters, a learned schedule's learning rate, with
the same number of trials. What was found trains every network of the accuracy benchmark as it is. Its
seeds are those of that benchmark, whose records say what a search in each cell would have brought.
Then all do so again, at the learning rate that :mod:`learnsched.benchmarks.learning_rates` advises for
the learned schedule: many networks have chosen it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from learnsched.benchmarks import carried, learning_rates
from learnsched.benchmarks import methods as field
from learnsched.benchmarks.campaign import one_of_the_ranks, recorded
from learnsched.benchmarks.cells import GRIDS, Cell
from learnsched.benchmarks.command_line import GOES_ON, command_line
from learnsched.benchmarks.environment import describe
from learnsched.benchmarks.methods import Method
from learnsched.benchmarks.records import HAND_CODED, LEARNED, read
from learnsched.benchmarks.regimes import Regime
from learnsched.benchmarks.search import Budget, tune
from learnsched.benchmarks.statistics import Record, best, compare, doublings, mean, search_curve
from learnsched.benchmarks.training import train, trained
from learnsched.data import load
from learnsched.intervals import Interval
from learnsched.meta import processes
from learnsched.meta.tasks import Task, task_of
from learnsched.policies import LearnedPolicy
from learnsched.tables import markdown

# The strongest of the grid, one of INQ's, and the simplest.
RIVALS = (
    "ANA, triangular",
    "ANA, triangular, warm-up",
    "ANA, logistic",
    "ANA, normal, warm-up",
    "STE, moving",
    "STE, moving, warm-up",
    "straight-through",
    "INQ, magnitude",
)

# Stages of a record: what was found, what it reaches, and what at the advised learning rate.
RECIPE, TEST, ADVISED = "recipe", "test", "advised"

# Of one trial on one task: enough, since a trial trains on all of them.
_BUDGET = Budget(rounds=2, trials=8, trial_runs=1, runs=6)
_QUICK = Budget(rounds=1, trials=2, trial_runs=1, runs=2)


def practice(regime: Regime) -> list[Task]:
    """What a method is tuned on: four networks like those of meta-training, on other seeds."""
    rows = (
        ("mnist1d", "cnn1d", 8, 4, 8, 20),
        ("mnist1d", "cnn1d", 16, 4, 16, 25),
        ("mnist1d", "mlp", 32, 4, 12, 15),
        ("noisy_digits", "residual", 8, 5, 10, 20),
    )
    return [
        task_of(
            row,
            batch=64 if row[0] == "mnist1d" else 32,
            bits=regime.bits,
            learning_rates=(),
            fine_tuning=regime.fine_tuning,
            seed=760_000,
        )
        for row in rows
    ]


def compared(learned: LearnedPolicy, bits: str, names: Sequence[str]) -> list[Method]:
    """The learned schedule, its start and the rivals of these names that apply to these bits."""
    every = (*_own(learned), *field.hand_coded(bits))
    return [method for method in every if method.name in names]


def _own(learned: LearnedPolicy) -> tuple[Method, Method]:
    return field.learned(learned), field.start_of(learned)


def tuned(method: Method, tasks: Sequence[Task], budget: Budget, seed: int) -> dict[str, Any]:
    """Learning rate and parameters of best validation accuracy, the mean over tasks."""
    data = [(task, load(task.data)) for task in tasks]
    found = tune(trained(method), method.suggest, data, budget, seed)
    return {
        "method": method.name,
        "learning_rate": found.learning_rate,
        "parameters": found.parameters,
        "validation": found.validation,
        "trials": found.trials,
    }


def measured(method: Method, recipe: Record, cell: Cell, runs: int) -> dict[str, Any]:
    """Test accuracies in a cell under a recipe, of the accuracy benchmark's own seeds."""
    task, data = replace(cell.task, seed=cell.task.seed + 1), cell.data()
    policies = [carried.tuned(method.suggest, recipe)]
    accuracy = train(method, task, data, [recipe["learning_rate"]], policies, runs, data.test)
    return {"cell": cell.name, "method": method.name, "test": accuracy.flatten().tolist()}


def add_advised(parser: argparse.ArgumentParser) -> None:
    """``--advised``, what :func:`advice` reads."""
    parser.add_argument(
        "--advised",
        type=Path,
        default=Path("figures/learning_rates.json"),
        help="records of the benchmark of learning rates",
    )


def advice(path: Path) -> dict[str, float]:
    """Advised learning rates by regime, from the file of their benchmark."""
    kinds = learning_rates.by_kind(json.loads(path.read_text())["records"])
    return {str(regime): learning_rates.advised(found) for regime, found in kinds.items()}


def table(
    records: Sequence[Record], cells: Sequence[Cell], first: str = LEARNED, stage: str = TEST
) -> str:
    """Markdown: what each method reaches over the cells, and by how much the first, if there, is ahead.

    Two rows choose among the hand-coded ones: what was best where they were tuned, and the best of each
    cell on test data, which nobody can know.
    """
    recipes = {(r["regime"], r["method"]): r for r in records if r["stage"] == RECIPE}
    tests = {(r["cell"], r["method"]): r for r in records if r["stage"] == stage}
    names = list(dict.fromkeys(r["method"] for r in tests.values()))
    own = (first, *(name for name in names if name.startswith(first) and name != first))
    rows: dict[str, dict[str, Record]] = {
        name: {c.name: tests[c.name, name] for c in cells if (c.name, name) in tests}
        for name in names
    }
    rivals = [name for name in names if name not in own]
    validated, luckiest = {}, {}
    for cell in cells:
        there = [name for name in rivals if (cell.name, name) in tests]
        if there:
            regime = str(Regime.of(cell.task))
            found = max(there, key=lambda name: recipes[regime, name]["validation"])
            validated[cell.name] = tests[cell.name, found]
            luckiest[cell.name] = max((tests[cell.name, n] for n in there), key=mean)
    rows |= {"the best where tuned": validated, "the best of each cell": luckiest}
    heads = [
        "method",
        "cells",
        "mean accuracy",
        f"{first} ahead by",
        "in cells",
        "clearly",
        "clearly behind",
    ]
    lines = [heads]
    ahead = rows.get(first, {})
    for name, found in rows.items():
        pairs = {cell: (ahead[cell], r) for cell, r in found.items() if cell in ahead}
        line = [name, str(len(found)), f"{100 * fmean(map(mean, found.values())):.1f}"]
        if name != first and pairs:
            result = compare(pairs)
            counts = (result.wins, result.clear_wins, result.clear_losses)
            line += [result.interval.text("+"), *map(str, counts)]
        lines.append(line + [""] * (len(heads) - len(line)))
    return markdown(lines)


def without_search(records: Sequence[Record], known: Sequence[Record]) -> str:
    """Markdown: the learned schedule, without a search, against methods searched in each cell."""
    columns = {}
    for stage in (TEST, ADVISED):
        own = (r for r in records if r["stage"] == stage and r["method"] == LEARNED)
        columns[stage] = _margins({record["cell"]: record for record in own}, known)
    rows = [
        ["against, searched in each cell", f"margin of {LEARNED}, as tuned", "at the advised rate"]
    ]
    for name in dict.fromkeys(name for column in columns.values() for name in column):
        rows.append([name, *(column.get(name, "") for column in columns.values())])
    return markdown(rows)


def _margins(own: Mapping[str, Record], known: Sequence[Record]) -> dict[str, str]:
    """By how much records, one a cell, are ahead of what was searched there."""
    cells: dict[str, dict[str, Record]] = {
        cell: {LEARNED: {**record, "role": LEARNED}} for cell, record in own.items()
    }
    for record in known:
        if record["cell"] in cells and record["role"] == HAND_CODED:
            cells[record["cell"]][record["method"]] = record
    margins = {}
    curve = search_curve(cells)
    for m in doublings(curve):
        ahead = Interval(-curve[m].mean, -curve[m].high, -curve[m].low)
        margins[f"the best of {m} hand-coded methods"] = ahead.text("+")
    searched = {r["cell"]: r for r in known if r["method"] == LEARNED}
    rivals = {
        "the best of each cell on test data, which nobody can know": {
            cell: rival for cell, methods in cells.items() if (rival := best(methods))
        },
        f"{LEARNED}, its learning rate searched": searched,
    }
    for name, found in rivals.items():
        pairs = {cell: (own[cell], rival) for cell, rival in found.items() if cell in own}
        if pairs:
            margins[name] = compare(pairs).interval.text("+")
    return margins


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    from learnsched.pretrained import load_pretrained

    parser = command_line(
        __doc__,
        quick="grid quick, few trials and methods",
        json=GOES_ON,
        seed="of the search",
        artefact=True,
    )
    carried.add_known(parser)
    parser.add_argument("--grid", choices=GRIDS, default="medium", help="of the accuracy benchmark")
    parser.add_argument("--cells", nargs="+", metavar="NAME", help="all of the grid if omitted")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="by name; all if omitted")
    parser.add_argument(
        "--search",
        nargs=2,
        type=int,
        metavar=("ROUNDS", "TRIALS"),
        default=(_BUDGET.rounds, _BUDGET.trials),
        help="rounds of each method's search, and trials of a round",
    )
    add_advised(parser)
    options = parser.parse_args(arguments)
    learned = load_pretrained(options.artefact)
    advised = advice(options.advised)
    rounds, trials = options.search
    whole = replace(_BUDGET, rounds=rounds, trials=trials)
    budget, grid, count = (_QUICK, "quick", 1) if options.quick else (whole, options.grid, None)
    cells = GRIDS[grid].chosen(options.cells)
    names = options.methods or [*(m.name for m in _own(learned)), *RIVALS[:count]]
    methods = {
        (str(regime), method.name): (regime, method)
        for regime in dict.fromkeys(Regime.of(cell.task) for cell in cells)
        for method in compared(learned, regime.bits, names)
    }

    def recipe(job: tuple[Regime, Method]) -> list[dict[str, Any]]:
        regime, method = job
        found = tuned(method, practice(regime)[:count], budget, options.seed)
        return [{"stage": RECIPE, "regime": str(regime), **found, "commit": describe()["commit"]}]

    def test(job: tuple[str, Cell, Method, Record]) -> list[dict[str, Any]]:
        stage, cell, method, found = job
        made = measured(method, found, cell, budget.runs)
        return [{"stage": stage, **made, "commit": describe()["commit"]}]

    def key(record: Record) -> tuple[str, str, str]:
        return (record["stage"], record.get("regime") or record["cell"], record["method"])

    def progress(record: dict[str, Any]) -> None:
        place, name = key(record)[1:]
        score = record["validation"] if record["stage"] == RECIPE else mean(record)
        print(f"{record['stage']}, {place}, {name}: {100 * score:.1f}", flush=True)

    content = {
        "progress": progress,
        "seed": options.seed,
        "search": [budget.rounds, budget.trials],
        "quick": options.quick,
    }
    with one_of_the_ranks():
        jobs = {(RECIPE, *names): job for names, job in methods.items()}
        records = recorded(options.json, jobs, recipe, key, **content)
        recipes = {key(record): record for record in records}
        tests = {
            (stage, cell.name, name): (
                stage, cell, method, {**recipes[RECIPE, regime, name], **rates.get(regime, {})}
            )
            for stage, rates in (
                (TEST, {}),
                (ADVISED, {regime: {"learning_rate": rate} for regime, rate in advised.items()}),
            )
            for cell in cells
            for (regime, name), (_, method) in methods.items()
            if regime == str(Regime.of(cell.task))
        }  # fmt: skip
        records = recorded(options.json, tests, test, key, **content)
        if processes.rank() == 0:
            for stage in (TEST, ADVISED):
                print(f"\n{stage}:\n\n{table(records, cells, stage=stage)}")
            print(f"\n{without_search(records, read(options.known))}")


if __name__ == "__main__":
    main()
