"""Does meta-training stay on course on long runs? With what stabilises it, and without.

    python -m learnsched.benchmarks.stability --variant stabilised --seed 0 --folder FOLDER
    python -m learnsched.benchmarks.stability --variant plain --seed 0 --folder FOLDER
    python -m learnsched.benchmarks.stability --variant early-freezing --seed 0 --folder FOLDER --cure
    python -m learnsched.benchmarks.stability --hand-coded --folder FOLDER
    python -m learnsched.benchmarks.stability --folder FOLDER --plot PATH

Inner runs take 300 to 800 optimizer steps on networks of four layers, 16 to 32 channels wide. All
variants have the same tasks, outer optimizer and average of the meta-parameters. ``stabilised`` damps
the second order, leaves chaotic runs to evolution strategies, clips the gradient of every member, has
all layers share the network's noise, and lets the network move the start of freezing instead of
freezing a few weights from the first epoch on. ``early-freezing`` does all of it but the last,
``own-noise`` all but the last two. ``moved-at-100`` is ``stabilised``, for a folder that holds
checkpoint and log of an early-freezing run of 100 steps. ``hybrid`` weighs damped backpropagation and
evolution strategies by their errors, ``clipped`` backpropagates whole; both do the rest. ``plain`` does
nothing of this. ``evolution`` does not backpropagate through runs at all: it follows the error itself
with 32 pairs a member, which is for a GPU (``--device cuda``). A run that was interrupted goes on. The
bound to beat is that of the strongest hand-coded methods, tuned on the validation tasks, then run on
the same seeds as the learned schedule is validated on. ``--cure`` asks whether early freezing is what
ails a run: its last network is validated as it is, and where what it puts out moves the start of
freezing.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from learnsched.benchmarks import methods as field
from learnsched.benchmarks import training
from learnsched.benchmarks.command_line import command_line
from learnsched.benchmarks.environment import write_results
from learnsched.benchmarks.search import Budget
from learnsched.data import DataSet
from learnsched.figure_style import paper_style, save_figure
from learnsched.meta.estimators import Estimator
from learnsched.meta.evolution import EvolutionStrategies
from learnsched.meta.mix import Mix
from learnsched.meta.presets import PRESETS
from learnsched.meta.run_folder import read_log
from learnsched.meta.tasks import Task, task_of
from learnsched.meta.trainer import MetaTrainer, TrainerConfig
from learnsched.meta.unrolled import Unrolled
from learnsched.meta.validation import hard_errors
from learnsched.policies import LearnedPolicy, MetaNetwork
from learnsched.tables import markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Variant:
    """How gradients are estimated and tamed.

    Attributes:
        estimator: of meta-gradients.
        clip: see :class:`TrainerConfig`.
        shared_noise: see :class:`LearnedPolicy`.
        moved_start: see :class:`LearnedPolicy`.
    """

    estimator: Estimator
    clip: float
    shared_noise: bool = True
    moved_start: bool = True


_STABILISED = Variant(PRESETS["long"].estimator, clip=1.0)
VARIANTS = {
    "stabilised": _STABILISED,
    "early-freezing": replace(_STABILISED, moved_start=False),
    "moved-at-100": _STABILISED,
    "own-noise": replace(_STABILISED, shared_noise=False, moved_start=False),
    "hybrid": Variant(PRESETS["standard"].estimator, clip=1.0),
    "clipped": Variant(Unrolled(), clip=1.0),
    "plain": Variant(Unrolled(), clip=math.inf, shared_noise=False, moved_start=False),
    "evolution": Variant(
        EvolutionStrategies(
            pairs=32, std=0.12, relative_std=0.4, knots=3, by_layer=False, objective="error"
        ),
        clip=1.0,
    ),
}

_MIX = Mix(
    architectures=(("mnist1d", "cnn1d", (16, 24, 32), (4,)),),
    horizons=(8, 12, 16, 20),
    total_steps=(300, 800),
    batches=(32,),
    bits=(("ternary/2-bit", 1.0),),
    learning_rates=(1e-2, 5e-2),
    fine_tuning=0.0,
    members=4,
    tasks=1,
    alike=1,
)


def _task(width: int, horizon: int, steps: int, seed: int) -> Task:
    return task_of(
        ("mnist1d", "cnn1d", width, 4, horizon, steps),
        batch=32,
        bits="ternary/2-bit",
        learning_rates=(0.015, 0.02, 0.03, 0.04) * 6,
        fine_tuning=False,
        seed=seed,
    )


TRAINING = TrainerConfig(
    mix=_MIX,
    validation=(
        _task(16, 10, 30, 2_000_000),
        _task(24, 12, 40, 2_000_001),
        _task(32, 20, 40, 2_000_002),
    ),
    learning_rate=0.001,
    decay=100.0,
    average=0.9,
    validate_every=20,
)

# The same run in seconds, to see that it runs.
_QUICK = replace(
    TRAINING,
    mix=replace(_MIX, architectures=(("mnist1d", "cnn1d", (4,), (3,)),), total_steps=(8, 16)),
    validation=(replace(_task(4, 4, 4, 2_000_000), depth=3),),
    validate_every=2,
)


def trained(
    variant: Variant,
    config: TrainerConfig,
    folder: Path,
    data: Mapping[str, DataSet],
    device: str = "cpu",
) -> MetaTrainer:
    """The trainer of a variant, at the last checkpoint of its folder or at its start."""
    torch.manual_seed(config.seed)
    preset = PRESETS["standard"]
    domain = replace(preset.domain, steps=(300, 800))
    policy = LearnedPolicy(
        MetaNetwork(),
        preset.base,
        domain,
        shared_noise=variant.shared_noise,
        moved_start=variant.moved_start,
    )
    policy.network.to(device)
    config = replace(config, clip=variant.clip)
    return MetaTrainer(policy, config, folder, data, variant.estimator, device=device)


def cured(trainer: MetaTrainer) -> list[dict[str, Any]]:
    """Validation error, task by task, of the last network as it is and with the start moved."""
    trainer.load_last()
    records = []
    for moved in sorted({trainer.policy.moved_start, True}):
        policy = trainer.policy.replaced(moved_start=moved)
        errors = {
            task.name: float(
                hard_errors(policy, task, trainer.data[task.data], trainer.device).mean()
            )
            for task in trainer.config.validation
        }
        records.append({"moved_start": moved, "errors": errors})
    return records


def hand_coded(
    config: TrainerConfig, data: Mapping[str, DataSet], seed: int, known: Mapping[str, list[float]]
) -> dict[str, Any]:
    """Mean validation error of each tuned method over the validation tasks, as the trainer's.

    Every method has 16 trials of 4 seeds for each task, on seeds of their own; then it runs where the
    learned schedule is validated, under the learning rate that was found.

    Args:
        config: of meta-training.
        data: its data sets.
        seed: of the search.
        known: errors of methods that were measured before, one a task.
    """
    budget = Budget(rounds=2, trials=8, trial_runs=4)
    errors = {name: list(found) for name, found in known.items()}
    methods = [method for method in field.rivals() if method.name not in known]
    for task in config.validation:
        runs = len(task.learning_rates)
        for method in methods:
            found = training.tune(
                method, replace(task, seed=task.seed + 1), data[task.data], budget, seed
            )
            accuracy = training.train(
                method, task, data[task.data], [found.learning_rate], [found.policy], runs,
                data[task.data].validation,
            )  # fmt: skip
            errors.setdefault(method.name, []).append(1 - float(accuracy.mean()))
            print(f"{task.name}: {method.name} {100 * errors[method.name][-1]:.1f} %", flush=True)
    return {"seed": seed, "errors": errors}


def stored(folder: Path) -> list[dict[str, Any]]:
    """The runs of a folder: variant, seed and log of each."""
    found = []
    for name in VARIANTS:
        for path in sorted(folder.glob(f"{name}-*/log.jsonl")):
            seed = int(path.parent.name.removeprefix(f"{name}-"))
            found.append({"variant": name, "seed": seed, "log": read_log(path)})
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table: of each run its validation errors in % and how large gradients became."""
    cells = [
        [
            "variant", "seed", "outer steps", "error at the start / %", "lowest", "last",
            "median norm, first and last 20 steps", "largest norm", "dropped",
        ]
    ]  # fmt: skip
    for row in rows:
        log = row["log"]
        errors = [100 * e["validation_error"] for e in log if "validation_error" in e]
        steps = [e for e in log if "norm_median" in e]
        norms = [e["norm_median"] for e in steps]
        ends = [float(torch.tensor(part).nanmedian()) for part in (norms[:20], norms[-20:])]
        cells.append([
            row["variant"],
            str(row["seed"]),
            str(log[-1]["step"]),
            *(f"{error:.1f}" for error in (errors[0], min(errors), errors[-1])),
            f"{ends[0]:.2g}, {ends[1]:.2g}",
            f"{max(e['norm_largest'] for e in steps):.2g}",
            str(sum(e["dropped"] for e in steps)),
        ])  # fmt: skip
    return markdown(cells)


