"""How much cheaper networks are as one population than one by one, and plainly in PyTorch.

    python -m learnsched.benchmarks.population [--quick] [--seed N] [--json PATH] [--rounds N]

Networks of the meta-training mix train under the base curve, 32 as one population, one as a population
of its own, and one as a user would, with ``quantize_``, ``QuantizationScheduler`` and
``torch.optim.Adam``. The unrolled gradient is measured for the first two. The three take turns; times
are CPU seconds of one thread a network, of the fastest round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional as F

from learnsched.benchmarks.command_line import command_line
from learnsched.benchmarks.environment import write_results
from learnsched.convert import quantize_
from learnsched.data import DataSet, load
from learnsched.levels import ternary, unsigned
from learnsched.meta.rollout import PolicyRollout, run_forward
from learnsched.meta.tasks import Task, task_of
from learnsched.meta.unrolled import Unrolled
from learnsched.policies import BaseCurve, LearnedPolicy, MetaNetwork
from learnsched.scheduler import QuantizationScheduler
from learnsched.tables import markdown

MEMBERS = 32
NETWORKS = (
    ("mnist1d", "cnn1d", 12, 4),
    ("mnist1d", "cnn1d", 16, 6),
    ("digits", "cnn2d", 8, 4),
    ("mnist1d", "mlp", 32, 4),
)

_HEAD = [
    "network", "steps", f"{MEMBERS} as one over one by one", "the same, gradient",
    f"{MEMBERS} as one over plain PyTorch",
]  # fmt: skip


def trained(task: Task, data: DataSet) -> None:
    """Train all members of a task."""
    inner = task.build(data)
    policy = LearnedPolicy(MetaNetwork())
    with torch.no_grad():
        run_forward(inner, PolicyRollout(policy, inner.run, len(task.learning_rates)))


def differentiated(task: Task, data: DataSet) -> None:
    """The unrolled gradient of all members of a task."""
    inner = task.build(data)
    Unrolled()(
        inner, PolicyRollout(LearnedPolicy(MetaNetwork()), inner.run, inner.population.members)
    )


def plain(task: Task, data: DataSet) -> None:
    """Train one network in an ordinary loop."""
    (model, *_), _ = task.floats(data)
    quantize_(model, ternary(), unsigned(2), example_input=data.train.x[:1])
    optimizer = torch.optim.Adam(model.parameters(), lr=task.learning_rates[0])
    scheduler = QuantizationScheduler(model, BaseCurve(), epochs=task.horizon)
    generator = torch.Generator().manual_seed(task.seed)
    for _ in range(task.horizon):
        for _ in range(task.steps):
            index = torch.randint(len(data.train.y), (task.batch,), generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(model(data.train.x[index]), data.train.y[index]).backward()
            optimizer.step()
        scheduler.step()


def measure(
    data: DataSet, network: tuple[str, str, int, int], *, horizon: int, steps: int, rounds: int,
    seed: int,
) -> dict[str, Any]:  # fmt: skip
    """CPU seconds a network of each way to train, and of the gradient."""
    one = task_of(
        (*network, horizon, steps),
        batch=32,
        bits="ternary/2-bit",
        learning_rates=(0.01,),
        fine_tuning=False,
        seed=seed,
    )
    many = replace(one, learning_rates=(0.01,) * MEMBERS)
    ways: dict[str, Callable[[], None]] = {
        "population": lambda: trained(many, data),
        "one by one": lambda: trained(one, data),
        "plain PyTorch": lambda: plain(one, data),
        "gradient, population": lambda: differentiated(many, data),
        "gradient, one by one": lambda: differentiated(one, data),
    }
    seconds = dict.fromkeys(ways, float("inf"))
    for run in ways.values():
        run()  # what is compiled or cached on first use
    for _ in range(rounds):
        for way, run in ways.items():
            start = time.process_time()
            run()
            spent = (time.process_time() - start) / (MEMBERS if "population" in way else 1)
            seconds[way] = min(seconds[way], spent)
    return {
        "network": f"{one.data} {one.family} {one.depth}×{one.width}",
        "steps": horizon * steps,
        "seconds": seconds,
        "speed_up": {
            "training": seconds["one by one"] / seconds["population"],
            "gradient": seconds["gradient, one by one"] / seconds["gradient, population"],
            "training, over plain PyTorch": seconds["plain PyTorch"] / seconds["population"],
        },
    }


def table(rows: Sequence[dict[str, Any]], *, head: bool = True) -> str:
    """A Markdown table of the speed-ups."""
    cells = [
        [row["network"], str(row["steps"]), *(f"{r:.1f}×" for r in row["speed_up"].values())]
        for row in rows
    ]
    return markdown([_HEAD, *cells] if head else cells, head=head)


def main() -> None:
    """The command line."""
    parser = command_line(
        __doc__, quick="two networks, few steps", json="write the rows here, after each one"
    )
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    networks = NETWORKS[1:3] if options.quick else NETWORKS
    horizon, steps, rounds = (2, 3, 1) if options.quick else (6, 10, options.rounds)
    rows: list[dict[str, Any]] = []
    for network in networks:
        rows.append(
            measure(
                load(network[0]),
                network,
                horizon=horizon,
                steps=steps,
                rounds=rounds,
                seed=options.seed,
            )
        )
        print(table(rows[-1:], head=len(rows) == 1), flush=True)
        write_results(options.json, {"seed": options.seed, "rows": rows})


if __name__ == "__main__":
    main()
