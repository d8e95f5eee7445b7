"""Should forward noise give way as the training loss falls? By task, regime and bits.

    torchrun --standalone --nproc-per-node 2 -m learnsched.benchmarks.follow_loss
                       [--bits BITS ...] [--quick] [--seed N] [--json PATH]

The base curve of the default schedule with several exponents of the relative training loss on its
forward std; 0 is a curve that sees no loss. The rest is the same, down to the seeds. Validation
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
POWERS = (0.0, 0.5, 1.0)
_RATES = (0.01, 0.02, 0.035)
_RUNS = 16


def tasks(bits: str) -> tuple[Task, ...]:
    """Easy and hard data, short and long runs, of no seed of meta-training."""
    rows = (
        ("mnist1d", "mlp", 32, 4, 12, 20),
        ("digits", "cnn2d", 8, 5, 24, 32),
        ("noisy_digits", "cnn2d", 8, 5, 24, 32),
        ("mnist1d", "cnn1d", 16, 4, 12, 32),
        ("mnist1d", "cnn1d", 16, 4, 40, 32),
    )
    return tuple(
        Task(family, data, width, depth, horizon, steps, 32, bits, (), fine_tuning, 810_000)
        for fine_tuning in (False, True)
        for data, family, width, depth, horizon, steps in rows
    )


def measure(task: Task, runs: int, seed: int) -> dict[str, Any]:
    """The accuracies of one task, a list over seeds for each exponent."""
    data, task = load(task.data), replace(task, seed=task.seed + seed)
    run = replace(task, learning_rates=_RATES[:1]).build(data).run
    curve = PRESETS["standard"].base.nearest(run)
    compared = [replace(curve, loss_power=power, loss_from=0.0) for power in POWERS]
    accuracies = at_best_rate(task, data, compared, _RATES, runs).tolist()
    return {
        "task": task.name,
        "bits": task.bits,
        "fine_tuning": task.fine_tuning,
        "powers": list(POWERS),
        "accuracies": accuracies,
    }


def gains(record: dict[str, Any]) -> np.ndarray:
    """What each exponent but the first gains, shape ``(exponents - 1, seeds)``."""
    accuracies = np.asarray(record["accuracies"])
    return accuracies[1:] - accuracies[0]


def table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: points gained on the curve that sees no loss; then their means by regime and bits."""
    lines = ["| task | without | " + " | ".join(f"exponent {p:g}" for p in POWERS[1:]) + " |"]
    lines.append("|" + " --- |" * (1 + len(POWERS)))
    groups: dict[str, list[np.ndarray]] = {}
    for record in records:
        found = gains(record)
        cells = " | ".join(interval(gain).text("+") for gain in found)
        without = 100 * np.mean(record["accuracies"][0])
        lines.append(f"| {record['task']} | {without:.1f} | {cells} |")
        regime = "fine-tuned" if record["fine_tuning"] else "from scratch"
        groups.setdefault(f"{record['bits']}, {regime}, mean", []).append(found.mean(1))
    for name, means in groups.items():
        cells = " | ".join(f"{100 * gain:+.1f}" for gain in np.mean(means, axis=0))
        lines.append(f"| {name} | | {cells} |")
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
    todo, runs = (todo[:1], 2) if options.quick else (todo, _RUNS)
    for made in distribution.shared(todo, lambda task: measure(task, runs, options.seed)):
        records += made
        if distribution.rank() == 0:
            write_results(options.json, {"seed": options.seed, "records": records})
    if distribution.rank() == 0:
        print(table(records))
    distribution.stop()


if __name__ == "__main__":
    main()
