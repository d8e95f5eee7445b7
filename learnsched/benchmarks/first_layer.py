"""Is it worth freezing the first layer at once? By its fan-in, regime and bits.

    torchrun --standalone --nproc-per-node 2 -m learnsched.benchmarks.first_layer
                       [--bits BITS ...] [--quick] [--seed N] [--json PATH]

The base curve of the default schedule trains networks with the weights of their first layer free, and
with all of them frozen from the first epoch on; the rest is the same, down to the seeds. Validation
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
from learnsched.tables import markdown

_ANY = 1e9


class FirstLayer:
    """A comparison: first layers free, and frozen whatever their fan-in."""

    def variants(self, curve: BaseCurve) -> list[BaseCurve]:
        """First layers free, and frozen whatever their fan-in."""
        return [replace(curve, frozen_fan_in=fan_in) for fan_in in (0.0, _ANY)]

    def record(self, run: RunInfo, accuracies: list[list[float]]) -> dict[str, Any]:
        """The first layer's fan-in and the accuracies, ``free`` and ``frozen``."""
        free, frozen = accuracies
        return {"fan_in": run.layers[0].fan_in, "free": free, "frozen": frozen}

    def table(self, records: Sequence[dict[str, Any]]) -> str:
        """Markdown: points gained by freezing the first layer, tasks × bits."""
        columns = list(dict.fromkeys(record["bits"] for record in records))
        rows: dict[tuple[str, int], dict[str, str]] = {}
        for record in records:
            name = record["task"].replace(f", {record['bits']}", "")
            gain = interval(np.asarray(record["frozen"]) - np.asarray(record["free"]))
            rows.setdefault((name, record["fan_in"]), {})[record["bits"]] = gain.text("+")
        cells = [
            [name, str(fan_in), *(gains.get(c, "") for c in columns)]
            for (name, fan_in), gains in rows.items()
        ]
        return markdown([["task", "fan-in", *columns], *cells])


# Fan-ins of 5, 9, 40 and 64, of no seed of meta-training.
STUDY = Study(
    rows=(
        ("mnist1d", "cnn1d", 12, 5, 10, 25),
        ("mnist1d", "cnn1d", 16, 4, 12, 32),
        ("noisy_digits", "cnn2d", 8, 4, 8, 20),
        ("mnist1d", "mlp", 32, 4, 12, 20),
        ("noisy_digits", "mlp", 32, 4, 12, 20),
    ),
    regimes=(True, False),
    seed=800_000,
    rates=(0.012, 0.022, 0.04),
    runs=24,
    comparison=FirstLayer(),
    quick=3,
)

if __name__ == "__main__":
    STUDY.main(__doc__)
