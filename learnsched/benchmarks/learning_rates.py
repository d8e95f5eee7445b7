"""Which learning rate to take where nobody searches: one for each pair of level sets and start.

    torchrun --standalone --nproc-per-node 2 -m learnsched.benchmarks.learning_rates
        [--artefact default] [--optimizer adam] [--other-networks] [--networks N] [--quick] [--seed N]
        [--json PATH]

Networks are drawn at random, of the kinds that meta-training has and over a wider range of widths,
depths, run lengths and batches; each trains under the schedule at eight learning rates. What is advised
is the rate of best validation accuracy over all networks of a kind. No network is one of the accuracy
benchmark's. Optimizers other than Adam train the same networks, at rates of their own. With
``--other-networks`` they are transformers, depthwise separable convolutions, and convolutions under
group norms, on data of which some is harder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean, median
from typing import Any

import torch

from learnsched.benchmarks import methods as field
from learnsched.benchmarks.campaign import one_of_the_ranks, recorded
from learnsched.benchmarks.command_line import GOES_ON, command_line
from learnsched.benchmarks.environment import describe
from learnsched.benchmarks.rate_choice import smoothed
from learnsched.benchmarks.regimes import Regime, drawn
from learnsched.benchmarks.statistics import Record
from learnsched.benchmarks.training import train
from learnsched.data import load
from learnsched.meta import processes
from learnsched.meta.mix import Mix
from learnsched.meta.tasks import Task
from learnsched.policies import LearnedPolicy
from learnsched.tables import markdown

RATES = tuple(0.004 * 1.7**k for k in range(8))

# By optimizer, how many times Adam's rates are tried.
_FACTORS = {"adam": 1, "adamw": 1, "momentum": 8, "sgd": 50}

MIX = Mix(
    architectures=(
        ("mnist1d", "cnn1d", (8, 12, 16, 32), (3, 4, 6, 8)),
        ("mnist1d", "cnn1d", (8, 12, 16, 32), (3, 4, 6, 8)),
        ("noisy_digits", "cnn2d", (6, 10, 16), (3, 4, 6)),
        ("digits", "cnn2d", (6, 10, 16), (3, 4, 6)),
        ("noisy_digits", "residual", (6, 10), (5, 7, 9)),
        ("mnist1d", "mlp", (24, 32, 64, 128), (3, 4, 6)),
        ("noisy_digits", "mlp", (24, 32, 64, 128), (3, 4, 6)),
    ),
    horizons=(6, 8, 12, 20, 30),
    total_steps=(100, 2000),
    batches=(16, 32, 64, 128),
    bits=(("ternary/2-bit", 1.0),),
    learning_rates=(RATES[0], RATES[-1]),
    fine_tuning=0.0,
    members=1,
    tasks=1,
)

OTHER_NETWORKS = replace(
    MIX,
    architectures=(
        ("mnist1d", "transformer", (16, 32, 64), (6, 10)),
        ("noisy_digits", "transformer", (16, 32, 64), (6, 10)),
        ("shifted_digits", "transformer", (32, 64), (6,)),
        ("noisy_digits", "separable", (16, 32), (4, 6)),
        ("shifted_digits", "separable", (16, 32), (4, 6)),
        ("shifted_digits", "cnn2d_group", (8, 16), (3, 4, 6)),
    ),
    horizons=(6, 8, 12, 20),
    total_steps=(100, 800),
)

# Networks of each pair of level sets, from scratch or for fine-tuning.
COUNTS: dict[Regime, int] = {
    Regime("ternary/2-bit", False): 20,
    Regime("ternary/2-bit", True): 12,
    Regime("ternary/ternary", False): 8,
    Regime("binary/binary", False): 8,
    Regime("binary/2-bit", False): 6,
    Regime("ternary/real", False): 8,
    Regime("ternary/real", True): 8,
}
OTHER_COUNTS: dict[Regime, int] = {
    Regime("ternary/2-bit", False): 16,
    Regime("ternary/2-bit", True): 8,
    Regime("ternary/real", False): 12,
}
_RUNS = 4
_SEED = 770_000


def measured(
    task: Task, learned: LearnedPolicy, rates: Sequence[float], runs: int
) -> dict[str, Any]:
    """Validation accuracy at each rate, and what is known of a run before it."""
    data = load(task.data)
    layers = task.run_of(data).layers
    accuracy = train(
        field.learned(learned), task, data, rates, [None] * len(rates), runs, data.validation
    )
    return {
        "task": task.name,
        "seed": task.seed,
        "bits": task.bits,
        "fine_tuning": task.fine_tuning,
        "steps": task.horizon * task.steps,
        "batch": task.batch,
        "depth": len(layers),
        "fan_in": fmean(layer.fan_in for layer in layers),
        "rates": list(rates),
        "validation": accuracy.tolist(),
    }


def losses(records: Sequence[Record]) -> list[float]:
    """Accuracy that each rate loses to the best of them, the mean over networks, smoothed.

    Example:
        >>> records = [{"rates": [0.1, 0.2], "validation": [[0.5, 0.7], [0.8, 0.8]]}]
        >>> [round(loss, 2) for loss in losses(records)]
        [0.1, 0.0]
    """
    means = torch.tensor([[fmean(runs) for runs in r["validation"]] for r in records])
    over_networks = smoothed(means.double().mean(0))
    return (over_networks.max() - over_networks).tolist()


def advised(records: Sequence[Record]) -> float:
    """The rate of best smoothed accuracy over these networks."""
    loss = losses(records)
    rates: list[float] = records[0]["rates"]
    return rates[loss.index(min(loss))]


def by_kind(records: Sequence[Record]) -> dict[Regime, list[Record]]:
    """Records of each pair of level sets, from scratch and for fine-tuning."""
    kinds: dict[Regime, list[Record]] = {}
    for record in records:
        kinds.setdefault(Regime(record["bits"], record["fine_tuning"]), []).append(record)
    return kinds


def table(records: Sequence[Record]) -> str:
    """Markdown: what each rate loses to the best, by kind and family, and in halves of all networks.

    Where the best rate of two halves is the same, a rule that followed what halves them would not help.
    """
    rows = {str(regime): found for regime, found in by_kind(records).items()}
    for record in records:
        rows.setdefault(f"{record['task'].split()[1]} networks", []).append(record)
    halves: tuple[tuple[str, Callable[[Record], float]], ...] = (
        ("runs of {} {:.0f} steps", lambda r: r["steps"]),
        ("batches of {} {:.0f}", lambda r: r["batch"]),
        ("{} {:.0f} layers", lambda r: r["depth"]),
        ("{} {:.0f} inputs a layer, in the mean", lambda r: r["fan_in"]),
    )
    for name, number in halves:
        middle = median(map(number, records))
        rows[name.format("at most", middle)] = [r for r in records if number(r) <= middle]
        rows[name.format("more than", middle)] = [r for r in records if number(r) > middle]
    rows["all"] = list(records)
    lines = [["networks", "count", *(f"{rate:.3g}" for rate in records[0]["rates"]), "advised"]]
    for name, found in rows.items():
        if found:
            lost = (f"{100 * loss:.1f}" for loss in losses(found))
            lines.append([name, str(len(found)), *lost, f"{advised(found):.3g}"])
    return markdown(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    from learnsched.pretrained import load_pretrained

    parser = command_line(
        __doc__,
        quick="one network, two rates and runs",
        json=GOES_ON,
        seed="of the networks",
        artefact=True,
    )
    parser.add_argument("--optimizer", choices=_FACTORS, default="adam", help="of all networks")
    parser.add_argument(
        "--other-networks",
        action="store_true",
        help="transformers, depthwise separable convolutions, group norms",
    )
    parser.add_argument("--networks", type=int, help="at most so many; all if omitted")
    options = parser.parse_args(arguments)
    learned = load_pretrained(options.artefact)
    mix, counts = (OTHER_NETWORKS, OTHER_COUNTS) if options.other_networks else (MIX, COUNTS)
    networks = drawn(mix, counts, _SEED + options.seed)[: options.networks]
    tasks = [replace(task, optimizer=options.optimizer) for task in networks]
    rates, runs = [_FACTORS[options.optimizer] * rate for rate in RATES], _RUNS
    if options.quick:
        tasks, rates, runs = tasks[:1], rates[::4], 2
    with one_of_the_ranks():
        records = recorded(
            options.json,
            {(task.name, task.seed): task for task in tasks},
            lambda task: [{**measured(task, learned, rates, runs), "commit": describe()["commit"]}],
            lambda record: (record["task"], record["seed"]),
            progress=lambda record: print(f"{record['task']}: {advised([record]):.3g}", flush=True),
            seed=options.seed,
            optimizer=options.optimizer,
            other_networks=options.other_networks,
            quick=options.quick,
        )
        if processes.rank() == 0:
            print(f"\n{table(records)}")


if __name__ == "__main__":
    main()
