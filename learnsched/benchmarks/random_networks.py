"""What a schedule is worth on networks drawn at random, where nobody searches for anything.

    torchrun --standalone --nproc-per-node 2 -m learnsched.benchmarks.random_networks
        [--artefact default] [--recipes PATH] [--advised PATH] [--quick] [--seed N] [--json PATH]

Every network trains under the learned schedule, its start and the hand-coded methods of
:mod:`learnsched.benchmarks.tuned_once`, with the parameters that were found there: once at the learning
rate that was found with them, and once at the one that :mod:`learnsched.benchmarks.learning_rates`
advises for the learned schedule. About half of the networks are for Fashion-MNIST, which nothing of all
this has seen; none has been drawn before.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from learnsched.benchmarks import carried, learning_rates
from learnsched.benchmarks.campaign import one_of_the_ranks, recorded
from learnsched.benchmarks.cells import Cell
from learnsched.benchmarks.environment import describe
from learnsched.benchmarks.methods import Method
from learnsched.benchmarks.records import LEARNED
from learnsched.benchmarks.regimes import Regime, drawn
from learnsched.benchmarks.statistics import Record, compare, mean
from learnsched.benchmarks.training import train
from learnsched.benchmarks.tuned_once import ADVISED, RECIPE, TEST, advice, compared, table
from learnsched.meta import processes
from learnsched.tables import markdown

MIX = replace(
    learning_rates.MIX,
    architectures=(
        ("fashion_mnist", "cnn2d", (6, 10, 16), (3, 4, 6)),
        ("fashion_mnist", "residual", (6, 10), (5, 7, 9)),
        ("fashion_mnist", "mlp", (24, 32, 64, 128), (3, 4, 6)),
        ("mnist1d", "cnn1d", (8, 12, 16, 32), (3, 4, 6, 8)),
        ("noisy_digits", "residual", (6, 10), (5, 7, 9)),
        ("mnist1d", "mlp", (24, 32, 64, 128), (3, 4, 6)),
    ),
    total_steps=(100, 1200),
    batches=(16, 32, 64),
)

COUNTS: dict[Regime, int] = {
    Regime("ternary/2-bit", False): 18,
    Regime("ternary/2-bit", True): 8,
    Regime("ternary/ternary", False): 5,
    Regime("binary/binary", False): 5,
    Regime("binary/2-bit", False): 4,
    Regime("ternary/real", False): 4,
    Regime("ternary/real", True): 4,
}
_RUNS = 3
_SEED = 780_000


def cells(seed: int) -> list[Cell]:
    """The networks with their data, named apart."""
    return [
        Cell(f"{task.name}, batches of {task.batch}, no. {task.seed}", task)
        for task in drawn(MIX, COUNTS, _SEED + seed)
    ]


def measured(method: Method, cell: Cell, rates: Mapping[str, float], recipe: Record) -> list[Any]:
    """Test accuracies of a network at each of the rates, by stage."""
    data = cell.data()
    policies = [carried.tuned(method.suggest, recipe)] * len(rates)
    accuracy = train(method, cell.task, data, list(rates.values()), policies, _RUNS, data.test)
    return [
        {
            "stage": stage,
            "cell": cell.name,
            "method": method.name,
            "learning_rate": rate,
            "test": accuracies.tolist(),
        }
        for (stage, rate), accuracies in zip(rates.items(), accuracy, strict=True)
    ]


def by_group(records: Sequence[Record], cells: Sequence[Cell], rival: str, stage: str) -> str:
    """Markdown: by how much the learned schedule is ahead of a rival, in groups of networks."""
    tests = {(r["cell"], r["method"]): r for r in records if r["stage"] == stage}
    groups: dict[str, Callable[[Cell], bool]] = {
        "Fashion-MNIST": lambda cell: cell.task.data == "fashion_mnist",
        "MNIST-1D and digits": lambda cell: cell.task.data != "fashion_mnist",
        "runs within meta-training's 320 steps": lambda cell: _steps(cell) <= 320,
        "longer runs": lambda cell: _steps(cell) > 320,
    }
    for regime in dict.fromkeys(Regime.of(cell.task) for cell in cells):
        groups[str(regime)] = lambda cell, regime=regime: Regime.of(cell.task) == regime  # type: ignore[misc]
    lines = [["networks", "count", "learned", f"ahead of {rival} by", "in", "clearly", "behind"]]
    for name, belongs in groups.items():
        names = [cell.name for cell in cells if belongs(cell)]
        pairs = {
            cell: (tests[cell, LEARNED], tests[cell, rival])
            for cell in names
            if {(cell, LEARNED), (cell, rival)} <= tests.keys()
        }
        if pairs:
            result = compare(pairs)
            accuracy = sum(mean(first) for first, _ in pairs.values()) / len(pairs)
            line = [name, str(len(pairs)), f"{100 * accuracy:.1f}", result.interval.text("+")]
            counts = (result.wins, result.clear_wins, result.clear_losses)
            lines.append(line + [str(count) for count in counts])
    return markdown(lines)


def _steps(cell: Cell) -> int:
    return cell.task.horizon * cell.task.steps


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    from learnsched.pretrained import load_pretrained

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--artefact", default="default", help="name or path of a learned schedule")
    parser.add_argument(
        "--recipes",
        type=Path,
        default=Path("figures/tuned_once.json"),
        help="records of the benchmark of methods that were tuned once",
    )
    parser.add_argument(
        "--advised",
        type=Path,
        default=Path("figures/learning_rates.json"),
        help="records of the benchmark of learning rates",
    )
    parser.add_argument("--quick", action="store_true", help="one network, three methods")
    parser.add_argument("--seed", type=int, default=0, help="of the networks")
    parser.add_argument("--json", type=Path, help="write records here; an interrupted run goes on")
    options = parser.parse_args(arguments)
    learned, networks = load_pretrained(options.artefact), cells(options.seed)
    stored = json.loads(options.recipes.read_text())["records"]
    recipes = {(r["regime"], r["method"]): r for r in stored if r["stage"] == RECIPE}
    names = list(dict.fromkeys(name for _, name in recipes))
    if options.quick:
        networks, names = networks[:1], names[:3]
    rates = advice(options.advised)
    jobs = {
        (cell.name, method.name): (cell, method)
        for cell in networks
        for method in compared(learned, cell.task.bits, names)
    }

    def work(job: tuple[Cell, Method]) -> list[dict[str, Any]]:
        cell, method = job
        regime = str(Regime.of(cell.task))
        recipe = recipes[regime, method.name]
        stages = {TEST: recipe["learning_rate"], ADVISED: rates[regime]}
        made = measured(method, cell, stages, recipe)
        return [{**record, "commit": describe()["commit"]} for record in made]

    with one_of_the_ranks():
        records = recorded(
            options.json,
            jobs,
            work,
            lambda record: (record["cell"], record["method"]),
            progress=lambda r: print(
                f"{r['cell']}, {r['method']}, {r['stage']}: {100 * mean(r):.1f}", flush=True
            ),
            seed=options.seed,
            quick=options.quick,
        )
        if processes.rank() == 0:
            known = [*recipes.values(), *records]
            for stage, heading in (
                (ADVISED, "At the advised rate"),
                (TEST, "Each at its own rate"),
            ):
                print(f"\n{heading}:\n\n{table(known, networks, stage=stage)}")
                for rival in names[1:]:
                    print(f"\n{by_group(records, networks, rival, stage)}")


if __name__ == "__main__":
    main()
