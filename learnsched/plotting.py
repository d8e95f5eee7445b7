"""Figures of schedules and of comparisons, fit for a paper and for gray-scale print.

Only objects of ``matplotlib.figure`` are used, never ``pyplot``: no window, no backend and no
setting of the caller is touched.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from learnsched.figure_style import DASHES, MARKERS, paper_style, save_figure
from learnsched.intervals import confidence_interval
from learnsched.schedule import FIELDS, Schedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

# Quantity and unit of each field of a setting, weights and activations side by side.
_LABELS = {
    "weight_forward_std": ("forward std, weights", "level steps"),
    "activation_forward_std": ("forward std, activations", "level steps"),
    "weight_backward_std": ("backward std, weights", "level steps"),
    "activation_backward_std": ("backward std, activations", "level steps"),
    "weight_forward_mean": ("forward mean, weights", "level steps"),
    "activation_forward_mean": ("forward mean, activations", "level steps"),
    "fraction": ("INQ fraction", "share of weights"),
}
_MOST_LINES = 8


def plot_schedule(
    schedule: Schedule, path: str | os.PathLike[str] | None = None, *, title: str | None = None
) -> Figure:
    """A panel for each output of a schedule that is not zero throughout, over epochs.

    Up to 8 layers are lines; more are the rows of a heat map, the input on top.

    Args:
        schedule: what to draw.
        path: file to write, in the format of its suffix (PNG without one); None writes none.
        title: of the whole figure.

    Raises:
        TypeError: ``schedule`` is not a :class:`~learnsched.schedule.Schedule`.
        ValueError: the schedule is empty or not finite.
        FileNotFoundError: the folder of ``path`` does not exist.
        ImportError: matplotlib is missing.

    Example:
        >>> from learnsched.policies import StraightThrough
        >>> from learnsched.schedule import LayerInfo, RunInfo, plan
        >>> run = RunInfo((LayerInfo("fc", 10, 3, 4),), horizon=3)
        >>> len(plot_schedule(plan(StraightThrough(), run)).axes)
        3
    """
    if not isinstance(schedule, Schedule):
        raise TypeError(
            f"plot_schedule draws a Schedule, got {type(schedule).__name__}; learnsched.plan makes the "
            "schedule of a policy, and a scheduler's history has one: history.plot()"
        )
    table = schedule.table.detach().cpu().double().numpy()
    if not table.size:
        raise ValueError(f"nothing to draw in a schedule of shape {table.shape}")
    if not np.isfinite(table).all():
        raise ValueError("a schedule must be finite to be drawn, but it holds nan or infinity")
    values = {name: table[..., FIELDS.index(name)] for name in _LABELS}
    # a schedule of zeros still deserves a figure
    shown = {n: v for n, v in values.items() if v.any()} or {"fraction": values["fraction"]}
    with paper_style():
        draw = _draw_lines if len(schedule.layers) <= _MOST_LINES else _draw_heat_maps
        figure = draw(shown, schedule.layers)
        if title is not None:
            figure.suptitle(title)
        save_figure(figure, path)
    return figure


def plot_comparison(
    results: Mapping[str, Mapping[str, ArrayLike]],
    path: str | os.PathLike[str] | None = None,
    *,
    metric: str = "test accuracy",
    baseline: str | None = None,
) -> Figure:
    """Mean and 95 % interval of each method, a panel for each task.

    Panels have ranges of their own; the numbers to their right are the means. A method with one
    run has no interval.

    Args:
        results: task -> method -> accuracy of each run, in [0, 1]; methods are drawn in the order
            in which they first appear.
        path: file to write, in the format of its suffix (PNG without one); None writes none.
        metric: what the accuracies are, for the axis.
        baseline: method whose mean is drawn through each panel as a dashed line.

    Raises:
        TypeError: a task has no mapping from method to accuracies.
        ValueError: there are no results, an accuracy is not finite or out of range, or no task
            has the baseline.
        FileNotFoundError: the folder of ``path`` does not exist.
        ImportError: matplotlib is missing.

    Example:
        >>> figure = plot_comparison({"digits": {"STE": [0.81, 0.83], "learned": [0.86, 0.85]}})
        >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ['STE', 'learned']
    """
    for task, methods in results.items():
        if not isinstance(methods, Mapping):
            raise TypeError(
                "results go from task to method to accuracies, as in "
                f"{{'digits': {{'STE': [0.81, 0.83]}}}}; {task!r} has {type(methods).__name__}"
            )
    runs = {
        task: {method: _accuracies(task, method, values) for method, values in methods.items()}
        for task, methods in results.items()
    }
    names = list(dict.fromkeys(method for methods in runs.values() for method in methods))
    if not names or not all(runs.values()):
        empty = [task for task, methods in runs.items() if not methods]
        raise ValueError(
            f"no results{' of ' + ', '.join(empty) if empty else ''} to compare; "
            "expected task -> method -> accuracies"
        )
    if baseline is not None and baseline not in names:
        raise ValueError(f"no results of the baseline {baseline!r}; there are {', '.join(names)}")
    columns = 2 if len(runs) in (2, 4) else min(len(runs), 3)
    titles = [textwrap.fill(task, min(50, 90 // columns)) for task in runs]
    further_lines = [title.count("\n") for title in titles]
    rows = -(-len(runs) // columns)
    wrapped = sum(max(further_lines[row * columns : (row + 1) * columns]) for row in range(rows))
    with paper_style():
        height = 0.3 + rows * (0.45 + 0.17 * len(names)) + 0.17 * wrapped
        figure = _figure(columns, height=height)
        for i, methods in enumerate(runs.values()):
            panel = figure.add_subplot(rows, columns, i + 1)
            _draw_methods(panel, methods, names, baseline)
            panel.set_title(titles[i], loc="left")
            if i % columns:
                panel.set_yticklabels([])
        note = "" if baseline is None else f" (dashed: {baseline})"
        figure.supxlabel(f"{metric} / %{note}", size="medium")
        save_figure(figure, path)
    return figure


def plot_learning_curve(
    log: Sequence[Mapping[str, float]],
    path: str | os.PathLike[str] | None = None,
    *,
    unit: str = "nats",
) -> Figure:
    """Outer loss, validation error and gradient norms of meta-training over its outer steps.

    Args:
        log: entries of :attr:`learnsched.meta.trainer.MetaTrainer.log`.
        path: file to write, in the format of its suffix (PNG without one); None writes none.
        unit: of what the estimator descends: nats, or errors where that is their share.

    Raises:
        ValueError: the log is empty.
        FileNotFoundError: the folder of ``path`` does not exist.
        ImportError: matplotlib is missing.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "curve.png"
        >>> entry = {"step": 1, "outer_loss": 2.0, "norm_median": 0.1, "norm_largest": 0.4}
        >>> _ = plot_learning_curve([entry], path)
        >>> path.exists()
        True
    """
    if not log:
        raise ValueError("the log is empty; meta-training has taken no outer step yet")
    taken = [entry for entry in log if "outer_loss" in entry]
    steps = np.array([entry["step"] for entry in taken])
    checks = [entry for entry in log if "validation_error" in entry]
    with paper_style():
        figure = _figure(3, height=2.4)
        losses, errors, norms = figure.subplots(1, 3)
        losses.plot(steps, [e["outer_loss"] for e in taken], ".", color="0.6")
        losses.set(title="sampled tasks", ylabel=f"outer loss, hard network / {unit}")
        errors.plot(
            [e["step"] for e in checks],
            [100 * e["validation_error"] for e in checks],
            "o-",
            color="black",
            markerfacecolor="white",
        )
        errors.set(title="validation tasks", ylabel="error of the hard network / %")
        for name, style in (("norm_median", "o"), ("norm_largest", "^")):
            values = [e[name] if np.isfinite(e[name]) else np.nan for e in taken]
            label = name.removeprefix("norm_")
            norms.semilogy(steps, values, style, color="0.4", markerfacecolor="white", label=label)
        norms.set_ylabel(f"norm of the gradient / {unit}")
        norms.yaxis.set_major_formatter("{x:g}")  # the style writes no mathematics
        norms.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)  # off the points
        for panel in (losses, errors, norms):
            panel.set_xlabel("outer step")
        save_figure(figure, path)
    return figure


def _accuracies(task: str, method: str, values: ArrayLike) -> np.ndarray[Any, Any]:
    """In per cent."""
    runs = np.asarray(values, dtype=np.float64)
    if runs.ndim != 1 or not runs.size:
        raise ValueError(
            f"{method} on {task} needs a sequence of one accuracy a run, got shape {runs.shape}"
        )
    if not (np.isfinite(runs) & (runs >= 0) & (runs <= 1)).all():
        raise ValueError(
            f"accuracies of {method} on {task} must lie in [0, 1], got {runs.tolist()}"
        )
    return 100 * runs


def _draw_methods(
    panel: Axes,
    methods: Mapping[str, np.ndarray[Any, Any]],
    names: Sequence[str],
    baseline: str | None,
) -> None:
    from matplotlib.ticker import MaxNLocator

    for row, name in enumerate(names):
        if name not in methods:
            continue
        runs = methods[name]
        if len(runs) > 1:
            panel.plot(confidence_interval(runs), (row, row), color="black")
        fill = ("white", "black", "0.6")[row % 3]
        marker = MARKERS[row % len(MARKERS)]
        panel.plot(runs.mean(), row, marker, color="black", markerfacecolor=fill)
        panel.annotate(
            f"{runs.mean():.1f}",
            (1, row),
            xycoords=panel.get_yaxis_transform(),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            size="small",
        )
    if baseline is not None and baseline in methods:
        panel.axvline(methods[baseline].mean(), color="0.4", ls="--", lw=0.7, zorder=0)
    panel.set_yticks(range(len(names)), names)
    panel.set_ylim(len(names) - 0.5, -0.5)
    panel.tick_params(axis="y", length=0)
    panel.spines["left"].set_visible(False)
    panel.grid(axis="y", color="0.85", lw=0.5)
    panel.set_axisbelow(True)
    panel.margins(x=0.1)
    panel.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))


def _draw_lines(values: Mapping[str, np.ndarray[Any, Any]], layers: Sequence[str]) -> Figure:
    figure, panels, spare = _epoch_panels(len(values), row_height=1.8)
    lines: list[Line2D] = []
    for panel, (field, value) in zip(panels, values.items(), strict=True):
        horizon, every = len(value), max(len(layers), len(value) // 8)
        lines = [
            panel.plot(
                value[:, i],
                color=str(0.6 * i / len(layers)),
                linestyle=DASHES[i % len(DASHES)],
                marker=MARKERS[i],
                markerfacecolor="white",
                # staggered, so that layers with the same curve still show
                markevery=(i * every // len(layers) % horizon, every),
                clip_on=False,
            )[0]
            for i in range(len(layers))
        ]
        panel.set_ylabel(_label(field), linespacing=1.0)
        if not field.endswith("_mean"):
            panel.set_ylim(0, 1.05 * (value.max() if field != "fraction" else 1))
    longest = max(map(len, layers))
    if spare is not None and longest <= 24:
        spare.legend(lines, layers, loc="center")
    else:
        columns = max(1, int(figure.get_figwidth() / (0.7 + 0.06 * longest)))
        figure.legend(lines, layers, loc="outside lower center", ncols=min(columns, len(layers)))
    return figure


def _draw_heat_maps(values: Mapping[str, np.ndarray[Any, Any]], layers: Sequence[str]) -> Figure:
    from matplotlib.ticker import MaxNLocator

    figure, panels, _ = _epoch_panels(len(values), row_height=2.1)
    for panel, (field, value) in zip(panels, values.items(), strict=True):
        low = min(0.0, value.min())
        high = 1.0 if field == "fraction" else max(0.0, value.max())
        image = panel.imshow(
            value.T,
            # zero is white
            cmap="gray_r" if high >= -low else "gray",
            vmin=low,
            vmax=high,
            aspect="auto",
            interpolation="nearest",
        )
        ticks = MaxNLocator(4, steps=[1, 2, 5, 10])
        bar = figure.colorbar(image, ax=panel, location="top", ticks=ticks, aspect=25)
        bar.set_label(_label(field), linespacing=1.0)
        panel.spines[:].set_visible(True)
        rows = range(0, len(layers), -(-len(layers) // 7))
        cell = panel.get_subplotspec()
        named = cell is not None and cell.is_first_col()
        panel.set_yticks(rows, [layers[row] if named else "" for row in rows])
    return figure


def _label(field: str) -> str:
    quantity, unit = _LABELS[field]
    return f"{quantity}\n/ {unit}"


def _epoch_panels(count: int, row_height: float) -> tuple[Figure, list[Axes], Axes | None]:
    """Panels over epochs, column by column in up to two rows, and the empty cell if one is left."""
    from matplotlib.ticker import MaxNLocator

    rows = 1 if count <= 3 else 2
    columns = -(-count // rows)
    figure = _figure(columns, height=0.4 + row_height * rows)
    cells = [
        figure.add_subplot(rows, columns, row * columns + column + 1)
        for column in range(columns)
        for row in range(rows)
    ]
    for i, panel in enumerate(cells[:count]):
        whole = MaxNLocator(5, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)
        panel.xaxis.set_major_locator(whole)
        if i == count - 1 or i % rows == rows - 1:
            panel.set_xlabel("epoch")
    for cell in cells[count:]:
        cell.set_axis_off()
    return figure, cells[:count], cells[count] if count < len(cells) else None


def _figure(columns: int, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(7.0 if columns > 1 else 4.0, height), layout="constrained")
