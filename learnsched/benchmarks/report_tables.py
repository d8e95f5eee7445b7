"""Tables of an accuracy benchmark in Markdown, from its records by cell and method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from learnsched.benchmarks.records import (
    FLOAT,
    HAND_CODED,
    LEARNED,
    PARAMETRIC,
    RELAXED,
    START,
)
from learnsched.benchmarks.statistics import (
    Cells,
    at_equal_rates,
    best,
    compare,
    difference,
    doublings,
    gap_closed,
    importances,
    mean,
    search_curve,
    share_to_match,
)
from learnsched.intervals import interval
from learnsched.policies.annealing_grid import PUBLISHED_STD
from learnsched.tables import markdown

# What the papers claim, each as one method against another.
CLAIMS = (
    ("INQ: largest weights first, against a random order", "INQ, magnitude", "INQ, random"),
    ("INQ: settled weights first, against largest first", "INQ, settled", "INQ, magnitude"),
    ("INQ: restarted learning rate, against a cosine", "INQ, settled, restarts", "INQ, settled"),
    ("RPR: re-drawn, against a fixed random order", "RPR", "INQ, random"),
    ("XNOR-Net: filter scales, against BinaryConnect's constant", "XNOR-Net", "BinaryConnect"),
    ("BWN: filter scales, against BinaryConnect's constant", "BWN", "BinaryConnect"),
    ("TWN: one scale a layer, against one a filter", "TWN", "STE, uniform"),
    ("ANA: noise that vanishes, against straight-through", "ANA, normal", "straight-through"),
    ("ANA: normal, against uniform noise", "ANA, normal", "ANA, uniform"),
    *(
        (
            f"ANA: a tuned backward width, against the 2022 grid: {noise}",
            f"ANA, {noise}", f"ANA 2022, {noise}",
        )
        for noise in PUBLISHED_STD
    ),
    ("STE: a backward width that moves, against a constant", "STE, moving", "straight-through"),
    ("XNOR-Net: input scales, against none", "XNOR-Net, input scales", "XNOR-Net"),
    ("RQ: expectation, against hard samples (RQ ST)", "RQ", "RQ ST"),
    ("RQ: expectation, against concrete samples", "RQ, learned", "RQ, concrete"),
    ("RQ: noise and scales learned, against a schedule", "RQ, learned", "RQ"),
    ("LSQ: learned scales, against fixed ones", "LSQ", "STE, uniform"),
    ("PARQ: torchao's optimizer, against the closed form", "PARQ (torchao)", "PARQ"),
    ("A warm-up, against the cosine alone: ANA, normal", "ANA, normal, warm-up", "ANA, normal"),
    ("The same: ANA, triangular", "ANA, triangular, warm-up", "ANA, triangular"),
    ("The same: ANA, uniform", "ANA, uniform, warm-up", "ANA, uniform"),
    ("The same: straight-through, moving", "STE, moving, warm-up", "STE, moving"),
)  # fmt: skip


def names(cells: Cells) -> list[str]:
    """All methods, those of the best mean margin to the best hand-coded method of a cell first."""
    roles = {name: r["role"] for rows in cells.values() for name, r in rows.items()}
    order = (FLOAT, RELAXED, LEARNED, START, PARAMETRIC)

    def key(name: str) -> tuple[int, float]:
        place = order.index(roles[name]) if roles[name] in order else len(order)
        return place, -float(np.mean(list(margins(cells, name).values()) or [-np.inf]))

    return sorted(roles, key=key)


def learned_names(cells: Cells) -> list[str]:
    """The learned methods, in the order of :func:`names`."""
    return [
        n for n in names(cells) if any(r.get(n, {}).get("role") == LEARNED for r in cells.values())
    ]


def margins(cells: Cells, name: str) -> dict[str, float]:
    """Mean test accuracy less that of the cell's best hand-coded method, which itself has 0."""
    found = {}
    for cell, rows in cells.items():
        rival = best(rows)
        if name in rows and rival is not None:
            found[cell] = mean(rows[name]) - mean(rival)
    return found


def accuracy_table(cells: Cells) -> str:
    """Test accuracy in % of every method in every cell, with intervals; the best hand-coded bold."""
    rows = [["method", *(str(i + 1) for i in range(len(cells)))]]
    for name in names(cells):
        row = [name]
        for methods in cells.values():
            text = interval(methods[name]["test"]).text() if name in methods else ""
            winner = best(methods)
            bold = winner is not None and winner["method"] == name
            row.append(f"**{text}**" if bold else text)
        rows.append(row)
    legend = [
        f"{i + 1}. {cell}: {next(iter(rows.values()))['description']}"
        for i, (cell, rows) in enumerate(cells.items())
    ]
    return markdown(rows) + "\n\n" + "\n".join(legend)


def method_table(cells: Cells) -> str:
    """How each method does over all cells: margin to the best hand-coded, rank, cost."""
    ranks: dict[str, list[int]] = {}
    for rows in cells.values():
        ranked = sorted(
            (r for r in rows.values() if r["role"] == HAND_CODED), key=mean, reverse=True
        )
        for place, record in enumerate(ranked):
            ranks.setdefault(record["method"], []).append(place + 1)
    table = [
        [
            "method",
            "cells",
            "margin to the cell's best / points",
            "mean rank",
            "firsts",
            "learned ahead in",
            "CPU s",
        ]
    ]
    for name in names(cells):
        records = [rows[name] for rows in cells.values() if name in rows]
        values = list(margins(cells, name).values())
        rank = ranks.get(name, [])
        table.append([
            name,
            str(len(records)),
            interval(values).text("+") if values else "",
            f"{np.mean(rank):.1f}" if rank else "",
            str(sum(place == 1 for place in rank)) if rank else "",
            _behind_learned(cells, name),
            f"{np.mean([r['cpu_seconds'] for r in records]):.0f}",
        ])  # fmt: skip
    return markdown(table)


