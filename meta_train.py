"""Meta-train a schedule: train, save the artefact, compare it on held-out tasks, plot.

    python meta_train.py                                   # the quick preset
    torchrun --nproc-per-node 2 meta_train.py --preset standard --out runs/standard

Everything of a run lies in its folder; an interrupted run goes on with --resume, with the same result
as one that was not interrupted.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from learnsched.benchmarks import comparison, held_out
from learnsched.benchmarks import methods as field
from learnsched.benchmarks.campaign import one_of_the_ranks
from learnsched.benchmarks.environment import describe
from learnsched.differences import differences
from learnsched.files import write_text
from learnsched.meta import processes
from learnsched.meta.presets import PRESETS, Preset
from learnsched.meta.run_folder import is_begun
from learnsched.meta.trainer import MetaTrainer
from learnsched.plotting import plot_comparison, plot_learning_curve, plot_schedule
from learnsched.policies import LearnedPolicy, MetaNetwork
from learnsched.pretrained import load_pretrained, save_artefact
from learnsched.schedule import LayerInfo, RunInfo, plan


def main() -> None:
    """Train, save, compare, plot."""
    options = _options()
    with one_of_the_ranks():
        try:
            _train_and_report(options)
        except (OSError, ValueError) as error:
            sys.exit(f"meta_train.py: {error}")
        except KeyboardInterrupt:
            hint = f"the same command with --resume goes on in {options.out}"
            sys.exit(
                f"meta_train.py: interrupted; {hint if is_begun(options.out) else 'nothing is kept yet'}"
            )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="quick")
    parser.add_argument("--steps", type=int, help="outer steps in all; the preset's if omitted")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder of the run; runs/PRESET-SEED if omitted")
    parser.add_argument(
        "--from",
        dest="source",
        metavar="ARTEFACT",
        help="begin with the network of this artefact, by name or path; what this run changes in its "
        "schedule, such as the domain, is printed at the start",
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in the folder")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--no-report", action="store_true", help="skip the held-out comparison")
    options = parser.parse_args()
    options.out = options.out or Path("runs") / f"{options.preset}-{options.seed}"
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    if not -(2**63) <= options.seed < 2**63:
        parser.error(f"--seed must lie between -2**63 and 2**63 - 1, got {options.seed}")
    try:
        torch.zeros((), device=options.device).item()
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        reason = str(error).splitlines()[0]
        parser.error(f"--device must be cpu or cuda, got {options.device!r}: {reason}")
    options.device = processes.own_device(options.device)
    return options


def _train_and_report(options: argparse.Namespace) -> None:
    preset = PRESETS[options.preset]
    steps = options.steps or preset.steps
    started = is_begun(options.out)
    processes.barrier()  # every rank has looked before the first one writes
    if started and not options.resume:
        raise FileExistsError(
            f"{options.out} holds a run already; add --resume to go on with it, or choose another --out"
        )
    if options.resume and not started:
        raise FileNotFoundError(f"{options.out} holds no run to resume; leave --resume out")
    trainer = _trainer(preset, options)
    if steps < trainer.step:
        given = "" if options.steps else f", the number of preset {options.preset}"
        raise ValueError(
            f"the run in {options.out} has taken {trainer.step} outer steps; --steps counts all of them "
            f"and is {steps}{given}; give {trainer.step} or more"
        )
    first = preset.trainer.validate_every
    if steps < first and processes.rank() == 0:
        print(
            f"meta_train.py: nothing is selected before the first validation, at outer step {first}; "
            f"after {steps} the network is saved as it was at the start",
            file=sys.stderr,
        )
    with _Progress(options.out, trainer.step, steps) as progress:
        trainer.run(steps, progress)
    trainer.load_best()
    policy = trainer.policy
    policy.network.cpu()  # the comparison runs where users of a quick look do
    source = f" --from {options.source}" if options.source else ""
    card = {
        "name": options.out.name,
        "made": {
            "command": f"meta_train.py --preset {options.preset} --seed {options.seed} "
            f"--steps {steps}{source}",
            "preset": options.preset,
            "estimator": repr(trainer.estimator),
            "seed": options.seed,
            "outer_steps": trainer.step,
            "processes": processes.world_size(),
            "seconds": round(trainer.seconds),
            "selected_step": trainer.best_step,
            "validation_error": trainer.best_error if math.isfinite(trainer.best_error) else None,
            "dropped_gradients": sum(entry.get("dropped", 0) for entry in trainer.log),
            "task_mix": asdict(trainer.config.mix),
            **describe(),
        },
    }
    if processes.rank() == 0:
        save_artefact(policy, options.out / "schedule.safetensors", card)
        plot_learning_curve(
            trainer.log,
            options.out / "learning_curve.png",
            unit="nats" if getattr(trainer.estimator, "objective", "loss") == "loss" else "errors",
        )
        plot_schedule(
            plan(policy, example_run()),
            options.out / "schedule.png",
            title="Learned schedule, 4 layers, 12 epochs of 20 steps, telemetry at rest",
        )
    if not options.no_report:
        _report(policy, card, options)


def _trainer(preset: Preset, options: argparse.Namespace) -> MetaTrainer:
    torch.manual_seed(options.seed)
    network = MetaNetwork()
    if options.source:
        source = load_pretrained(options.source)
        if source.base != preset.base:
            raise ValueError(
                f"{options.source} adds to other base curves than preset {options.preset}: what it has "
                "learned holds for its own; leave --from out, or take the preset that it was made with"
            )
        network = copy.deepcopy(source.network).requires_grad_(True)
    # Differences between layers that a network learned did harm (figures/meta_training.md), and a few
    # weights frozen from the first epoch on ruined a run of meta-training (figures/meta_gradient.md).
    policy = LearnedPolicy(
        network.to(options.device),
        preset.base,
        preset.domain,
        shared_noise=True,
        moved_start=True,
    )
    if options.source and processes.rank() == 0:
        _say_what_changes(options.source, source, policy)
    config = replace(preset.trainer, seed=options.seed)
    return MetaTrainer(
        policy,
        config,
        options.out,
        config.load_data(),
        preset.estimator,
        device=options.device,
    )


def _say_what_changes(name: str, source: LearnedPolicy, policy: LearnedPolicy) -> None:
    """Print what of an artefact's schedule is another one in this run."""
    changes = list(differences(source.config(), policy.config()))
    if changes:
        print(
            f"meta_train.py: begins with the network of {name} and these changes, so its schedule at "
            "step 0 is not that of the artefact",
            *(f"  {key}: {before} -> {after}" for key, before, after in changes),
            sep="\n",
            file=sys.stderr,
        )


