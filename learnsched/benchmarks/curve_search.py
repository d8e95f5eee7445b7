"""Which fixed curve is best? A search over a family of schedules, for each pair of level sets.

    torchrun --standalone --nproc-per-node 2 -m learnsched.benchmarks.curve_search [--bits BITS]
             [--fine-tuning | --warm-up | --long | --mixed | --vectors | --random [FAMILY ...]]
                               [--near SHARE] [--quick] [--seed N] [--json PATH]

The rival of meta-training, and what gives it a base to start from. Random curves train on every task
of a list, each with a learning rate of its own; a quadratic in all coordinates is fitted to their
validation accuracy, seed by seed and task by task around its mean; its maximum is the curve that is
found. Further rounds draw from the half as wide box around the last maximum. What was found is compared
with the plain base curve and with the one that meta-training starts from, on fresh seeds, each at its
best of three learning rates.
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learnsched.benchmarks import curve_tasks
from learnsched.benchmarks.campaign import one_of_the_ranks
from learnsched.benchmarks.command_line import add_kinds, command_line
from learnsched.benchmarks.environment import describe, write_results
from learnsched.benchmarks.methods import Method
from learnsched.benchmarks.training import train
from learnsched.data import DataSet, load
from learnsched.meta import processes
from learnsched.meta.presets import PRESETS
from learnsched.meta.rollout import learning_rates, run_forward, table_rollout
from learnsched.meta.tasks import Task
from learnsched.policies import BaseCurves
from learnsched.policies.base_curve import BaseCurve
from learnsched.schedule import plan

# Name of a coordinate: lowest, highest, and whether it is searched in logarithms.
Box = dict[str, tuple[float, float, bool]]

_BOX: Box = {
    "weight_forward_std": (0.0, 0.6, False),
    "activation_forward_std": (0.0, 0.6, False),
    "weight_hard_from": (0.3, 1.0, False),
    "activation_hard_from": (0.3, 1.0, False),
    "power": (0.5, 2.5, True),
    "weight_backward_std": (0.4, 4.0, True),
    "weight_backward_end": (0.15, 2.0, True),
    "activation_backward_std": (0.15, 2.0, True),
    "activation_backward_end": (0.1, 1.2, True),
    "freeze_from": (0.4, 0.97, False),
    "hard_tilt": (-0.8, 0.8, False),
    "weight_backward_tilt": (-1.2, 1.2, False),
    "activation_backward_tilt": (-1.2, 1.2, False),
    "learning_rate": (0.012, 0.05, True),
}
_WEIGHTS_ALONE = {n: sides for n, sides in _BOX.items() if not n.startswith("activation")}
BOXES: dict[str, Box] = {
    "ternary/2-bit": _BOX,
    "ternary/real": _WEIGHTS_ALONE,
    "ternary/ternary": _BOX,
    "binary/2-bit": _BOX,
    "binary/binary": {
        **_BOX,
        "activation_backward_std": (0.05, 1.0, True),
        "activation_backward_end": (0.03, 1.0, True),
    },
}
_SEEDS = 4
_RATES = (0.012, 0.022, 0.04)
_LONG_RATES = (0.006, 0.012, 0.022)


@dataclass(frozen=True)
class Kind:
    """A kind of runs that curves are searched for.

    Attributes:
        words: what it is called, behind the level sets; nothing for the usual kind.
        tasks: from the level sets to what curves are tried on.
        sides: of the box, that replace others or come to them.
        rates: at which what was found is compared.
    """

    words: str
    tasks: Callable[[str], Sequence[Task]]
    sides: Box = field(default_factory=dict)
    rates: tuple[float, ...] = _RATES


_WARM_UP: Box = {"warm_until": (0.0, 0.3, False)}
_OF_VECTORS: Box = {
    **_WARM_UP,
    "weight_backward_end": (0.15, 4.0, True),
    "freeze_from": (0.4, 0.99, False),
    "learning_rate": (0.008, 0.05, True),
}
_KINDS = {
    "usual": Kind("", curve_tasks.usual),
    "fine_tuning": Kind(", fine-tuned", curve_tasks.fine_tuned),
    "warm_up": Kind(", warm-up", curve_tasks.from_scratch, {"warm_until": (0.0, 0.4, False)}),
    "long": Kind(", long", curve_tasks.long, {"learning_rate": (0.005, 0.05, True)}, _LONG_RATES),
    "mixed": Kind(", mixed", curve_tasks.mixed, _WARM_UP),
    "vectors": Kind(", vectors", curve_tasks.vectors, _OF_VECTORS, (0.01, 0.02, 0.033)),
}


def _random(families: Sequence[str]) -> Kind:
    """Networks of these families, or of all, drawn at random."""
    families = families or curve_tasks.RANDOM_FAMILIES
    tasks = functools.partial(curve_tasks.random, families=families)
    return Kind(f", random {' '.join(families)}", tasks, _WARM_UP)


def curves(points: Tensor, box: Box) -> tuple[list[BaseCurve], list[float]]:
    """Curves and learning rates of points in the unit cube, shape ``(count, len(box))``."""
    found, rates = [], []
    for point in points.tolist():
        numbers = {
            name: math.exp(math.log(low) + u * math.log(high / low))
            if logarithmic
            else low + u * (high - low)
            for u, (name, (low, high, logarithmic)) in zip(point, box.items(), strict=True)
        }
        rates.append(numbers.pop("learning_rate"))
        found.append(BaseCurve(**numbers))
    return found, rates


def around(curve: BaseCurve, box: Box, share: float) -> tuple[Tensor, Tensor]:
    """The lowest and highest corner of a smaller box in the unit cube, with a curve in its middle.

    As far as the box goes; for the learning rate, which a curve does not have, it is the whole side.

    Args:
        curve: whose numbers belong in the middle.
        box: the sides of the unit cube.
        share: of each side, in (0, 1].

    Raises:
        ValueError: the share leaves its range.

    Example:
        >>> low, high = around(BaseCurve(freeze_from=0.5), {"freeze_from": (0.0, 1.0, False)}, 0.2)
        >>> [round(float(end), 3) for end in (low, high)]
        [0.4, 0.6]
    """
    if not 0 < share <= 1:
        raise ValueError(f"a share of the box lies in (0, 1], got {share}")
    middle = []
    for name, (low, high, logarithmic) in box.items():
        value = getattr(curve, name, None)
        if value is None:
            middle.append(math.nan)
        elif logarithmic:
            middle.append(math.log(value / low) / math.log(high / low))
        else:
            middle.append((value - low) / (high - low))
    places = torch.tensor(middle, dtype=torch.double).clamp(0, 1)
    lowest = (places - share / 2).clamp(min=0).nan_to_num(nan=0.0)
    return lowest, (places + share / 2).clamp(max=1).nan_to_num(nan=1.0)


def accuracies(task: Task, data: DataSet, points: Tensor, box: Box, seed: int) -> Tensor:
    """Validation accuracy of each point; point i has the seed of point ``i % 4``."""
    found, rates = curves(points, box)
    final = replace(task, learning_rates=tuple(rates), runs=_SEEDS, seed=task.seed + seed)
    inner = final.build(data, membership_width=0.0, eps=1e-8)
    inner.rates = torch.cat([learning_rates(curve, inner.run) for curve in found], dim=1)
    tables = torch.stack([plan(curve, inner.run).table.float() for curve in found], dim=1)
    with torch.no_grad():
        state, table, _ = run_forward(inner, table_rollout(tables))
        return inner.accuracy(state, table[-1], data.validation.x, data.validation.y)


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


def search(
    box: Box,
    count: int,
    rounds: int,
    seed: int,
    rows: Sequence[Task],
    within: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Any]:
    """All rounds over all tasks; what each found.

    Args:
        box: where curves are drawn from.
        count: curves of a task and round.
        rounds: each but the first in half the box of the one before.
        seed: of the curves and their runs.
        rows: what to train on.
        within: lowest and highest corner, in the unit cube, of what the first round draws from; the
            whole cube if None.
    """
    data = _data(rows)
    low, high = within or (torch.zeros(len(box)).double(), torch.ones(len(box)).double())
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    found = []

    def tried(job: tuple[int, int, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Curves of a round and task, as points of the unit cube, and their accuracies."""
        turn, index, low, high = job
        start, task = time.perf_counter(), rows[index]
        sobol = torch.quasirandom.SobolEngine(
            len(box), scramble=True, seed=10_000 * seed + 1000 * turn + index
        )
        points = low + (high - low) * sobol.draw(count).double()
        value = accuracies(task, data[task.data], points, box, 1000 * (seed + 1) + turn)
        print(
            f"round {turn + 1}, {task.name}: mean {value.mean():.3f}, "
            f"{time.perf_counter() - start:.0f} s",
            flush=True,
        )
        return points, value

    for turn in range(rounds):
        jobs = [(turn, index, low, high) for index in range(len(rows))]
        for index, (points, value) in enumerate(processes.mapped(jobs, tried)):
            group = (turn * len(rows) + index) * _SEEDS + torch.arange(len(points)) % _SEEDS
            seen.append((points, value, group))
        points, values, groups = (torch.cat(parts) for parts in zip(*seen, strict=True))
        coefficients = fit(points, values, groups)
        best, gain = maximum(coefficients, low, high, seed)
        [curve], [rate] = curves(best.unsqueeze(0), box)
        found.append({"curve": asdict(curve), "learning_rate": rate, "predicted_gain": gain})
        half = (high - low) / 4
        low, high = (best - half).clamp(min=0), (best + half).clamp(max=1)
    return {"rounds": found, "runs": rounds * count * len(rows)}


