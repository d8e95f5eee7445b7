"""Does it hold where networks are trained in earnest? All of Fashion-MNIST, ten times the steps seen.

    torchrun --standalone --nproc-per-node 2 -m learnsched.benchmarks.full_size [--artefact default]
                                  [--known PATH] [--quick] [--seed N] [--json PATH]

A convolutional network on all 55,000 training images, 3,440 steps. Hand-coded methods come with what
a search found for them on 4,000 of those images (the accuracy benchmark's records), the learned
schedule as it is; the learning rate alone is chosen anew, on validation data.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from learnsched.benchmarks import methods as field
from learnsched.benchmarks.environment import describe, stored_records, write_results
from learnsched.benchmarks.methods import Method
from learnsched.benchmarks.rate_choice import measure
from learnsched.benchmarks.records import read
from learnsched.benchmarks.search import Budget
from learnsched.intervals import interval
from learnsched.meta import distribution
from learnsched.meta.tasks import Task
from learnsched.policies import LearnedPolicy
from learnsched.schedule import Policy
from learnsched.tables import markdown

TASK = Task("cnn2d", "fashion_mnist", 16, 5, 8, 430, 128, "ternary/2-bit", (0.01,), False, 277_000)
_QUICK_TASK = Task("cnn2d", "digits", 4, 3, 2, 3, 16, "ternary/2-bit", (0.01,), False, 277_000)
RATES = (0.004, 0.01, 0.025, 0.06)

# Where hand-coded methods were tuned; the best there on validation data, on test data, and the best
# over all of the grid.
TUNED_ON = "fashion-cnn-40-epochs"
RIVALS = ("ANA, uniform, warm-up", "STE, uniform", "ANA, normal, warm-up")

_BUDGET = Budget(rounds=1, trials=len(RATES), trial_runs=1, runs=3)


def compared(
    learned: LearnedPolicy, tuned: Sequence[Mapping[str, Any]]
) -> list[tuple[Method, Policy | None]]:
    """The learned schedule, its start, the rivals as they were tuned, and the relaxed network.

    Args:
        learned: the schedule.
        tuned: records of the accuracy benchmark.

    Raises:
        KeyError: a rival has no record in the cell that it is taken from.
    """
    from optuna.trial import FixedTrial

    found = {r["method"]: r["parameters"] for r in tuned if r["cell"] == TUNED_ON}
    methods = {method.name: method for method in field.hand_coded(TASK.bits)}
    carried = [methods[name] for name in RIVALS] + [field.upper_bound()]
    missing = [method.name for method in carried if method.name not in found]
    if missing:
        raise KeyError(
            f"no record of {', '.join(missing)} in {TUNED_ON}; make them with "
            f"python -m learnsched.benchmarks.accuracy, or take figures/methods.jsonl"
        )
    return [
        (field.learned(learned), None),
        (field.start_of(learned), None),
        *(
            (method, method.suggest(FixedTrial(found[method.name])))
            for method in carried
            if method.suggest is not None
        ),
    ]


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: test accuracy in %, the learned schedule's margin, validation accuracy by rate."""
    own = 100 * np.asarray(records[0]["test"])
    rates = [f"validation at {rate:g}" for rate in records[0]["rates"]]
    rows = [["method", "test accuracy", f"{records[0]['method']} − it", "rate", *rates]]
    for record in records:
        accuracy = 100 * np.asarray(record["test"])
        rows.append(
            [
                record["method"],
                f"{accuracy.mean():.1f}",
                interval((own - accuracy) / 100).text("+") if record is not records[0] else "",
                f"{record['learning_rate']:g}",
                *(f"{100 * value:.1f}" for value in record["validation"]),
            ]
        )
    return markdown(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    from learnsched.pretrained import load_pretrained

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--artefact", default="default", help="name or path of a learned schedule")
    parser.add_argument(
        "--known",
        type=Path,
        default=Path("figures/methods.jsonl"),
        help="records of the accuracy benchmark",
    )
    parser.add_argument("--quick", action="store_true", help="a small network on digits")
    parser.add_argument("--seed", type=int, default=0, help="added to the task's")
    parser.add_argument("--json", type=Path, help="write records here; an interrupted run goes on")
    options = parser.parse_args(arguments)
    distribution.start()
    torch.set_num_threads(1)  # the tensors are small: threads cost more than they bring
    task = _QUICK_TASK if options.quick else TASK
    task = replace(task, seed=task.seed + options.seed)
    records = stored_records(options.json)
    done = {record["method"] for record in records}
    rows = compared(load_pretrained(options.artefact), read(options.known))
    todo = [(method, policy) for method, policy in rows if method.name not in done]

    def work(row: tuple[Method, Policy | None]) -> dict[str, Any]:
        return measure(task, *row, RATES, _BUDGET) | {"commit": describe()["commit"]}

    for made in distribution.shared(todo, work):
        records += made
        if distribution.rank() == 0:
            last = records[-1]
            print(f"{last['method']}: {100 * np.mean(last['test']):.1f}", flush=True)
            write_results(options.json, {"seed": options.seed, "records": records})
    if distribution.rank() == 0:
        print(table(records))
    distribution.stop()


if __name__ == "__main__":
    main()
