"""Figures show what they are given, readable without colour, and are written whole or not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.text import Annotation

from learnsched import plotting
from learnsched.plotting import plot_comparison, plot_schedule
from learnsched.schedule import FIELDS, Schedule, Setting

RESULTS = {
    "MNIST-1D, CNN": {
        "STE": [0.80, 0.82, 0.81],
        "ANA": [0.84, 0.85, 0.83],
        "ours": [0.88, 0.9, 0.89],
    },
    "digits, MLP": {"STE": [0.91, 0.93], "ours": [0.95]},
}


def make_schedule(layers: int = 3, horizon: int = 10, mean: float = 0.0) -> Schedule:
    """Five outputs that differ between layers, and the means too if ``mean`` is not 0."""
    rows = []
    for epoch in range(horizon):
        left = 1 - epoch / max(1, horizon - 1)
        rows.append(
            [
                Setting(
                    weight_forward_std=0.3 * left,
                    weight_backward_std=0.5 + left + 0.1 * layer,
                    activation_forward_std=0.2 * left,
                    activation_backward_std=0.7,
                    fraction=1 - left,
                    weight_forward_mean=mean * left,
                    activation_forward_mean=mean * left,
                )
                for layer in range(layers)
            ]
        )
    return Schedule.from_settings(rows, [f"_block.{i}$x$" for i in range(layers)])


def only(schedule: Schedule, *fields: str) -> Schedule:
    kept = torch.tensor([float(name in fields) for name in FIELDS])
    return Schedule(schedule.table * kept, schedule.layers)


def panels(figure: Figure) -> list[Axes]:
    return [axes for axes in figure.axes if axes.axison and axes.get_label() != "<colorbar>"]


def legend_of(figure: Figure) -> Legend:
    inside = [axes.get_legend() for axes in figure.axes]
    (legend,) = [*figure.legends, *(found for found in inside if found is not None)]
    return legend


def ends(line: Line2D) -> list[list[float]]:
    return np.asarray(line.get_xydata()).tolist()


def test_every_field_of_a_setting_has_a_label() -> None:
    assert set(plotting._LABELS) == set(FIELDS)


def test_a_panel_for_each_output_with_quantity_and_unit() -> None:
    figure = plot_schedule(make_schedule())
    labels = [panel.get_ylabel().replace("\n", " ") for panel in panels(figure)]
    assert labels == [
        "forward std, weights / level steps",
        "forward std, activations / level steps",
        "backward std, weights / level steps",
        "backward std, activations / level steps",
        "INQ fraction / share of weights",
    ]
    # only the lowest panel of each column names the shared axis
    assert [p.get_xlabel() for p in panels(figure)] == ["", "epoch", "", "epoch", "epoch"]
    assert tuple(figure.get_size_inches()) == (7.0, 4.0)
    assert figure.dpi == 150


def test_means_are_shown_only_where_they_move() -> None:
    figure = plot_schedule(make_schedule(mean=-0.5))
    labels = [panel.get_ylabel() for panel in panels(figure)]
    assert len(labels) == 7
    assert "forward mean, activations\n/ level steps" in labels
    mean = next(p for p in panels(figure) if p.get_ylabel().startswith("forward mean, weights"))
    assert mean.get_ylim()[0] < -0.5


def test_outputs_that_stay_zero_have_no_panel() -> None:
    schedule = make_schedule()
    figure = plot_schedule(only(schedule, "weight_backward_std", "activation_backward_std"))
    assert [p.get_ylabel().split("\n")[0] for p in panels(figure)] == [
        "backward std, weights",
        "backward std, activations",
    ]
    (panel,) = panels(plot_schedule(only(schedule)))
    assert panel.get_ylabel().startswith("INQ fraction")


def test_lines_hold_the_values_and_differ_without_colour() -> None:
    schedule = make_schedule(layers=8, horizon=30)
    figure = plot_schedule(schedule)
    panel = next(p for p in panels(figure) if p.get_ylabel().startswith("backward std, weights"))
    assert len(panel.lines) == 8
    for i, line in enumerate(panel.lines):
        np.testing.assert_array_equal(line.get_xdata(), np.arange(30))
        np.testing.assert_array_equal(
            line.get_ydata(), schedule["weight_backward_std"][:, i].numpy()
        )
    assert len({line.get_marker() for line in panel.lines}) == 8
    shades = [to_rgb(line.get_color()) for line in panel.lines]
    assert all(r == g == b < 0.7 for r, g, b in shades)
    assert shades == sorted(set(shades))
    styles = [line.get_linestyle() for line in panel.lines]
    assert all(a != b for a, b in zip(styles, styles[1:], strict=False))
    low, high = panel.get_ylim()
    assert low == 0
    assert high > schedule["weight_backward_std"].max()


@pytest.mark.parametrize(("layers", "horizon"), [(3, 10), (8, 60), (8, 5), (2, 1)])
def test_markers_of_layers_with_the_same_curve_are_staggered(layers: int, horizon: int) -> None:
    (panel,) = panels(
        plot_schedule(only(make_schedule(layers, horizon), "activation_backward_std"))
    )
    starts = [line.get_markevery()[0] for line in panel.lines]
    assert max(starts) < horizon
    if horizon >= layers:
        assert len(set(starts)) == layers


@pytest.mark.parametrize("fields", [FIELDS, ("weight_backward_std", "fraction")])
def test_the_one_legend_names_all_layers_as_they_are(fields: tuple[str, ...]) -> None:
    schedule = make_schedule(layers=4)
    texts = legend_of(plot_schedule(only(schedule, *fields))).get_texts()
    assert [text.get_text() for text in texts] == list(schedule.layers)
    assert not any(text.get_parse_math() for text in texts)


def test_long_names_go_below_the_panels_and_stay_inside(tmp_path: Path) -> None:
    schedule = make_schedule(layers=6)
    names = tuple(f"backbone.stages.{i}.bottleneck.conv" for i in range(6))
    figure = plot_schedule(Schedule(schedule.table, names), tmp_path / "long.png")
    legend = legend_of(figure)
    assert legend in figure.legends
    box = legend.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width
    assert box.y1 < min(panel.get_window_extent().y0 for panel in panels(figure))


def test_many_layers_make_gray_heat_maps() -> None:
    schedule = make_schedule(layers=20, horizon=12, mean=-0.5)
    figure = plot_schedule(schedule, title="twenty layers")
    assert figure.get_suptitle() == "twenty layers"
    maps = {}
    for panel in panels(figure):
        assert not panel.lines
        (image,) = panel.images
        maps[image.colorbar.ax.get_xlabel().split("\n")[0]] = image
    assert len(maps) == 7
    backward = maps["backward std, weights"]
    np.testing.assert_array_equal(backward.get_array(), schedule["weight_backward_std"].T.numpy())
    assert backward.colorbar.ax.get_xlabel() == "backward std, weights\n/ level steps"
    assert backward.get_clim()[0] == 0
    assert maps["INQ fraction"].get_clim() == (0, 1)
    for image in maps.values():
        assert tuple(image.to_rgba(np.zeros((1, 1)))[0, 0]) == (1, 1, 1, 1), "zero is white"
    first = panels(figure)[0]
    names = [label.get_text() for label in first.get_yticklabels()]
    assert names[0] == schedule.layers[0]
    assert set(names) <= set(schedule.layers)
    assert first.yaxis_inverted(), "the input is on top"


def test_nine_layers_are_the_first_heat_map() -> None:
    assert not panels(plot_schedule(make_schedule(layers=8)))[0].images
    assert panels(plot_schedule(make_schedule(layers=9)))[0].images


def test_what_is_no_schedule_is_refused() -> None:
    with pytest.raises(TypeError, match=r"draws a Schedule, got Tensor; .*plan"):
        plot_schedule(torch.zeros(3, 2, 7))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"nothing to draw .* \(0, 1, 7\)"):
        plot_schedule(Schedule(torch.zeros(0, 1, len(FIELDS)), ("fc",)))
    table = make_schedule().table.clone()
    table[1, 1, 1] = float("nan")
    with pytest.raises(ValueError, match="must be finite"):
        plot_schedule(Schedule(table, ("a", "b", "c")))


def test_comparison_shows_means_in_per_cent_in_the_order_given() -> None:
    figure = plot_comparison(RESULTS)
    assert [panel.get_title(loc="left") for panel in figure.axes] == list(RESULTS)
    assert figure.get_supxlabel() == "test accuracy / %"
    first, second = figure.axes
    assert [label.get_text() for label in first.get_yticklabels()] == ["STE", "ANA", "ours"]
    assert first.yaxis_inverted(), "the first method is on top"
    dots = [line for line in first.lines if line.get_marker() not in ("None", "")]
    assert [ends(line)[0][0] for line in dots] == pytest.approx([81, 84, 89])
    assert [ends(line)[0][1] for line in dots] == [0, 1, 2]
    assert len({line.get_marker() for line in dots}) == 3
    assert [text.get_text() for text in first.texts] == ["81.0", "84.0", "89.0"]
    # the method that was not run on the second task leaves its row empty
    rows = [text.xy[1] for text in second.texts if isinstance(text, Annotation)]
    assert rows == [0, 2]


def test_long_names_of_tasks_make_room_for_themselves() -> None:
    short = plot_comparison({"task": {"a": [0.5], "b": [0.6], "c": [1.0]}})
    task = "a task whose name says all that there is to say of its network, its data and more " * 3
    long = plot_comparison({task: {"a": [0.5], "b": [0.6], "c": [1.0]}})
    lines = long.axes[0].get_title(loc="left").count("\n")
    assert lines >= 2
    assert long.get_figheight() - short.get_figheight() == pytest.approx(0.17 * lines)


def test_intervals_are_those_of_a_mean_and_draw_nothing() -> None:
    def whiskers(figure: Figure) -> list[list[float]]:
        lines = [ends(line) for line in figure.axes[0].lines]
        return [[start[0], end[0]] for start, end in (line for line in lines if len(line) == 2)]

    runs = np.random.default_rng(1).normal(0.8, 0.02, 40)
    results = {"task": {"many": runs, "same": [0.5, 0.5, 0.5], "one": [0.7]}}
    state = np.random.get_state()
    (low, high), same = whiskers(plot_comparison(results))
    for kept, now in zip(state, np.random.get_state(), strict=True):
        np.testing.assert_array_equal(now, kept)
    half = 2.0227 * runs.std(ddof=1) / np.sqrt(40)  # Student's t, 39 degrees of freedom
    assert [low, high] == pytest.approx(
        [100 * (runs.mean() - half), 100 * (runs.mean() + half)], abs=1e-3
    )
    assert same == [50, 50]
    assert whiskers(plot_comparison(results)) == [[low, high], same]


def test_baseline_is_a_dashed_line_that_the_axis_names() -> None:
    figure = plot_comparison(RESULTS, metric="validation accuracy", baseline="ANA")
    assert figure.get_supxlabel() == "validation accuracy / % (dashed: ANA)"
    dashed = [[x for x in axes.lines if x.get_linestyle() == "--"] for axes in figure.axes]
    assert [len(lines) for lines in dashed] == [1, 0]
    assert ends(dashed[0][0])[0][0] == pytest.approx(84)


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({}, "no results to compare"),
        ({"digits": {}}, "no results of digits to compare"),
        ({"digits": {"STE": [0.9]}, "mnist1d": {}}, "no results of mnist1d to compare"),
        ({"digits": {"STE": []}}, r"STE on digits needs a sequence .* got shape \(0,\)"),
        ({"digits": {"STE": 0.9}}, r"one accuracy a run, got shape \(\)"),
        ({"digits": {"STE": [0.9, float("nan")]}}, r"must lie in \[0, 1\], got \[0.9, nan\]"),
        ({"digits": {"STE": [90.0]}}, r"STE on digits must lie in \[0, 1\], got \[90.0\]"),
    ],
)
def test_results_that_cannot_be_compared_are_refused(
    results: dict[str, dict[str, Any]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plot_comparison(results)


def test_an_unknown_baseline_lists_the_methods() -> None:
    with pytest.raises(ValueError, match="baseline 'INQ'; there are STE, ANA, ours"):
        plot_comparison(RESULTS, baseline="INQ")


@pytest.mark.parametrize(
    ("suffix", "magic"), [(".png", b"\x89PNG"), (".pdf", b"%PDF"), ("", b"\x89PNG")]
)
def test_files_have_the_format_of_their_suffix(tmp_path: Path, suffix: str, magic: bytes) -> None:
    path = tmp_path / f"schedule{suffix}"
    path.write_bytes(b"old")
    plot_schedule(only(make_schedule(2), "fraction"), str(path))
    assert path.read_bytes().startswith(magic)
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "comparison.png"
    path.write_bytes(b"old")

    def fail(_: Figure, partial: Path, **__: object) -> None:
        assert partial.parent == tmp_path
        partial.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        plot_comparison(RESULTS, path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"old"


def test_unusable_paths_are_refused(tmp_path: Path) -> None:
    schedule = only(make_schedule(2), "fraction")
    with pytest.raises(FileNotFoundError, match="does not exist; make it first"):
        plot_schedule(schedule, tmp_path / "missing" / "schedule.png")
    with pytest.raises(ValueError, match="xyz"):
        plot_schedule(schedule, tmp_path / "schedule.xyz")
    assert not list(tmp_path.iterdir())


def test_no_global_state_of_matplotlib_changes(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    plot_schedule(make_schedule(2), tmp_path / "schedule.png")
    plot_comparison(RESULTS)
    assert dict(matplotlib.rcParams) == before
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


def test_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'learnsched\[plot\]'"):
        plot_schedule(make_schedule(2))
    with pytest.raises(ImportError, match=r"pip install 'learnsched\[plot\]'"):
        plot_comparison(RESULTS)


@pytest.mark.parametrize("horizon", [1, 2, 3, 60])
def test_epochs_are_whole_numbers(horizon: int) -> None:
    (panel,) = panels(plot_schedule(only(make_schedule(2, horizon), "weight_backward_std")))
    low, high = panel.get_xlim()
    shown = [tick for tick in panel.get_xticks() if low <= tick <= high]
    assert shown
    assert all(tick == int(tick) for tick in shown)


def test_a_comparison_without_tasks_is_explained():
    with pytest.raises(TypeError, match=r"from task to method to accuracies.*'STE' has list"):
        plot_comparison({"STE": [0.5], "learned": [0.6]})
