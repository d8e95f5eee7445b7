"""What the records of the accuracy benchmark say: intervals, wins, gaps and importances."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np

from learnsched.benchmarks.records import HAND_CODED, LEARNED, RELAXED
from learnsched.intervals import Interval, interval

Record = Mapping[str, Any]
# By cell and method.
Cells = Mapping[str, Mapping[str, Record]]
Array = np.ndarray[Any, np.dtype[np.float64]]

# Where the relaxed network is less than this ahead, the share of the gap means nothing.
SMALLEST_GAP = 0.005


def by_cell(records: Sequence[Record]) -> dict[str, dict[str, Record]]:
    """Records by cell and method, in the order in which cells first appear."""
    result: dict[str, dict[str, Record]] = {}
    for record in records:
        result.setdefault(record["cell"], {})[record["method"]] = record
    return result


def mean(record: Record) -> float:
    """Mean test accuracy over the seeds."""
    return float(np.mean(record["test"]))


def best(rows: Mapping[str, Record], role: str = HAND_CODED) -> Record | None:
    """The record of a role with the best mean test accuracy; None if there is none.

    Chosen on test data, which favours the hand-coded methods: their best is the luckiest of many.
    """
    found = [r for r in rows.values() if r["role"] == role]
    return max(found, key=mean) if found else None


def best_validated(rows: Mapping[str, Record]) -> Record | None:
    """The hand-coded method with the best validation accuracy: what a user would have chosen."""
    found = [r for r in rows.values() if r["role"] == HAND_CODED]
    return max(found, key=lambda r: float(r["validation"])) if found else None


def difference(first: Record, second: Record) -> Array:
    """Test accuracies of the first minus those of the second, seed by seed.

    Raises:
        ValueError: the records have different numbers of seeds.
    """
    if len(first["test"]) != len(second["test"]):
        raise ValueError(
            f"{first['method']} and {second['method']} have {len(first['test'])} and "
            f"{len(second['test'])} seeds in {first['cell']}; run both with one grid"
        )
    result: Array = np.asarray(first["test"]) - np.asarray(second["test"])
    return result


def at_equal_rates(first: Record, second: Record) -> Array:
    """Validation accuracies of the first minus those of the second where both tried a learning rate.

    Methods of which nothing else is searched have the same first round of trials, of the same seeds:
    more pairs than the seeds of the final comparison are, and no luck with the chosen rate.

    Raises:
        ValueError: they have no learning rate in common.
    """
    found = [{t["learning_rate"]: t["validation"] for t in r["trials"]} for r in (first, second)]
    common = [rate for rate in found[0] if rate in found[1]]
    if not common:
        raise ValueError(
            f"{first['method']} and {second['method']} have no learning rate in common in "
            f"{first['cell']}; compare methods of which nothing else is searched, of one seed"
        )
    return np.asarray([found[0][rate] - found[1][rate] for rate in common])


@dataclass(frozen=True)
class Comparison:
    """One method against another over the cells that have both.

    Attributes:
        margins: mean difference of each cell, by its name.
        wins: cells with a positive mean difference.
        clear_wins: cells whose interval lies above 0.
        clear_losses: cells whose interval lies below 0.
        p_signed_rank: Wilcoxon's signed-rank test of the margins, two-sided; 1 for a single cell.
        p_sign: sign test of the wins, two-sided.
        interval: of the mean margin over cells.
    """

    margins: dict[str, float]
    wins: int
    clear_wins: int
    clear_losses: int
    p_signed_rank: float
    p_sign: float
    interval: Interval


def compare(pairs: Mapping[str, tuple[Record, Record]]) -> Comparison:
    """The first of each pair against the second, by the name of the cell.

    Raises:
        ValueError: there are no pairs, or the seeds of a pair differ.
    """
    from scipy.stats import binomtest, wilcoxon

    if not pairs:
        raise ValueError("a comparison needs at least one cell that has both methods")
    differences = {cell: difference(*pair) for cell, pair in pairs.items()}
    intervals = {cell: interval(d) for cell, d in differences.items()}
    margins = {cell: i.mean for cell, i in intervals.items()}
    values = np.asarray(list(margins.values()))
    wins, losses = int((values > 0).sum()), int((values < 0).sum())
    decided = wins + losses
    return Comparison(
        margins=margins,
        wins=wins,
        clear_wins=sum(i.low > 0 for i in intervals.values()),
        clear_losses=sum(i.high < 0 for i in intervals.values()),
        p_signed_rank=float(wilcoxon(values).pvalue) if decided > 1 else 1.0,
        p_sign=float(binomtest(wins, decided).pvalue) if decided else 1.0,
        interval=interval(values),
    )


def against_best(cells: Cells, method: str) -> Comparison | None:
    """A method against the best hand-coded one of each cell; None if no cell has both."""
    pairs = {}
    for cell, rows in cells.items():
        rival = best({name: r for name, r in rows.items() if name != method})
        if method in rows and rival is not None:
            pairs[cell] = (rows[method], rival)
    return compare(pairs) if pairs else None


def gap_closed(rows: Mapping[str, Record], method: str = LEARNED) -> float | None:
    """(method − best hand-coded) / (relaxed − best hand-coded); None without a gap to close."""
    rival, relaxed = best(rows), best(rows, RELAXED)
    if method not in rows or rival is None or relaxed is None:
        return None
    gap = mean(relaxed) - mean(rival)
    return (mean(rows[method]) - mean(rival)) / gap if gap >= SMALLEST_GAP else None


def overall_gap_closed(cells: Cells, method: str = LEARNED) -> float | None:
    """The ratio of the sums over all cells that have the three methods: no cell's gap is too small."""
    closed, gap = 0.0, 0.0
    for rows in cells.values():
        rival, relaxed = best(rows), best(rows, RELAXED)
        if method in rows and rival is not None and relaxed is not None:
            closed += mean(rows[method]) - mean(rival)
            gap += mean(relaxed) - mean(rival)
    return closed / gap if gap > 0 else None