def _behind_learned(cells: Cells, name: str) -> str:
    """In how many of the cells that have both, the learned method has the better mean."""
    ahead = [
        mean(learned) > mean(rows[name])
        for rows in cells.values()
        if name in rows and (learned := best(rows, LEARNED)) and learned["method"] != name
    ]
    return f"{sum(ahead)} of {len(ahead)}" if ahead else ""


def learned_table(cells: Cells, name: str) -> str:
    """A learned method against the best hand-coded one, cell by cell."""
    head = ["cell", "best hand-coded", "its accuracy", name, "margin / points", "relaxed", "float"]
    table = [[*head, "gap closed", "share of epochs to match"]]
    for cell, rows in cells.items():
        rival = best(rows)
        if name not in rows or rival is None:
            continue
        others = [best(rows, role) for role in (RELAXED, FLOAT)]
        gap, share = gap_closed(rows, name), share_to_match(rows, name)
        table.append([
            cell,
            rival["method"],
            interval(rival["test"]).text(),
            interval(rows[name]["test"]).text(),
            interval(difference(rows[name], rival)).text("+"),
            *("" if r is None else f"{100 * mean(r):.1f}" for r in others),
            "" if gap is None else f"{100 * gap:.0f} %",
            "" if share is None else "not reached" if np.isinf(share) else f"{share:.2g}",
        ])  # fmt: skip
    return markdown(table)


def rates_line(cells: Cells, name: str) -> str:
    """The learning rates that a method was given in its search, over the cells."""
    rates = [rows[name]["learning_rate"] for rows in cells.values() if name in rows]
    return (
        f"Its learning rates, the best of each cell's search: {np.median(rates):.2g} in the median, "
        f"from {min(rates):.2g} to {max(rates):.2g}."
    )


def claims_table(cells: Cells) -> str:
    """Each claim of a paper as a margin over the cells that have both methods."""
    table = [["claim", "cells", "ahead in", "mean margin / points", "p (signed rank)"]]
    for text, first, second in CLAIMS:
        pairs = {c: (r[first], r[second]) for c, r in cells.items() if first in r and second in r}
        if pairs:
            found = compare(pairs)
            table.append([
                text, str(len(pairs)), str(found.wins), found.interval.text("+"),
                f"{found.p_signed_rank:.3g}",
            ])  # fmt: skip
    return markdown(table)


def search_table(cells: Cells, name: str, trials: int) -> str:
    """What the best of 1, 2, 4, ... searched methods reaches, against a learned one."""
    curve = search_curve(cells, name)
    rows = [["methods searched", "runs", f"margin to {name} / points"]]
    rows += [[str(m), str(trials * m), curve[m].text("+")] for m in doublings(curve)]
    return markdown(rows)


def network_table(cells: Cells, name: str) -> str:
    """What a learned method's network is worth: against its start at equal rates, and on test data.

    Cells in which the network is not applied are left out.
    """
    table = [["cell", "rates", "validation, equal rates / points", "test / points"]]
    means = []
    for cell, rows in cells.items():
        start = best(rows, START)
        if name not in rows or start is None or rows[name]["trials"] == start["trials"]:
            continue
        validation, test = at_equal_rates(rows[name], start), difference(rows[name], start)
        means.append((validation.mean(), test.mean()))
        found = [interval(values).text("+") for values in (validation, test)]
        table.append([cell, str(len(validation)), *found])
    if means:
        table.append(
            ["mean", "", *(interval(column).text("+") for column in zip(*means, strict=True))]
        )
    return markdown(table)


def knobs(cells: Cells) -> dict[str, dict[str, float]]:
    """Functional ANOVA of each method that has parameters of its own, in the cells that have them all.

    Where activations are real, none of theirs is searched.
    """
    found = {}
    for name in names(cells):
        records = [rows[name] for rows in cells.values() if name in rows]
        if any(record["parameters"] for record in records):
            most = max(len(record["space"]) for record in records)
            shares = importances([r for r in records if len(r["space"]) == most])
            if shares:
                found[name] = shares
    return found


def knobs_table(shares: Mapping[str, Mapping[str, float]]) -> str:
    """Shares of the variance of validation accuracy, in %."""
    table = [["method", "share of the variance / %, largest first"]]
    for name, row in shares.items():
        table.append([name, ", ".join(f"{k} {100 * v:.0f}" for k, v in row.items())])
    return markdown(table)


def chosen_table(cells: Cells) -> str:
    """Learning rate and parameters of the best hand-coded method of each cell."""
    table = [["cell", "method", "learning rate", "parameters"]]
    for cell, rows in cells.items():
        winner = best(rows)
        if winner is not None:
            table.append([
                cell, winner["method"], f"{winner['learning_rate']:.3g}",
                ", ".join(f"{k} {_short(v)}" for k, v in winner["parameters"].items()),
            ])  # fmt: skip
    return markdown(table)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
