"""What the records of :mod:`learnsched.benchmarks.held_out` say: tables, and the data of figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from learnsched.benchmarks.methods import hand_coded
from learnsched.intervals import confidence_interval
from learnsched.tables import markdown


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table: mean test accuracy in % with 95 % intervals; then the margins.

    Args:
        records: each with ``task``, ``cell``, ``method``, and ``test``, accuracies in [0, 1]. Methods
            have the same runs of a task.

    Example:
        >>> tests = {"learned": [0.75, 0.75], "ANA, normal": [0.5, 0.5]}
        >>> print(table([{"task": "digits", "cell": "digits mlp 2×4", "method": name, "test": test}
        ...              for name, test in tests.items()]))
        | method | digits |
        | --- | --- |
        | learned | 75.0 |
        | ANA, normal | 50.0 |
        | **learned − best hand-coded** | +25.0 |
        <BLANKLINE>
        - digits: digits mlp 2×4
    """
    tasks = list(dict.fromkeys(r["task"] for r in records))
    names = list(dict.fromkeys(r["method"] for r in records))
    found = {(r["task"], r["method"]): np.asarray(r["test"]) for r in records}
    networks = {r["task"]: r["cell"] for r in records}
    rows = [["method", *tasks]]
    for name in names:
        cells = (_interval(found[t, name]) if (t, name) in found else "" for t in tasks)
        rows.append([name, *cells])
    rivals = {
        "best hand-coded": [m.name for m in hand_coded() if m.name in names],
        "before meta-training": [n for n in names if n == "learned, before meta-training"],
    }
    legend = [f"- {task}: {networks[task]}" for task in tasks]
    for rival, candidates in rivals.items():
        if "learned" not in names or not candidates:
            continue
        row, means = [f"**learned − {rival}**"], []
        for task in tasks:
            theirs = [found[task, n] for n in candidates if (task, n) in found]
            if (task, "learned") not in found or not theirs:
                row.append("")
                continue
            margin = found[task, "learned"] - max(theirs, key=np.mean)
            means.append(100 * margin.mean())
            row.append(_interval(margin, sign="+"))
        rows.append(row)
        if len(means) > 1:
            legend.append(f"- learned − {rival}, mean over tasks: {np.mean(means):+.1f}")
    return "\n".join([markdown(rows), "", *legend])


def by_task(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Test accuracies by task and method, as :func:`learnsched.plotting.plot_comparison` takes."""
    result: dict[str, dict[str, list[float]]] = {}
    for record in records:
        result.setdefault(record["task"], {})[record["method"]] = record["test"]
    return result


def summary(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean test accuracy in [0, 1] by task and method, to four digits.

    Example:
        >>> summary([{"task": "digits", "method": "RPR", "test": [0.5, 0.6]}])
        {'digits': {'RPR': 0.55}}
    """
    return {
        task: {name: round(float(np.mean(test)), 4) for name, test in row.items()}
        for task, row in by_task(records).items()
    }


def _interval(values: np.ndarray, sign: str = "") -> str:
    # Points come first, as in figures: means of shares, see Interval.text, may round to another digit.
    points = 100 * values
    mean = points.mean()
    low, high = confidence_interval(points)
    if low == high:
        return f"{mean:{sign}.1f}"
    return f"{mean:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"
