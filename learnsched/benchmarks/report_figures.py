"""Figures of an accuracy benchmark: margins, ranking, epochs and parameters."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from learnsched.benchmarks.records import FLOAT, LEARNED, PARAMETRIC, PEER, RELAXED, START
from learnsched.benchmarks.statistics import Cells, best, difference
from learnsched.figure_style import paper_style, save_figure
from learnsched.intervals import Interval, interval

# Marker, face and size of each role; told apart by shape and filling, not by colour.
_STYLES: dict[str, dict[str, Any]] = {
    LEARNED: {"marker": "o", "color": "black", "markersize": 5},
    START: {"marker": "o", "color": "black", "markerfacecolor": "white", "markersize": 5},
    PARAMETRIC: {"marker": "s", "color": "black", "markerfacecolor": "white"},
    PEER: {"marker": "D", "color": "black", "markerfacecolor": "0.75"},
    RELAXED: {"marker": "^", "color": "0.5", "markerfacecolor": "white"},
    FLOAT: {"marker": "x", "color": "0.5"},
}


def margins(cells: Cells, path: Path) -> None:
    """Each role's margin to the best hand-coded method, cell by cell, with intervals over seeds."""
    from matplotlib.figure import Figure

    with paper_style():
        figure = Figure(figsize=(7.0, 1.0 + 0.4 * len(cells)), layout="constrained")
        axes = figure.add_subplot()
        axes.axvline(0, color="black", linewidth=0.6)
        labels = []
        present = [role for role in _STYLES if any(best(rows, role) for rows in cells.values())]
        for place, (cell, rows) in enumerate(cells.items()):
            rival = best(rows)
            if rival is None:
                continue
            labels.append((place, f"{cell}\n({rival['method']})"))
            for index, role in enumerate(present):
                record, style = best(rows, role), _STYLES[role]
                if record is None:
                    continue
                found = interval(100 * difference(record, rival))
                y = place + 0.14 * (index - (len(present) - 1) / 2)
                axes.plot([found.low, found.high], [y, y], color=style["color"], linewidth=0.8)
                axes.plot([found.mean], [y], linestyle="none", label=role, **style)
        axes.set_yticks([p for p, _ in labels], [t for _, t in labels], linespacing=1.1)
        axes.set_ylim(len(cells) - 0.5, -0.5)
        axes.set_xlabel("test accuracy less that of the cell's best hand-coded method / points")
        figure.legend(*_unique(axes), loc="outside upper center", ncols=len(present))
        save_figure(figure, path)


