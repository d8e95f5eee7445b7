"""Should forward noise give way as the training loss falls? By task, regime and bits.

    torchrun --standalone --nproc-per-node 2 -m learnsched.benchmarks.follow_loss
                       [--bits BITS ...] [--quick] [--seed N] [--json PATH]

The base curve of the default schedule with several exponents of the relative training loss on its
forward std; 0 is a curve that sees no loss. The rest is the same, down to the seeds. Validation
accuracy, each at its best of three learning rates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from learnsched.benchmarks.curve_variants import Study
from learnsched.intervals import interval
from learnsched.policies import BaseCurve
from learnsched.schedule import RunInfo

POWERS = (0.0, 0.5, 1.0)


def variants(curve: BaseCurve) -> list[BaseCurve]:
    """One for each exponent, in runs of any length."""
    return [replace(curve, loss_power=power, loss_from=0.0) for power in POWERS]


def record(run: RunInfo, accuracies: list[list[float]]) -> dict[str, Any]:
    """The exponents and their accuracies."""
    return {"powers": list(POWERS), "accuracies": accuracies}


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


# Easy and hard data, short and long runs, of no seed of meta-training.
STUDY = Study(
    rows=(
        ("mnist1d", "mlp", 32, 4, 12, 20),
        ("digits", "cnn2d", 8, 5, 24, 32),
        ("noisy_digits", "cnn2d", 8, 5, 24, 32),
        ("mnist1d", "cnn1d", 16, 4, 12, 32),
        ("mnist1d", "cnn1d", 16, 4, 40, 32),
    ),
    regimes=(False, True),
    seed=810_000,
    rates=(0.01, 0.02, 0.035),
    runs=16,
    variants=variants,
    record=record,
    table=table,
)

if __name__ == "__main__":
    STUDY.main(__doc__)
