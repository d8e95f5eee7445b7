"""Is it worth freezing the first layer at once? By its fan-in, regime and bits.

    torchrun --standalone --nproc-per-node 2 -m learnsched.benchmarks.first_layer
                       [--bits BITS ...] [--quick] [--seed N] [--json PATH]

The base curve of the default schedule trains networks with the weights of their first layer free, and
with all of them frozen from the first epoch on; the rest is the same, down to the seeds. Validation
accuracy, each at its best of three learning rates.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from learnsched.benchmarks.curve_search import at_best_rate
from learnsched.benchmarks.environment import stored_records, write_results
from learnsched.data import load
from learnsched.intervals import interval
from learnsched.meta import distribution
from learnsched.meta.presets import PRESETS
from learnsched.meta.tasks import Task

BITS = ("ternary/2-bit", "ternary/ternary", "binary/binary", "ternary/real")
_RATES = (0.012, 0.022, 0.04)
_RUNS = 24
_ANY = 1e9


def tasks(bits: str) -> tuple[Task, ...]:
    """Fan-ins of 5, 9, 40 and 64, in fine-tuning and from scratch, of no seed of meta-training."""
    rows = (
        ("mnist1d", "cnn1d", 12, 5, 10, 25),
        ("mnist1d", "cnn1d", 16, 4, 12, 32),
        ("noisy_digits", "cnn2d", 8, 4, 8, 20),
        ("mnist1d", "mlp", 32, 4, 12, 20),
        ("noisy_digits", "mlp", 32, 4, 12, 20),
    )
    return tuple(
        Task(family, data, width, depth, horizon, steps, 32, bits, (), fine_tuning, 800_000)
        for fine_tuning in (True, False)
        for data, family, width, depth, horizon, steps in rows
    )


def measure(task: Task, runs: int, seed: int) -> dict[str, Any]:
    """The accuracies of one task, ``free`` and ``frozen``, each a list over seeds."""
    data, task = load(task.data), replace(task, seed=task.seed + seed)
    run = replace(task, learning_rates=_RATES[:1]).build(data).run
    curve = PRESETS["standard"].base.nearest(run)
    compared = [replace(curve, frozen_fan_in=fan_in) for fan_in in (0.0, _ANY)]
    free, frozen = at_best_rate(task, data, compared, _RATES, runs).tolist()
    return {
        "task": task.name,
        "bits": task.bits,
        "fine_tuning": task.fine_tuning,
        "fan_in": run.layers[0].fan_in,
        "free": free,
        "frozen": frozen,
    }


def table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: points gained by freezing the first layer, tasks × bits."""
    columns = list(dict.fromkeys(record["bits"] for record in records))
    rows: dict[tuple[str, int], dict[str, str]] = {}
    for record in records:
        name = record["task"].replace(f", {record['bits']}", "")
        gain = interval(np.asarray(record["frozen"]) - np.asarray(record["free"]))
        rows.setdefault((name, record["fan_in"]), {})[record["bits"]] = gain.text("+")
    rule = "|" + " --- |" * (2 + len(columns))
    lines = ["| task | fan-in | " + " | ".join(columns) + " |", rule]
    for (name, fan_in), gains in rows.items():
        lines.append(
            f"| {name} | {fan_in} | " + " | ".join(gains.get(c, "") for c in columns) + " |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", nargs="*", choices=BITS, default=list(BITS))
    parser.add_argument("--quick", action="store_true", help="one task, two seeds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--json", type=Path, help="write records here; tasks that are there are kept"
    )
    options = parser.parse_args(arguments)
    distribution.start()
    torch.set_num_threads(1)  # the tensors are small: threads cost more than they bring
    records = stored_records(options.json)
    done = {record["task"] for record in records}
    todo = [task for bits in options.bits for task in tasks(bits) if task.name not in done]
    todo, runs = (todo[3:4], 2) if options.quick else (todo, _RUNS)
    for made in distribution.shared(todo, lambda task: measure(task, runs, options.seed)):
        records += made
        if distribution.rank() == 0:
            write_results(options.json, {"seed": options.seed, "records": records})
    if distribution.rank() == 0:
        print(table(records))
    distribution.stop()


if __name__ == "__main__":
    main()
