"""After how many networks has meta-training paid? Its price and a search's, in training runs.

    python -m learnsched.benchmarks.payback [--figures figures] [--runs FOLDER ...]

Reads what other programs measured: ``curve_search.json`` (runs behind the base curves), the folders of
meta-training runs (task mix and log; all that are shipped), ``gradient.json`` (what a run under
differentiation costs, in ordinary ones) and ``methods.jsonl`` (what a search for each new network
costs instead).
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from learnsched.benchmarks.gradient import BUDGET
from learnsched.benchmarks.records import HAND_CODED, LEARNED, read
from learnsched.benchmarks.statistics import Record, by_cell
from learnsched.meta.run_folder import read_log

# The estimator of preset standard, and one whose cost is that of ordinary runs.
_UNROLLED, _ORDINARY = "unrolled, damped by ½", "evolution, 8 pairs"
_STEPS = 150


@dataclass(frozen=True)
class Price:
    """What an artefact cost, in training runs of its small tasks.

    Attributes:
        curves: runs of the searches for the base curves.
        unrolled: runs that were differentiated.
        perturbed: runs of evolution strategies.
        validation: runs of validation.
        factor: ordinary runs that one unrolled run costs.
    """

    curves: int
    unrolled: int
    perturbed: int
    validation: int
    factor: float

    @property
    def total(self) -> float:
        """All of it in ordinary runs."""
        return self.curves + self.factor * self.unrolled + self.perturbed + self.validation


def price(
    curves: Mapping[str, Any],
    runs: Sequence[tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]],
    gradient: Sequence[Mapping[str, Any]],
) -> Price:
    """The price of meta-training.

    Args:
        curves: content of ``curve_search.json``.
        runs: content of each ``config.json``, and the log.
        gradient: rows of ``gradient.json``.

    Raises:
        ValueError: no row tells what an unrolled run costs.
    """
    unrolled = perturbed = validation = 0
    for config, log in runs:
        trainer, estimator = config["trainer"], config["estimator"]
        gradients = log[-1]["step"] * trainer["mix"]["tasks"] * trainer["mix"]["members"]
        if "Unrolled" in estimator:
            unrolled += gradients
        # That of Guarded was asked next to never under 2-bit activations.
        if pairs := re.match(r"(?:EvolutionStrategies|Hybrid).*?pairs=(\d+)", estimator):
            perturbed += gradients * (1 + 2 * int(pairs[1]))
        validated = sum("validation_error" in entry for entry in log)
        validation += validated * sum(len(t["learning_rates"]) for t in trainer["validation"])
    return Price(
        curves=sum(found["runs"] for found in curves.values() if "runs" in found),
        unrolled=unrolled,
        perturbed=perturbed,
        validation=validation,
        factor=unroll_factor(gradient),
    )


def unroll_factor(gradient: Sequence[Mapping[str, Any]]) -> float:
    """Time of an unrolled run over that of an ordinary one, both in populations.

    Raises:
        ValueError: no row of 150 steps has both.
    """
    for row in gradient:
        seconds = {found["estimator"]: found["seconds"] for found in row["estimators"]}
        if row["steps"] == _STEPS and {_UNROLLED, _ORDINARY} <= seconds.keys():
            # Evolution runs each network under its own schedule, and twice a pair.
            runs = 1 + 2 * BUDGET.pairs
            return float(seconds[_UNROLLED] / (seconds[_ORDINARY] / runs))
    raise ValueError(
        f"no row of {_STEPS} steps has the estimators {_UNROLLED!r} and {_ORDINARY!r}; run "
        f"python -m learnsched.benchmarks.gradient --steps {_STEPS} --json figures/gradient.json"
    )


def search_runs(records: Sequence[Record], role: str) -> float:
    """Runs that searching all methods of a role takes for one network, mean over cells with some."""
    counts = []
    for rows in by_cell(records).values():
        mine = [r for r in rows.values() if r["role"] == role]
        if mine:
            counts.append(sum(len(r["trials"]) * r["budget"]["trial_runs"] for r in mine))
    return fmean(counts)


def text(cost: Price, everything: float, ours: float) -> str:
    """The balance in words."""
    networks = math.ceil(cost.total / (everything - ours))
    return (
        f"Base curves: {cost.curves:,} runs. Meta-training: {cost.unrolled:,} unrolled runs, each as "
        f"long as {cost.factor:.1f} ordinary ones, {cost.perturbed:,} of evolution strategies, and "
        f"{cost.validation:,} of validation. In all {cost.total:,.0f} runs.\n"
        f"A search of every hand-coded method: {everything:.0f} runs for each network; of the learned "
        f"schedule's learning rate: {ours:.0f}.\n"
        f"Paid after {networks} networks."
    )


def _run(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Configuration and log of a run."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config, read_log(folder / "log.jsonl")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--figures", type=Path, default=Path("figures"), help="measured results")
    parser.add_argument("--runs", type=Path, nargs="+", help="folders of meta-training runs")
    options = parser.parse_args()
    shipped = [options.figures / name for name in ("default", "population")]
    shipped += sorted(options.figures.glob("meta_seeds/*"))
    cost = price(
        json.loads((options.figures / "curve_search.json").read_text()),
        [_run(folder) for folder in options.runs or shipped],
        json.loads((options.figures / "gradient.json").read_text())["rows"],
    )
    records = read(options.figures / "methods.jsonl")
    print(text(cost, search_runs(records, HAND_CODED), search_runs(records, LEARNED)))


if __name__ == "__main__":
    main()