def verify(
    rows: Sequence[Task],
    compared: Mapping[str, BaseCurve | BaseCurves],
    rates: Sequence[float],
    seeds: int,
    seed: int,
) -> list[Any]:
    """Validation accuracy on fresh seeds, each task at its best learning rate.

    Args:
        rows: the tasks.
        compared: curves by name.
        rates: learning rates.
        seeds: runs of each curve, task and learning rate.
        seed: of the runs.
    """
    data = _data(rows)

    def work(task: Task) -> dict[str, Any]:
        task = replace(task, seed=31_337 + seed)
        found = at_best_rate(task, data[task.data], list(compared.values()), rates, seeds)
        return {
            "task": task.name,
            "accuracy": dict(zip(compared, found.mean(1).tolist(), strict=True)),
        }

    return processes.mapped(rows, work)


def at_best_rate(
    task: Task,
    data: DataSet,
    compared: Sequence[BaseCurve | BaseCurves],
    rates: Sequence[float],
    seeds: int,
) -> Tensor:
    """Validation accuracies of each curve at the rate of best mean, shape ``(curves, seeds)``."""
    accuracy = train(
        Method("curve", BaseCurve.noise, BaseCurve.partition), task, data, list(rates) * len(compared),
        [curve for curve in compared for _ in rates], seeds, data.validation,
    ).view(len(compared), len(rates), seeds)  # fmt: skip
    best = accuracy.mean(2).argmax(1)
    return accuracy[torch.arange(len(compared)), best]