def ranking(
    values: Mapping[str, Mapping[str, float]],
    path: Path,
    *,
    margin: str = "test accuracy less that of the cell's best hand-coded method",
    dot: str = "cell",
) -> None:
    """Margins of each method, a dot a cell and a bar at their mean.

    Args:
        values: from methods, in the order to draw, to the margin in each cell.
        path: file to write.
        margin: what it is, for the axis.
        dot: what one stands for.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import SymmetricalLogLocator

    with paper_style():
        figure = Figure(figsize=(7.0, 0.7 + 0.18 * len(values)), layout="constrained")
        axes = figure.add_subplot()
        axes.axvline(0, color="black", linewidth=0.6)
        for place, row in enumerate(values.values()):
            points = [100 * value for value in row.values()]
            if points:
                axes.plot(points, [place] * len(points), "o", color="0.55", markersize=2.5)
                mean = float(np.mean(points))
                axes.plot([mean, mean], [place - 0.35, place + 0.35], color="black", linewidth=2)
        axes.set_yticks(range(len(values)), list(values))
        axes.invert_yaxis()
        axes.set_xscale("symlog", linthresh=1.0, linscale=0.4)
        axes.xaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=1, subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel(f"{margin} / points\n(dot: a {dot}, bar: mean; logarithmic beyond ±1)")
        save_figure(figure, path)


def epochs(cells: Cells, path: Path) -> None:
    """Learned schedules on shorter runs, against the best hand-coded method on the whole horizon."""
    from matplotlib.figure import Figure

    lines = {}
    for cell, rows in cells.items():
        rival, learned = best(rows), best(rows, LEARNED)
        if rival is not None and learned is not None and learned["shorter"]:
            curve = {float(s): v for s, v in learned["shorter"].items()} | {1.0: learned["test"]}
            lines[cell] = {s: interval(100 * (np.asarray(v) - np.mean(rival["test"])))
                           for s, v in sorted(curve.items())}  # fmt: skip
    if not lines:
        return
    with paper_style():
        columns = min(4, len(lines))
        rows_count = math.ceil(len(lines) / columns)
        figure = Figure(figsize=(7.0, 0.5 + 1.35 * rows_count), layout="constrained")
        grid = figure.subplots(rows_count, columns, sharex=True, squeeze=False)
        for axes in grid.flat[len(lines) :]:
            axes.set_axis_off()
        for index, (axes, (cell, curve)) in enumerate(zip(grid.flat, lines.items(), strict=False)):
            shares = list(curve)
            axes.axhline(0, color="black", linewidth=0.6, linestyle="--")
            axes.plot(shares, [i.mean for i in curve.values()], "o-", color="black")
            for share, found in curve.items():
                axes.plot([share, share], [found.low, found.high], color="black", linewidth=0.8)
            axes.set_title(textwrap.fill(cell, 24), loc="left")
            axes.set_xticks([0.25, 0.5, 0.75, 1.0], ["¼", "½", "¾", "1"])
            if index + columns >= len(lines):
                axes.tick_params(labelbottom=True)  # the lowest of its column
        figure.supxlabel(
            "epochs of the learned schedule / epochs of the hand-coded one", size="medium"
        )
        figure.supylabel("learned − best hand-coded / points", size="medium")
        save_figure(figure, path)


def search_cost(curve: Mapping[int, Interval], trials: int, path: Path) -> None:
    """What the best of several searched methods reaches, over the runs that their searches take.

    Args:
        curve: from the number of methods to the margin, see :func:`statistics.search_curve`.
        trials: runs of one method's search.
        path: file to write.
    """
    from matplotlib.figure import Figure

    with paper_style():
        figure = Figure(figsize=(4.6, 2.6), layout="constrained")
        axes = figure.add_subplot()
        runs = [trials * count for count in curve]
        axes.fill_between(
            runs, [100 * i.low for i in curve.values()], [100 * i.high for i in curve.values()],
            color="0.85", linewidth=0,
        )  # fmt: skip
        axes.plot(
            runs, [100 * i.mean for i in curve.values()], color="black",
            label="best hand-coded method by validation",
        )  # fmt: skip
        axes.axhline(0, color="black", linewidth=0.6, linestyle="--")
        axes.plot(
            [trials], [0], linestyle="none", label="learned, its learning rate searched",
            **_STYLES[LEARNED],
        )  # fmt: skip
        axes.set_xscale("log")
        ticks = [trials * 2**k for k in range(len(curve).bit_length())]
        axes.set_xticks(ticks, [str(t) for t in ticks])
        axes.minorticks_off()
        axes.set_xlabel("runs of the search on one's own network")
        axes.set_ylabel("test accuracy less that of\nthe learned schedule / points")
        axes.legend(loc="lower right")
        save_figure(figure, path)


def parameters(shares: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Share of each parameter in the variance of validation accuracy, a row a method."""
    from matplotlib.figure import Figure

    totals: dict[str, float] = {}
    for row in shares.values():
        for name, share in row.items():
            totals[name] = totals.get(name, 0.0) + share
    order = sorted(totals, key=lambda name: -totals[name])
    table = np.full((len(shares), len(order)), np.nan)
    for i, row in enumerate(shares.values()):
        for name, share in row.items():
            table[i, order.index(name)] = 100 * share
    with paper_style():
        size = (2.4 + 0.33 * len(order), 1.6 + 0.2 * len(shares))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(table, cmap="Greys", vmin=0, vmax=100, aspect="auto")
        for (i, j), value in np.ndenumerate(table):
            if not np.isnan(value):
                ink = "white" if value > 55 else "black"
                axes.text(j, i, f"{value:.0f}", ha="center", va="center", color=ink, size=7)
        axes.set_yticks(range(len(shares)), list(shares))
        readable = [name.replace("_", " ") for name in order]
        axes.set_xticks(range(len(order)), readable, rotation=60, ha="right")
        figure.colorbar(image, ax=axes, label="share of the variance / %", shrink=0.8)
        save_figure(figure, path)


def _unique(axes: Any) -> tuple[list[Any], list[str]]:
    """Handles and labels of a legend, each label once."""
    handles, labels = axes.get_legend_handles_labels()
    found = dict(zip(labels, handles, strict=True))
    return list(found.values()), list(found)
