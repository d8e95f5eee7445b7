"""Is there a better fixed curve? A search over a family of schedules, the rival of meta-training.

    torchrun --standalone --nproc-per-node 2 -m learnsched.benchmarks.curve_search [--quick]
                                                                  [--seed N] [--json PATH]

Random curves train on every task of a list, each with a learning rate of its own; a quadratic in all
coordinates is fitted to their validation accuracy, seed by seed and task by task around its mean; its
maximum is the curve that is found. A second round draws from the half as wide box around the first
maximum. What was found is compared with the default curve on fresh seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learnsched.benchmarks.environment import describe, write_results
from learnsched.benchmarks.held_out import train
from learnsched.benchmarks.methods import Method
from learnsched.data import DataSet, load
from learnsched.meta import distribution
from learnsched.meta.estimators import run_forward, table_rollout
from learnsched.meta.tasks import Task
from learnsched.policies.base_curve import BaseCurve
from learnsched.schedule import plan

# Name of a coordinate: lowest, highest, and whether it is searched in logarithms.
BOX: dict[str, tuple[float, float, bool]] = {
    "weight_forward_std": (0.0, 0.6, False),
    "activation_forward_std": (0.0, 0.6, False),
    "weight_hard_from": (0.3, 1.0, False),
    "activation_hard_from": (0.3, 1.0, False),
    "power": (0.5, 2.5, True),
    "weight_backward_std": (0.6, 4.0, True),
    "weight_backward_end": (0.3, 3.0, True),
    "activation_backward_std": (0.3, 1.5, True),
    "activation_backward_end": (0.2, 1.0, True),
    "freeze_from": (0.4, 0.97, False),
    "hard_tilt": (-0.8, 0.8, False),
    "weight_backward_tilt": (-1.2, 1.2, False),
    "activation_backward_tilt": (-1.2, 1.2, False),
    "learning_rate": (0.012, 0.05, True),
}


def _task(family: str, width: int, depth: int, horizon: int, steps: int, tuned: bool) -> Task:
    return Task(
        family, "mnist1d", width, depth, horizon, steps, 64, "ternary/2-bit", (), tuned, 900_000
    )


TASKS = (
    _task("cnn1d", 8, 4, 8, 20, False),
    _task("cnn1d", 8, 4, 8, 20, True),
    _task("cnn1d", 12, 4, 10, 16, False),
    _task("cnn1d", 6, 5, 12, 12, True),
    _task("cnn1d", 8, 5, 12, 12, False),
    _task("mlp", 32, 4, 12, 12, False),
    _task("cnn1d", 6, 3, 6, 15, False),
    _task("cnn1d", 10, 3, 6, 20, True),
)
_SEEDS = 4


def curves(points: Tensor) -> tuple[list[BaseCurve], list[float]]:
    """Curves and learning rates of points in the unit cube, shape ``(count, len(BOX))``."""
    found, rates = [], []
    for point in points.tolist():
        numbers = {
            name: math.exp(math.log(low) + u * math.log(high / low))
            if logarithmic
            else low + u * (high - low)
            for u, (name, (low, high, logarithmic)) in zip(point, BOX.items(), strict=True)
        }
        rates.append(numbers.pop("learning_rate"))
        found.append(BaseCurve(**numbers))
    return found, rates


def accuracies(task: Task, data: DataSet, points: Tensor, seed: int) -> Tensor:
    """Validation accuracy of each point; point i has the seed of point ``i % 4``."""
    found, rates = curves(points)
    final = replace(task, learning_rates=tuple(rates), runs=_SEEDS, seed=task.seed + seed)
    inner = final.build(data, membership_width=0.0, eps=1e-8)
    tables = torch.stack([plan(curve, inner.run).table.float() for curve in found], dim=1)
    with torch.no_grad():
        states, table, _ = run_forward(inner, table_rollout(tables))
        return inner.accuracy(states[-1], table[-1], data.validation.x, data.validation.y)


def quadratic(points: Tensor) -> Tensor:
    """All monomials up to degree two of points in the unit cube, without the constant."""
    z = 2 * points.double() - 1
    first, second = torch.triu_indices(z.shape[1], z.shape[1])
    return torch.cat([z, z[:, first] * z[:, second]], dim=1)


def fit(points: Tensor, values: Tensor, groups: Tensor, ridge: float = 3.0) -> Tensor:
    """Coefficients of :func:`quadratic`; values are taken around the mean of their group.

    Args:
        points: shape ``(count, coordinates)``.
        values: shape ``(count,)``.
        groups: index of each value's group, shape ``(count,)``.
        ridge: penalty, in observations.
    """
    design, values = quadratic(points), values.double()
    for group in groups.unique():
        here = groups == group
        design[here] -= design[here].mean(0)
        values = torch.where(here, values - values[here].mean(), values)
    gram = design.T @ design + ridge * torch.eye(design.shape[1], dtype=torch.double)
    return torch.linalg.solve(gram, design.T @ values)


def maximum(coefficients: Tensor, low: Tensor, high: Tensor, seed: int) -> tuple[Tensor, float]:
    """Where the fitted quadratic is largest in a box, by projected ascent from many points."""
    generator = torch.Generator().manual_seed(seed)
    start = low + (high - low) * torch.rand(256, len(low), generator=generator)
    points = start.double().requires_grad_()
    for _ in range(400):
        value = quadratic(points) @ coefficients
        (gradient,) = torch.autograd.grad(value.sum(), points)
        with torch.no_grad():
            moved = points + 0.05 * gradient / gradient.norm(dim=1, keepdim=True).clamp(min=1e-3)
            points = torch.maximum(torch.minimum(moved, high), low).requires_grad_()
    value = (quadratic(points) @ coefficients).detach()
    best = int(value.argmax())
    return points[best].detach(), float(value[best])


def search(count: int, seed: int) -> dict[str, Any]:
    """Two rounds over all tasks; what was found and how."""
    data = load("mnist1d")
    low, high = torch.zeros(len(BOX)).double(), torch.ones(len(BOX)).double()
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    rounds = []
    for turn in range(2):
        mine = {}
        for index in range(distribution.rank(), len(TASKS), distribution.world_size()):
            start = time.perf_counter()
            sobol = torch.quasirandom.SobolEngine(len(BOX), scramble=True, seed=97 * seed + index)
            points = low + (high - low) * sobol.draw(count * (turn + 1))[-count:].double()
            value = accuracies(TASKS[index], data, points, 1000 * seed + turn)
            mine[index] = (points, value)
            print(
                f"round {turn + 1}, {TASKS[index].name}: mean {value.mean():.3f}, "
                f"{time.perf_counter() - start:.0f} s",
                flush=True,
            )
        for index, (points, value) in enumerate(distribution.gather(mine, len(TASKS))):
            group = (turn * len(TASKS) + index) * _SEEDS + torch.arange(len(points)) % _SEEDS
            seen.append((points, value, group))
        points, values, groups = (torch.cat(parts) for parts in zip(*seen, strict=True))
        coefficients = fit(points, values, groups)
        best, gain = maximum(coefficients, low, high, seed)
        [curve], [rate] = curves(best.unsqueeze(0))
        rounds.append({"curve": asdict(curve), "learning_rate": rate, "predicted_gain": gain})
        half = (high - low) / 4
        low, high = (best - half).clamp(min=0), (best + half).clamp(max=1)
    return {"rounds": rounds, "runs": 2 * count * len(TASKS)}


def verify(found: Sequence[BaseCurve], seeds: int, seed: int) -> list[dict[str, Any]]:
    """Validation accuracy on fresh seeds, each task at its better learning rate of two.

    Args:
        found: curves to compare with the default one, which comes first in the rows.
        seeds: runs of each curve, task and learning rate.
        seed: of the runs.
    """
    data = load("mnist1d")
    compared = [BaseCurve(), *found]
    rates = (0.02, 0.04)
    method = Method("curve", BaseCurve.noise, BaseCurve.partition)
    repeated = [curve for curve in compared for _ in rates]
    mine = {}
    for index in range(distribution.rank(), len(TASKS), distribution.world_size()):
        fresh = replace(TASKS[index], seed=31_337 + seed)
        accuracy = train(
            method, fresh, data, rates * len(compared), repeated, seeds, data.validation
        )
        mean = accuracy.mean(1).view(len(compared), len(rates)).amax(1)
        mine[index] = {"task": TASKS[index].name, "accuracy": mean.tolist()}
    return distribution.gather(mine, len(TASKS))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=256, help="curves for each task and round")
    parser.add_argument("--quick", action="store_true", help="few curves and seeds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--json",
        type=Path,
        help="write what was found here; a search that is there is not repeated",
    )
    options = parser.parse_args(arguments)
    distribution.start()
    torch.set_num_threads(1)
    content: dict[str, Any] = {}
    if options.json and options.json.exists():
        content = json.loads(options.json.read_text())
    if "rounds" not in content:
        found = search(8 if options.quick else options.count, options.seed)
        content = {"environment": describe(), "seed": options.seed, **found}
    curves_found = [BaseCurve(**found["curve"]) for found in content["rounds"]]
    content["verified"] = verify(curves_found, 2 if options.quick else 8, options.seed)
    if distribution.rank() == 0:
        write_results(options.json, content)
        print("accuracy in %: default curve, first round, second round")
        for row in content["verified"]:
            print(" ".join(f"{100 * a:5.1f}" for a in row["accuracy"]), row["task"])
    distribution.stop()


if __name__ == "__main__":
    main()
