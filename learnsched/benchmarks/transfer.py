"""How far schedules carry: one property of the task changed at a time.

    torchrun --standalone --nproc-per-node 2 -m learnsched.benchmarks.transfer [--artefact default]
                                 [--axes NAME ...] [--quick] [--seed N] [--json PATH] [--plot PATH]

Hand-coded methods are tuned on the central task and carried over unchanged, as the learned schedule
is; the learning rate alone is searched anew everywhere, with the same rates for all.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from learnsched.benchmarks import methods as field
from learnsched.benchmarks.campaign import completed, one_of_the_ranks, stored_records
from learnsched.benchmarks.command_line import GOES_ON, command_line
from learnsched.benchmarks.environment import write_results
from learnsched.benchmarks.methods import Method
from learnsched.benchmarks.rate_choice import measure, rates_of
from learnsched.benchmarks.search import Budget
from learnsched.benchmarks.training import trained, tune
from learnsched.data import load
from learnsched.figure_style import DASHES, MARKERS, paper_style, save_figure
from learnsched.intervals import confidence_interval
from learnsched.meta import processes
from learnsched.meta.tasks import Task, task_of
from learnsched.policies import LearnedPolicy
from learnsched.schedule import Policy
from learnsched.tables import markdown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CENTRE = task_of(
    ("mnist1d", "cnn1d", 12, 4, 12, 20),
    batch=64,
    bits="ternary/2-bit",
    learning_rates=(0.01,),
    fine_tuning=False,
    seed=177_000,
)

RIVALS = ("straight-through", "ANA, normal", "ANA, normal, warm-up")

# What changes along an axis, its unit, and the tasks at its values.
AXES: dict[str, tuple[str, dict[str, Task]]] = {
    "depth": ("layers", {str(n): replace(CENTRE, depth=n) for n in (3, 4, 6, 8, 12)}),
    "width": ("channels", {str(n): replace(CENTRE, width=n) for n in (6, 12, 24, 48)}),
    "horizon": (
        "epochs of 20 steps",
        {str(n): replace(CENTRE, horizon=n) for n in (6, 12, 24, 72)},
    ),
    "steps per epoch": (
        "steps, 12 epochs",
        {str(n): replace(CENTRE, steps=n) for n in (10, 20, 50, 200)},
    ),
    "all at once": (
        "layers, channels, epochs and steps",
        {
            "1×": CENTRE,
            "2×": replace(CENTRE, depth=8, width=24, horizon=24, steps=40),
        },
    ),
    "bits": (
        "weights/activations",
        {b: replace(CENTRE, bits=b) for b in ("ternary/2-bit", "ternary/ternary", "binary/binary")},
    ),
    "optimizer": (
        "inner",
        {o: replace(CENTRE, optimizer=o) for o in ("adam", "adamw", "momentum", "sgd")},
    ),
    "data": (
        "data set and network",
        {
            "MNIST-1D, CNN": CENTRE,
            "digits, CNN": replace(CENTRE, family="cnn2d", data="digits"),
            "MNIST-1D, MLP": replace(CENTRE, family="mlp", width=48),
            "MNIST-1D, fine-tuned": replace(CENTRE, fine_tuning=True),
        },
    ),
}

_SHOWN = Budget(rounds=2, trials=8, trial_runs=6, runs=12)
_QUICK = Budget(rounds=1, trials=2, trial_runs=1, runs=2)


def compared(
    learned: LearnedPolicy, budget: Budget, seed: int, finished: Sequence[str] = ()
) -> list[tuple[Method, Policy | None]]:
    """The learned schedule, its start, and hand-coded methods as tuned on the central task.

    Args:
        learned: the schedule.
        budget: of the search.
        seed: of the search.
        finished: names of methods that have run on all tasks; they are not tuned again.
    """
    data = load(CENTRE.data)
    rows: list[tuple[Method, Policy | None]] = [
        (field.learned(learned), None),
        (field.start_of(learned), None),
    ]
    for method in field.hand_coded():
        if method.name in RIVALS:
            known = method.name in finished
            policy = None if known else tune(method, CENTRE, data, budget, seed).policy
            rows.append((method, policy))
    return rows


def transfer(
    rows: Sequence[tuple[Method, Policy | None]],
    axes: Mapping[str, Mapping[str, Task]],
    budget: Budget,
    *,
    done: Sequence[Mapping[str, Any]] = (),
    progress: Callable[[list[dict[str, Any]]], None] | None = None,
) -> list[dict[str, Any]]:
    """One record for each axis, value and method; ranks of torchrun share the work.

    Args:
        rows: methods with the policy that is carried over.
        axes: tasks by axis and value.
        budget: trials, seeds of a trial and seeds of the comparison.
        done: records of an interrupted run, which are not made again.
        progress: called with all records after every round.
    """
    jobs = {
        (task.name, method.name): (task, method, policy)
        for values in axes.values()
        for task in values.values()
        for method, policy in rows
    }

    def work(job: tuple[Task, Method, Policy | None]) -> list[dict[str, Any]]:
        task, method, policy = job
        rates = rates_of(task, budget.trials)
        return [measure(task, method.name, trained(method), policy, rates, budget)]

    return completed(
        done,
        jobs,
        work,
        lambda record: (record["cell"], record["method"]),
        None if progress is None else lambda made, records: progress(records),
    )


def table(records: Sequence[Mapping[str, Any]], axes: Sequence[str]) -> str:
    """Markdown: test accuracy in % of every method along every axis."""
    found = {(r["cell"], r["method"]): r["test"] for r in records}
    names = list(dict.fromkeys(r["method"] for r in records))
    rows = [["axis", "value", *names]]
    for axis in axes:
        for value, task in AXES[axis][1].items():
            means = [found.get((task.name, name)) for name in names]
            if not any(means):
                continue
            cells = ("" if m is None else f"{100 * float(np.mean(m)):.1f}" for m in means)
            rows.append([axis, value, *cells])
    return markdown(rows)


def gains(records: Sequence[Mapping[str, Any]], method: str, other: str) -> str:
    """Markdown: by how much one method is better than another, whatever the learning rate.

    Points of validation accuracy, mean over all rates of the search, which both have alike, and its
    standard error. Unlike accuracies at the best rates, these do not depend on which one was chosen.

    Args:
        records: of :func:`transfer`.
        method: the one.
        other: what it is compared with.
    """
    found = {(r["cell"], r["method"]): 100 * np.asarray(r["validation"]) for r in records}
    rows = [["task", f"{method} − {other}"]]
    for cell in dict.fromkeys(r["cell"] for r in records):
        if (cell, method) in found and (cell, other) in found:
            gain = found[cell, method] - found[cell, other]
            error = float(gain.std(ddof=1)) / math.sqrt(len(gain))
            rows.append([cell, f"{gain.mean():+.1f} ± {error:.1f}"])
    return markdown(rows)


def margins(records: Sequence[Mapping[str, Any]], method: str, start: str) -> str:
    """Markdown: points of test accuracy by which a method is ahead of the best of those tuned by hand.

    The best is chosen on test data, task by task, which favours it. The last rows are means: of all
    tasks, and of those with 2-bit activations where there are others. Tasks that not all methods have
    run on are left out.

    Args:
        records: of :func:`transfer`.
        method: the one.
        start: what it was made from, which was not tuned.
    """
    found = {(r["cell"], r["method"]): 100 * float(np.mean(r["test"])) for r in records}
    rivals = dict.fromkeys(r["method"] for r in records if r["method"] not in (method, start))
    ahead: dict[str, tuple[float, float]] = {}
    rows = [["task", "best by hand", f"{method} − best", f"{method} − {start}"]]
    for cell in dict.fromkeys(r["cell"] for r in records):
        if any((cell, name) not in found for name in (method, start, *rivals)):
            continue
        best = max(rivals, key=lambda name: found[cell, name])
        own = found[cell, method]
        ahead[cell] = (own - found[cell, best], own - found[cell, start])
        rows.append([cell, best, *(f"{points:+.1f}" for points in ahead[cell])])
    two_bits = {cell: points for cell, points in ahead.items() if "/2-bit" in cell}
    groups = {"all": ahead} | (
        {"2-bit activations": two_bits} if 0 < len(two_bits) < len(ahead) else {}
    )
    for word, group in groups.items():
        columns = list(zip(*group.values(), strict=True))
        wins = (f"{sum(points > 0 for points in column)} of {len(group)}" for column in columns)
        means = (f"{np.mean(column):+.1f}" for column in columns)
        rows.append([f"{word}: ahead in {', '.join(wins)}", "", *means])
    return markdown(rows)


def plot(
    records: Sequence[Mapping[str, Any]],
    axes: Sequence[str],
    path: str | os.PathLike[str],
) -> Figure:
    """A panel for each axis, and one for the learning rate on the central task, if it was trained.

    Along the axes test accuracy with 95 % intervals; accuracy at every learning rate is that
    on validation data. A line for each method.
    """
    from matplotlib.figure import Figure

    found = {(r["cell"], r["method"]): r for r in records}
    names = list(dict.fromkeys(r["method"] for r in records))
    by_rate = [found[CENTRE.name, name] for name in names if (CENTRE.name, name) in found]
    count = len(axes) + bool(by_rate)
    columns = 2 if count <= 4 else 3
    rows = math.ceil(count / columns)
    with paper_style():
        figure = Figure(figsize=(2.6 * columns, 2.3 * rows + 0.4), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).flatten()
        for panel, axis in zip(panels, axes, strict=False):
            _draw_axis(panel, axis, names, found)
        for panel in panels[count:]:
            panel.set_axis_off()
        for row in range(rows):
            panels[row * columns].set_ylabel("test accuracy / %")
        if by_rate:
            panel = panels[len(axes)]
            for record in by_rate:
                accuracy = 100 * np.asarray(record["validation"])
                panel.plot(record["rates"], accuracy, **_line(names.index(record["method"])))
            panel.set(
                xscale="log", xlabel="maximal learning rate", ylabel="validation accuracy / %"
            )
            lowest, highest = by_rate[0]["rates"][0], by_rate[0]["rates"][-1]
            ticks = (lowest, math.sqrt(lowest * highest), highest)
            panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            panel.minorticks_off()
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(names), 3))
        save_figure(figure, path)
    return figure


def _draw_axis(
    panel: Axes,
    axis: str,
    names: Sequence[str],
    found: Mapping[tuple[str, str], Mapping[str, Any]],
) -> None:
    unit, tasks = AXES[axis]
    categories = not next(iter(tasks))[0].isdigit()
    for number, name in enumerate(names):
        here = [
            (place, 100 * np.asarray(found[task.name, name]["test"]))
            for place, task in enumerate(tasks.values())
            if (task.name, name) in found
        ]
        if not here:
            continue
        means = np.array([values.mean() for _, values in here])
        ends = np.array([confidence_interval(values) for _, values in here])
        places = [place + 0.08 * (number - (len(names) - 1) / 2) for place, _ in here]
        style = _line(number)
        if categories:  # nothing lies between them
            style["linestyle"] = "none"
        panel.errorbar(places, means, yerr=np.abs(ends.T - means), label=name, **style)
    panel.set_xticks(range(len(tasks)), list(tasks))
    panel.set_xlim(-0.5, len(tasks) - 0.5)
    if max(len(value) for value in tasks) > 6:
        panel.tick_params(axis="x", labelrotation=25)
    panel.set_xlabel(f"{axis} ({unit})")


def _line(number: int) -> dict[str, Any]:
    return {
        "color": str(0.16 * number),
        "linestyle": DASHES[number % len(DASHES)],
        "marker": MARKERS[number],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    from learnsched.pretrained import load_pretrained

    parser = command_line(
        __doc__,
        quick="one axis, few trials and seeds",
        json=GOES_ON,
        seed="of the search on the central task",
        artefact=True,
    )
    parser.add_argument("--axes", nargs="*", choices=list(AXES), help="all of them if omitted")
    parser.add_argument("--plot", type=Path, help="draw the figure here")
    options = parser.parse_args(arguments)
    with one_of_the_ranks():
        axes = options.axes or (["depth"] if options.quick else list(AXES))
        budget = _QUICK if options.quick else _SHOWN
        policy = load_pretrained(options.artefact)
        content = {
            "seed": options.seed, "quick": options.quick, "artefact": options.artefact,
            "schedule": repr(policy),
        }  # fmt: skip
        done = stored_records(options.json, **content)

        def keep(records: list[dict[str, Any]]) -> None:
            if processes.rank() == 0:
                last = records[-1]
                print(
                    f"{last['cell']}: {last['method']} {100 * np.mean(last['test']):.1f}",
                    flush=True,
                )
                write_results(options.json, {**content, "records": records})

        tasks = {axis: AXES[axis][1] for axis in axes}
        if options.quick:
            tasks = {axis: dict(list(values.items())[:2]) for axis, values in tasks.items()}
        cells = {task.name for values in tasks.values() for task in values.values()}
        finished = [
            name for name in RIVALS if cells <= {r["cell"] for r in done if r["method"] == name}
        ]
        rows = compared(policy, budget, options.seed, finished)
        records = transfer(rows, tasks, budget, done=done, progress=keep)
        if processes.rank() == 0:
            print(table(records, axes))
            learned, start = rows[0][0].name, rows[1][0].name
            print(f"\n{gains(records, learned, start)}\n\n{margins(records, learned, start)}")
            if options.plot:
                plot(records, axes, options.plot)


if __name__ == "__main__":
    main()