def share_to_match(rows: Mapping[str, Record], method: str = LEARNED) -> float | None:
    """The smallest measured share of the horizon at which a method reaches the best hand-coded one.

    Returns:
        1 if only the whole horizon does, infinity if that does not either, None if not measured.
    """
    rival = best(rows)
    if method not in rows or rival is None or not rows[method].get("shorter"):
        return None
    measured = {float(share): values for share, values in rows[method]["shorter"].items()}
    measured[1.0] = rows[method]["test"]
    reached = [share for share, values in measured.items() if np.mean(values) >= mean(rival)]
    return min(reached, default=np.inf)


def search_curve(cells: Cells, method: str = LEARNED) -> dict[int, Interval]:
    """What searching among hand-coded methods gets one, against a method that is not chosen.

    Of ``m`` methods, drawn at random and each searched with its trials, one keeps the method of best
    validation accuracy; its expected test accuracy over all draws has a closed form.

    Args:
        cells: records by cell and method.
        method: what is compared.

    Returns:
        from every ``m`` that all cells have, to the interval over cells of the margin, in accuracy:
        the kept method less ``method``.
    """
    margins: list[Array] = []
    for rows in cells.values():
        rivals = [r for r in rows.values() if r["role"] == HAND_CODED]
        if method not in rows or not rivals:
            continue
        ordered = sorted(rivals, key=lambda r: float(r["validation"]), reverse=True)
        tests, count = np.asarray([mean(r) for r in ordered]), len(ordered)
        # The j-th best is kept if it is drawn and the others come from those after it.
        chances = [
            [comb(count - 1 - j, m - 1) / comb(count, m) for j in range(count)]
            for m in range(1, count + 1)
        ]
        margins.append(np.asarray(chances) @ tests - mean(rows[method]))
    shortest = min(map(len, margins), default=0)
    return {m + 1: interval(np.asarray([row[m] for row in margins])) for m in range(shortest)}


def doublings(curve: Mapping[int, Interval]) -> list[int]:
    """Of the numbers of methods of :func:`search_curve`, 1, 2, 4, ... and the last.

    Example:
        >>> doublings(dict.fromkeys(range(1, 7), Interval(0.0, 0.0, 0.0)))
        [1, 2, 4, 6]
    """
    return [m for m in curve if m & (m - 1) == 0 or m == len(curve)]


def _union(one: Any, other: Any) -> Any:
    """The range that holds two, if they are intervals; the first one else."""
    from optuna.distributions import FloatDistribution

    if not (isinstance(one, FloatDistribution) and isinstance(other, FloatDistribution)):
        return one
    return FloatDistribution(min(one.low, other.low), max(one.high, other.high), log=one.log)


def importances(records: Sequence[Record]) -> dict[str, float]:
    """Functional ANOVA of a method's searches: the share of each parameter in the variance.

    Trials of all cells are taken together, each cell's validation accuracies shifted and scaled to
    mean 0 and deviation 1 first, so that cells do not explain the variance. Where ranges differ between
    cells, theirs is the one that holds them all.

    Args:
        records: of one method.

    Returns:
        shares that sum to 1, largest first; empty if there is nothing to explain.
    """
    import optuna
    from optuna.distributions import json_to_distribution

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    spaces = [
        {name: json_to_distribution(json.dumps(d)) for name, d in record["space"].items()}
        for record in records
    ]
    # Optuna leaves out what has another range in some of the trials.
    wide: dict[str, Any] = {}
    for name, found_range in (item for space in spaces for item in space.items()):
        wide[name] = _union(wide.get(name, found_range), found_range)
    for record, space in zip(records, spaces, strict=True):
        values = np.asarray([trial["validation"] for trial in record["trials"]])
        if values.size < 2 or values.std() == 0:
            continue
        for trial, value in zip(
            record["trials"], (values - values.mean()) / values.std(), strict=True
        ):
            params = {name: trial[name] for name in space if name in trial}
            ranges = {name: wide[name] for name in params}
            study.add_trial(
                optuna.trial.create_trial(params=params, distributions=ranges, value=float(value))
            )
    if len(study.trials) < 4:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=32, seed=0)
    found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return dict(sorted(found.items(), key=lambda item: -item[1]))