# Of each variant: dashes and shade.
_LINES = {
    "stabilised": ("-", "0.0"),
    "early-freezing": ((0, (6, 1, 1, 1, 1, 1)), "0.0"),
    "moved-at-100": ("-", "0.5"),
    "own-noise": ("--", "0.0"),
    "hybrid": ("-.", "0.0"),
    "clipped": ("-.", "0.35"),
    "plain": (":", "0.55"),
    "evolution": ("-", "0.65"),
}


def plot(rows: Sequence[Mapping[str, Any]], bound: Mapping[str, Any] | None) -> Figure:
    """Validation error and gradient norms over outer steps, a line a run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 2.8), layout="constrained")
    error, norm = figure.subplots(1, 2)
    seen: set[str] = set()
    for row in rows:
        name, log = row["variant"], row["log"]
        dashes, shade = _LINES[name]
        label = None if name in seen else name
        seen.add(name)
        known = [e for e in log if "validation_error" in e]
        error.plot(
            [e["step"] for e in known], [100 * e["validation_error"] for e in known],
            linestyle=dashes, color=shade, marker="osD^"[row["seed"] % 4], ms=3, lw=1, label=label,
        )  # fmt: skip
        steps = [e for e in log if "norm_largest" in e]
        largest = [e["norm_largest"] for e in steps]
        norm.plot([e["step"] for e in steps], largest, linestyle=dashes, color=shade, lw=0.8)
    if bound is not None:
        name, errors = min(bound["errors"].items(), key=lambda item: sum(item[1]))
        error.axhline(
            100 * sum(errors) / len(errors), color="0.5", ls="-.", lw=1,
            label=f"{name}, tuned in each task",
        )  # fmt: skip
    for panel in (error, norm):
        panel.set_xlabel("outer steps")
    error.set_ylabel("validation error / %")
    norm.set_yscale("log")
    norm.yaxis.set_major_formatter("{x:g}")
    norm.set_ylabel("largest norm of a member's gradient")
    figure.legend(loc="outside upper center", ncols=4, fontsize=7, frameon=False)
    return figure


def main() -> None:
    """The command line."""
    parser = command_line(
        __doc__,
        quick="all variants, 2 outer steps in seconds",
        json="write the logs here",
        seed="of tasks, meta-network and search",
    )
    parser.add_argument("--variant", choices=VARIANTS, help="train this one")
    parser.add_argument("--steps", type=int, default=200, help="outer steps in all")
    parser.add_argument("--hand-coded", action="store_true", help="tune the bound to beat")
    parser.add_argument("--cure", action="store_true", help="validate the last network, cured")
    parser.add_argument("--folder", type=Path, default=Path("runs/stability"))
    parser.add_argument("--device", default="cpu", help="where inner runs train")
    parser.add_argument("--plot", type=Path, help="draw what the folder holds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = replace(_QUICK if options.quick else TRAINING, seed=options.seed)
    if options.quick:
        with tempfile.TemporaryDirectory() as folder:
            _run(options, config, list(VARIANTS), 2, Path(folder))
    else:
        chosen = [options.variant] if options.variant else []
        _run(options, config, chosen, options.steps, options.folder)


def _run(
    options: argparse.Namespace,
    config: TrainerConfig,
    chosen: Sequence[str],
    steps: int,
    folder: Path,
) -> None:
    """Train the chosen variants, tune the bound if asked to, and show what the folder holds."""
    data = config.load_data()
    for name in chosen:
        run = folder / f"{name}-{config.seed}"
        trainer = trained(VARIANTS[name], config, run, data, options.device)
        if options.cure:
            found = cured(trainer)
            write_results(run / "cure.json", {"step": trainer.step, "records": found})
            for record in found:
                print(f"start moved: {record['moved_start']}, errors {record['errors']}")
            continue
        trainer.run(steps, _show)
        write_results(run / "environment.json", {})
    path = folder / "hand_coded.json"
    bound = json.loads(path.read_text()) if path.exists() else None
    if options.hand_coded:
        bound = hand_coded(config, data, config.seed, bound["errors"] if bound else {})
        write_results(path, bound)
    rows = stored(folder)
    print(table(rows))
    write_results(options.json, {"rows": rows, "hand_coded": bound})
    if options.plot:
        with paper_style():
            save_figure(plot(rows, bound), options.plot)


def _show(entry: Mapping[str, Any]) -> None:
    error = entry.get("validation_error")
    shown = "" if error is None else f", validation error {100 * error:.2f} %"
    print(
        f"step {entry['step']}: outer loss {entry['outer_loss']:.3f}, largest norm "
        f"{entry['norm_largest']:.2g}, {entry['seconds']:.0f} s{shown}", flush=True,
    )  # fmt: skip


if __name__ == "__main__":
    main()
