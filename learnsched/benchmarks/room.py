"""How much room is there? A schedule made for one task alone, beside the learned one and its start.

    torchrun --standalone --nproc-per-node 2 -m learnsched.benchmarks.room [--artefact default]
                       [--tasks NAME ...] [--bits BITS ...] [--steps N] [--quick] [--seed N]
                       [--json PATH]

What limits a learned schedule: what it must generalize over, or what any schedule can do? Here nothing
has to generalize. Knots of every output, the same for all layers, are optimized for one task by
evolution strategies, on the error of the hard networks, from the learned schedule on; every step has
fresh seeds. The result is compared on further seeds, each schedule at its best of eight learning rates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from learnsched.benchmarks import methods as field
from learnsched.benchmarks.campaign import one_of_the_ranks, recorded
from learnsched.benchmarks.command_line import KEEPS, command_line
from learnsched.benchmarks.held_out import HELD_OUT
from learnsched.benchmarks.methods import Method
from learnsched.benchmarks.rate_choice import measure, rates_of
from learnsched.benchmarks.search import Budget
from learnsched.benchmarks.training import trained
from learnsched.data import load
from learnsched.intervals import interval
from learnsched.learning_rate import learning_rate_factor
from learnsched.meta import processes
from learnsched.meta.evolution import LEARNED_FIELDS, hats, regression, valid
from learnsched.meta.rollout import learning_rates, run_forward, table_rollout
from learnsched.meta.tasks import BITS, Task
from learnsched.policies import LearnedPolicy
from learnsched.schedule import (
    BACKWARD_STDS,
    FIELDS,
    FRACTION,
    Policy,
    RunInfo,
    Schedule,
    Setting,
    Telemetry,
    plan,
)
from learnsched.tables import markdown

TASKS = ("other seeds", "fine-tuned")
_RATES = (0.012, 0.018, 0.027, 0.04)
_KNOTS = 4
_STD, _RELATIVE_STD = 0.1, 0.3
_SHOWN = Budget(rounds=1, trials=8, trial_runs=4, runs=48)
_QUICK = Budget(rounds=1, trials=2, trial_runs=1, runs=2)


@dataclass(frozen=True)
class Tabulated:
    """A policy that reads its settings off a table, whatever the run.

    Attributes:
        rows: settings of every epoch and layer.
        start: the policy whose learning rate it is made for.
    """

    rows: tuple[tuple[Setting, ...], ...]
    start: Policy
    noise = "normal"
    partition = "settled"
    metrics = ()

    def begin(self, run: RunInfo) -> None:
        """No state."""

    def settings(
        self, run: RunInfo, epoch: int, telemetry: Telemetry, state: None
    ) -> tuple[Sequence[Setting], None]:
        """The epoch's row."""
        return self.rows[epoch], None

    def learning_rate_factor(self, run: RunInfo, progress: float) -> float:
        """That of the start."""
        return learning_rate_factor(self.start, run, progress)


def tables(base: Tensor, coordinates: Tensor) -> Tensor:
    """Schedules of coordinates around a base schedule.

    Args:
        base: shape ``(horizon, layers, len(FIELDS))``.
        coordinates: shape ``(..., len(LEARNED_FIELDS), knots)``; 0 is the base schedule. One unit is a
            change by .1 of a forward std or fraction, of 30 % of a backward std.

    Returns:
        shape ``(..., horizon, layers, len(FIELDS))``.
    """
    knots = hats(len(base), coordinates.shape[-1]).to(base)
    offset = base.new_zeros(*coordinates.shape[:-2], *base.shape)
    every = torch.einsum("kt,...ok->...to", knots, coordinates)
    offset[..., list(LEARNED_FIELDS)] = every.unsqueeze(-2)
    moved = base + _STD * offset
    backward = list(BACKWARD_STDS)
    moved[..., backward] = (base * torch.exp(_RELATIVE_STD * offset))[..., backward]
    rows: list[Tensor] = []
    for row in moved.unbind(-3):
        rows.append(valid(row, rows[-1][..., FRACTION] if rows else None))
    return torch.stack(rows, dim=-3)


