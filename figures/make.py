"""Draw README's figures of the schedule and of meta-training, from the artefact and stored results.

    python figures/make.py

Those of the grid of methods, ``methods_*.png``, are drawn by ``python -m learnsched.benchmarks.report``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from learnsched import load_pretrained, plan, plot_comparison, plot_schedule  # noqa: E402
from learnsched.benchmarks.comparison import by_task, table  # noqa: E402
from learnsched.files import write_text  # noqa: E402
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
    lines = (HERE / "default" / "log.jsonl").read_text().splitlines()
    plot_learning_curve([json.loads(line) for line in lines], HERE / "learning_curve.png")


if __name__ == "__main__":
    main()