def _report(policy: LearnedPolicy, card: dict[str, Any], options: argparse.Namespace) -> None:
    quick = options.preset == "quick"
    tasks = held_out.QUICK_TASKS if quick else held_out.HELD_OUT
    methods = [
        field.learned(policy),
        field.start_of(policy),
        *field.rivals(),
        field.upper_bound(),
    ]
    records = held_out.compare(methods, tasks, held_out.QUICK if quick else held_out.Budget())
    if processes.rank() != 0:
        return
    save_artefact(
        policy,
        options.out / "schedule.safetensors",
        {**card, "held_out": comparison.summary(records)},
    )
    write_text(options.out / "held_out.json", json.dumps(records, indent=1) + "\n")
    write_text(options.out / "held_out.md", comparison.table(records) + "\n")
    plot_comparison(comparison.by_task(records), options.out / "held_out.png")
    print(comparison.table(records))
    print(f"\nartefact, card, table and plots: {options.out}")


def example_run() -> RunInfo:
    """A run to draw a schedule for: a small convolutional network."""
    layers = [LayerInfo(f"layer {i + 1}", fan_in, 3, 4) for i, fan_in in enumerate((5, 24, 24, 40))]
    return RunInfo(tuple(layers), horizon=12, steps_per_epoch=20)


class _Progress:
    """A bar with outer loss, rate and time left; TensorBoard too, if it is installed."""

    def __init__(self, folder: Path, done: int, steps: int) -> None:
        from tqdm import tqdm

        first = processes.rank() == 0
        self._bar = tqdm(total=steps, initial=done, unit="step", disable=None if first else True)
        self._writer = _tensorboard(folder) if first else None

    def __enter__(self) -> Callable[[dict[str, Any]], None]:
        return self._show

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self._writer is not None:
            self._writer.close()

    def _show(self, entry: dict[str, Any]) -> None:
        self._bar.update()
        self._bar.set_postfix(outer_loss=f"{entry['outer_loss']:.3f}", dropped=entry["dropped"])
        if self._writer is not None:
            for name in ("outer_loss", "validation_error", "norm_median", "norm_largest"):
                if name in entry:
                    self._writer.add_scalar(f"meta/{name}", entry[name], entry["step"])


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"))


if __name__ == "__main__":
    main()