def specialized(task: Task, start: LearnedPolicy, steps: int, pairs: int, seed: int) -> Tabulated:
    """The schedule that was found for a task, the mean over the last half of the steps.

    Args:
        task: its seed is not used for training.
        start: the learned policy whose plan the search starts from.
        steps: of Adam.
        pairs: antithetic pairs of each of four networks.
        seed: of the networks and the perturbations.
    """
    data = load(task.data)
    task = replace(task, learning_rates=_RATES, runs=0)
    run = task.build(data).run
    base = plan(start, run).table.float()
    point = torch.zeros(len(LEARNED_FIELDS), _KNOTS, requires_grad=True)
    optimizer = torch.optim.Adam([point], lr=0.1)
    generator = torch.Generator().manual_seed(seed)
    seen = []
    for step in range(steps):
        inner = replace(task, seed=500_000 + 1000 * seed + step).build(data)
        inner.rates = learning_rates(start, inner.run)
        noise = torch.randn(pairs, len(_RATES), *point.shape, generator=generator)
        around = tables(base, point.detach() + torch.cat([noise, -noise])).flatten(0, 1)
        many = inner.repeated(2 * pairs)
        with torch.no_grad():
            state, table, _ = run_forward(many, table_rollout(around.transpose(0, 1)))
            plus, minus = many.outer_error(state, table[-1]).view(2, pairs, -1)
        slopes = regression(noise.flatten(2), (plus - minus) / 2, ridge=1.0)
        point.grad = slopes.mean(0).view_as(point)
        optimizer.step()
        seen.append(point.detach().clone())
    mean = torch.stack(seen[steps // 2 :]).mean(0)
    rows = tables(base, mean).double().tolist()
    return Tabulated(tuple(tuple(Setting(*values) for values in row) for row in rows), start)


def records_of(
    task: Task, policy: LearnedPolicy, steps: int, pairs: int, budget: Budget, seed: int
) -> list[dict[str, Any]]:
    """Test accuracies of the start, the learned schedule and the specialized one on a task.

    The last record holds the specialized ``schedule``, from each output to epochs × layers.
    """
    alone = specialized(task, policy, steps, pairs, seed)
    schedule = Schedule.from_settings(alone.rows, [str(i) for i in range(len(alone.rows[0]))])
    rows = (
        (field.start_of(policy), None),
        (field.learned(policy), None),
        (Method("made for the task", alone.noise, alone.partition), alone),
    )
    rates = rates_of(task, budget.trials)
    records = [
        measure(task, method.name, trained(method), table, rates, budget) for method, table in rows
    ]
    records[-1]["schedule"] = {output: schedule[output].tolist() for output in FIELDS}
    return records


def table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: accuracy of the start in %, then what the others have more, paired over seeds."""
    found = {(r["task"], r["method"]): np.asarray(r["test"]) for r in records}
    tasks, names = (list(dict.fromkeys(r[key] for r in records)) for key in ("task", "method"))
    start = [f"{100 * found[task, names[0]].mean():.1f}" for task in tasks]
    rows = [["schedule", *tasks], [names[0], *start]]
    for name in names[1:]:
        gains = [interval(found[task, name] - found[task, names[0]]).text("+") for task in tasks]
        rows.append([name, *gains])
    return markdown(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    from learnsched.pretrained import load_pretrained

    parser = command_line(__doc__, quick="one task, few steps and seeds", json=KEEPS, artefact=True)
    parser.add_argument("--tasks", nargs="*", choices=list(HELD_OUT), default=list(TASKS))
    parser.add_argument("--bits", nargs="*", choices=BITS, default=["ternary/2-bit"])
    parser.add_argument("--steps", type=int, default=60, help="of the optimization")
    parser.add_argument("--pairs", type=int, default=12, help="of each network")
    options = parser.parse_args(arguments)
    policy = load_pretrained(options.artefact)
    steps, pairs, budget = (
        (2, 2, _QUICK) if options.quick else (options.steps, options.pairs, _SHOWN)
    )
    tasks = {
        name if bits == "ternary/2-bit" else f"{name}, {bits}": replace(HELD_OUT[name], bits=bits)
        for bits in options.bits
        for name in (options.tasks[:1] if options.quick else options.tasks)
    }

    def work(name: str) -> list[dict[str, Any]]:
        made = records_of(tasks[name], policy, steps, pairs, budget, options.seed)
        return [{"task": name, **record} for record in made]

    with one_of_the_ranks():
        records = recorded(
            options.json,
            {name: name for name in tasks},
            work,
            lambda record: str(record["task"]),
            seed=options.seed,
            steps=steps,
            pairs=pairs,
        )
        if processes.rank() == 0:
            print(table(records))


if __name__ == "__main__":
    main()
