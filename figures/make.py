"""Draw README's figures of the schedule and of meta-training, from the artefact and stored results.

    python figures/make.py

Those of the grid of methods, ``methods_*.png``, are drawn by ``python -m learnsched.benchmarks.report``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from learnsched import load_pretrained, plan, plot_comparison, plot_schedule  # noqa: E402
from learnsched.benchmarks.comparison import by_task, table  # noqa: E402
from learnsched.figure_style import DASHES, MARKERS, paper_style, save_figure  # noqa: E402
from learnsched.files import write_text  # noqa: E402
from learnsched.meta.run_folder import read_log  # noqa: E402
from learnsched.plotting import plot_learning_curve  # noqa: E402
from meta_train import example_run  # noqa: E402


def main() -> None:
    schedule = plan(load_pretrained("default"), example_run())
    plot_schedule(
        schedule,
        HERE / "schedule.png",
        title="The default schedule: 4 layers, 12 epochs of 20 steps, telemetry at rest",
    )
    stored = json.loads((HERE / "held_out.json").read_text())
    plot_comparison(by_task(stored["records"]), HERE / "held_out.png")
    write_text(HERE / "held_out.md", table(stored["records"]) + "\n")
    first = read_log(HERE / "default" / "log.jsonl")
    plot_learning_curve(first, HERE / "learning_curve.png")
    later = [read_log(HERE / "meta_seeds" / f"seed-{seed}" / "log.jsonl") for seed in range(1, 7)]
    labels = (
        "seed 0, before the warm-up", "seed 1", "seed 2", "seed 3, on from seed 0, shared noise",
        "seed 4, on from seed 3, hybrid", "seed 5, on from seed 3, evolution strategies",
        "seed 6, the same with a sixth of the outer learning rate",
    )  # fmt: skip
    plot_seeds(dict(zip(labels, [first, *later], strict=True)), HERE / "meta_seeds.png")


def plot_seeds(logs: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> None:
    """What the validation error of each run of meta-training falls by from its start."""
    from matplotlib.figure import Figure

    with paper_style():
        figure = Figure(figsize=(5.4, 3.0), layout="constrained")
        panel = figure.subplots()
        for number, (name, log) in enumerate(logs.items()):
            checks = [entry for entry in log if "validation_error" in entry]
            gains = [100 * (checks[0]["validation_error"] - c["validation_error"]) for c in checks]
            panel.plot(
                [c["step"] for c in checks], gains, color=str(0.1 * number), label=name,
                marker=MARKERS[number], linestyle=DASHES[number % len(DASHES)], markerfacecolor="white",
            )  # fmt: skip
        panel.axhline(0, color="0.6", linewidth=0.6)
        panel.set(xlabel="outer step", ylabel="validation accuracy gained / points")
        figure.legend(loc="outside lower center", ncols=2, fontsize=7)
        save_figure(figure, path)


if __name__ == "__main__":
    main()