def _stored(path: Path | None, name: str, asked: Mapping[str, int]) -> dict[str, Any]:
    """All searches of a file, by name.

    Raises:
        ValueError: the one of this name has another seed or number of runs than is asked for.
    """
    stored: dict[str, Any] = json.loads(path.read_text()) if path and path.exists() else {}
    there = {setting: stored.get(name, asked)[setting] for setting in asked}
    if there != asked:
        raise ValueError(
            f"{path} holds a search for {name} of {there['runs']} runs with seed {there['seed']}, not "
            f"of {asked['runs']} with {asked['seed']}; choose another file"
        )
    return stored


def _data(rows: Sequence[Task]) -> dict[str, DataSet]:
    return {name: load(name) for name in {task.data for task in rows}}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = command_line(
        __doc__,
        quick="two tasks, few curves and seeds",
        json="write what was found here, by bits; a search that is there is not repeated",
    )
    parser.add_argument("--bits", choices=BOXES, default="ternary/2-bit")
    kinds = add_kinds(
        parser,
        {
            "fine_tuning": "start from float networks",
            "warm_up": "from scratch, under a learning rate that rises first",
            "long": "runs of 1000 to 1440 steps",
            "mixed": "networks drawn at random, of easy and of hard problems",
            "vectors": "MLPs drawn at random, most of them for tables of numbers",
        },
    )
    kinds.add_argument(
        "--random",
        nargs="*",
        choices=curve_tasks.RANDOM_FAMILIES,
        metavar="FAMILY",
        help="networks drawn at random, of these families or all",
    )
    parser.add_argument(
        "--near",
        type=float,
        metavar="SHARE",
        help="of each side of the box, around the shipped curve of the first network",
    )
    parser.add_argument("--count", type=int, default=256, help="curves for each task and round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    with one_of_the_ranks():
        count, rounds, seeds = (4, 1, 2) if options.quick else (options.count, options.rounds, 6)
        kind = _KINDS[options.kind or "usual"]
        if options.random is not None:
            kind = _random(options.random)
        name, rows = f"{options.bits}{kind.words}", kind.tasks(options.bits)
        box = {**BOXES[options.bits], **kind.sides}
        shipped, within = PRESETS["standard"].base, None
        if options.near is not None:
            name = f"{name}, near"
            start = shipped.nearest(rows[0].run_of(load(rows[0].data)))
            within = around(start, box, options.near)
        rows = rows[-2:] if options.quick else rows
        asked = {"seed": options.seed, "runs": rounds * count * len(rows)}
        stored = _stored(options.json, name, asked)
        content = stored.get(name) or {
            "environment": describe(),
            "seed": options.seed,
            **search(box, count, rounds, options.seed, rows, within),
        }
        last = BaseCurve(**content["rounds"][-1]["curve"])
        compared: dict[str, BaseCurve | BaseCurves] = {
            "plain": BaseCurve(), "shipped": shipped, "found": last,
        }  # fmt: skip
        content["verified"] = verify(rows, compared, kind.rates, seeds, options.seed)
        if processes.rank() == 0:
            write_results(options.json, {**stored, name: content})
            print("accuracy in %: " + ", ".join(compared))
            for row in content["verified"]:
                print(" ".join(f"{100 * a:5.1f}" for a in row["accuracy"].values()), row["task"])


if __name__ == "__main__":
    main()
