"""Is a population faster than its members one by one? Per family of the accuracy benchmark.

    python -m learnsched.benchmarks.stacking [--quick] [--seed N] [--json PATH]

CPU time of an optimizer step for each member, in cells of the small grid, for populations of several
sizes; the speed-up is that over one member alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from learnsched.benchmarks.cells import GRIDS, Cell
from learnsched.benchmarks.environment import write_results
from learnsched.meta.rollout import run_forward, table_rollout
from learnsched.policies import StraightThrough
from learnsched.schedule import plan
from learnsched.tables import aligned

CELLS = ("fashion-cnn", "fashion-residual", "fashion-mlp", "signal-cnn-deep", "digits-cnn")
SIZES = (1, 4, 8, 16)


def milliseconds(cell: Cell, members: int, steps: int, repeats: int, seed: int) -> float:
    """CPU time of one step of one member of a population, the least of several runs.

    Args:
        cell: network, data and batch.
        members: of the population.
        steps: of a run, in one epoch.
        repeats: runs; other programs on the machine can only lengthen one.
        seed: of the networks.
    """
    task = replace(
        cell.task,
        learning_rates=(0.01,) * members,
        horizon=1,
        steps=steps,
        seed=seed,
        fine_tuning=False,
    )
    inner = task.build(cell.data())
    table = plan(StraightThrough(), inner.run).table.float()
    rollout = table_rollout(torch.stack([table] * members, dim=1))
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        with torch.no_grad():
            run_forward(inner, rollout)
        best = min(best, time.process_time() - start)
    return 1000 * best / steps / members


def measure(names: Sequence[str], steps: int, repeats: int, seed: int) -> list[dict[str, Any]]:
    """One row for each cell and size, with the speed-up over one member alone."""
    cells = {cell.name: cell for cell in GRIDS["small"].cells}
    rows = []
    for name in names:
        alone = 0.0
        for size in SIZES:
            taken = milliseconds(cells[name], size, steps, repeats, seed)
            alone = taken if size == 1 else alone
            rows.append({"cell": name, "members": size, "ms": taken, "speed_up": alone / taken})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one cell, few steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    names = ("digits-cnn",) if options.quick else CELLS
    rows = measure(names, *((5, 2) if options.quick else (20, 5)), options.seed)
    print(aligned(
        [("cell", "members", "ms a step and member", "speed-up"),
         *((r["cell"], str(r["members"]), f"{r['ms']:.2f}", f"{r['speed_up']:.1f}") for r in rows)],
        left=1,
    ))  # fmt: skip
    write_results(options.json, {"seed": options.seed, "rows": rows})


if __name__ == "__main__":
    main()
