"""What a schedule is worth on networks drawn at random, where nobody searches for anything.

    torchrun --standalone --nproc-per-node 2 -m learnsched.benchmarks.random_networks
        [--other-kinds | --other-networks | --tables] [--rate RATE] [--networks N] [--artefact default]
        [--bits BITS ...] [--families NAME ...] [--methods NAME ...] [--recipes PATH ...]
        [--advised PATH] [--quick] [--seed N] [--json PATH] [--pooled-with PATH] [--plot PATH]

Every network trains under the learned schedule, its start and the hand-coded methods of
:mod:`learnsched.benchmarks.tuned_once`, with the parameters that were found there: once at the learning
rate that was found with them, and once at the one that :mod:`learnsched.benchmarks.learning_rates`
advises for the learned schedule. About half of the networks are for Fashion-MNIST, which nothing of all
this has seen; none has been drawn before. With ``--other-kinds`` they are of two kinds that neither
meta-training nor the tuning of any method has seen: images in which the place of what is to be told
differs, and signals under wide kernels. (Between curves for ternary, binary and real activations the
validation data of such networks have decided, of others than these.) With ``--other-networks`` they are
transformers, depthwise separable convolutions, and convolutions under group norms. (Of such networks
the search has seen some that has moved the curve of weights alone.) With ``--tables`` they are MLPs for
six data sets of vectors, on four of which the curve of the artefact ``tables`` was searched. With
``--rate`` all train at that learning rate instead, as where somebody takes Adam's customary one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from learnsched.benchmarks import carried, learning_rates
from learnsched.benchmarks import methods as field
from learnsched.benchmarks.campaign import one_of_the_ranks, recorded, stored_records
from learnsched.benchmarks.cells import Cell
from learnsched.benchmarks.command_line import GOES_ON, add_kinds, command_line
from learnsched.benchmarks.environment import describe
from learnsched.benchmarks.methods import Method
from learnsched.benchmarks.records import LEARNED
from learnsched.benchmarks.regimes import Regime, drawn
from learnsched.benchmarks.report_figures import ranking
from learnsched.benchmarks.statistics import Record, compare, mean
from learnsched.benchmarks.training import train
from learnsched.benchmarks.tuned_once import (
    ADVISED,
    RECIPE,
    TEST,
    add_advised,
    advice,
    compared,
    table,
)
from learnsched.meta import processes
from learnsched.meta.mix import Mix
from learnsched.meta.networks import FAMILIES
from learnsched.meta.tasks import BITS
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

OTHER_KINDS = replace(
    MIX,
    architectures=(
        ("shifted_digits", "cnn2d", (6, 10, 16), (3, 4, 6)),
        ("shifted_digits", "residual", (6, 10), (5, 7, 9)),
        ("mnist1d", "cnn1d_wide", (8, 12, 16, 32), (3, 4, 6, 8)),
    ),
)

TABLES = replace(
    MIX,
    architectures=tuple(
        (data, "mlp", (24, 32, 64, 128), (3, 4, 5))
        for data in ("products", "clusters", "friedman", "hypercube", "teacher", "quadrics")
    ),
)

OTHER_NETWORKS = replace(
    MIX,
    architectures=(
        ("fashion_mnist", "separable", (16, 32), (4, 6)),
        ("shifted_digits", "separable", (16, 32), (4, 6)),
        ("fashion_mnist", "cnn2d_group", (8, 16), (3, 4, 6)),
        ("shifted_digits", "cnn2d_group", (8, 16), (3, 4, 6)),
        ("fashion_mnist", "transformer", (16, 32), (6,)),
        ("mnist1d", "transformer", (16, 32), (6, 10)),
    ),
    total_steps=(100, 600),
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
OTHER_COUNTS: dict[Regime, int] = {
    Regime("ternary/2-bit", False): 6,
    Regime("ternary/2-bit", True): 3,
    Regime("ternary/ternary", False): 4,
    Regime("binary/binary", False): 4,
    Regime("binary/2-bit", False): 2,
    Regime("ternary/real", False): 2,
}
TABLES_COUNTS: dict[Regime, int] = {Regime("ternary/2-bit", False): 18}
FURTHER_COUNTS: dict[Regime, int] = {
    Regime("ternary/2-bit", False): 8,
    Regime("ternary/2-bit", True): 3,
    Regime("ternary/ternary", False): 2,
    Regime("binary/binary", False): 2,
    Regime("binary/2-bit", False): 2,
    Regime("ternary/real", False): 5,
}
# Of the learned schedule alone: what it reaches in fewer epochs.
SHORTER = {
    f"{LEARNED}, three quarters of the epochs": 0.75,
    f"{LEARNED}, half of the epochs": 0.5,
}

# Neither signals nor digits.
_OTHERS = ("fashion_mnist", *(kind[0] for kind in TABLES.architectures))

_KINDS: dict[str | None, tuple[Mix, dict[Regime, int]]] = {
    None: (MIX, COUNTS),
    "other_kinds": (OTHER_KINDS, OTHER_COUNTS),
    "other_networks": (OTHER_NETWORKS, FURTHER_COUNTS),
    "tables": (TABLES, TABLES_COUNTS),
}

# The stage of records at the one rate that was asked for.
GIVEN = "given"

_RUNS = 3
_SEED = 780_000


def cells(seed: int, mix: Mix = MIX, counts: Mapping[Regime, int] = COUNTS) -> list[Cell]:
    """The networks of a mix with their data, named apart, so many of each regime."""
    return [
        Cell(f"{task.name}, batches of {task.batch}, no. {task.seed}", task)
        for task in drawn(mix, counts, _SEED + seed)
    ]


def shortened(cell: Cell, share: float) -> Cell:
    """The same network and data in a share of the epochs, rounded up."""
    return replace(cell, task=replace(cell.task, horizon=math.ceil(share * cell.task.horizon)))


def measured(
    method: Method, cell: Cell, rates: Mapping[str, float], policy: Any
) -> list[dict[str, Any]]:
    """Test accuracies of a network at each of the rates, by stage."""
    data = cell.data()
    policies = [policy] * len(rates)
    accuracy = train(method, cell.task, data, list(rates.values()), policies, _RUNS, data.test)
    return [
        {"stage": stage, "cell": cell.name, "learning_rate": rate, "test": accuracies.tolist()}
        for (stage, rate), accuracies in zip(rates.items(), accuracy, strict=True)
    ]


def by_group(records: Sequence[Record], cells: Sequence[Cell], rival: str) -> str:
    """Markdown: by how much the learned schedule is ahead of a rival, in groups of networks."""
    tests = {(record["cell"], record["method"]): record for record in records}
    groups = {
        "Fashion-MNIST": [cell for cell in cells if cell.task.data == "fashion_mnist"],
        "MNIST-1D and digits": [cell for cell in cells if cell.task.data not in _OTHERS],
        "shifted digits": [cell for cell in cells if cell.task.data == "shifted_digits"],
        "signals, wide kernels": [cell for cell in cells if cell.task.family == "cnn1d_wide"],
        "transformers": [cell for cell in cells if cell.task.family == "transformer"],
        "depthwise separable": [cell for cell in cells if cell.task.family == "separable"],
        "with group norms": [cell for cell in cells if cell.task.family == "cnn2d_group"],
        "convolutional": [cell for cell in cells if cell.task.family not in ("mlp", "transformer")],
        "MLPs": [cell for cell in cells if cell.task.family == "mlp"],
        "runs of at most 320 steps": [cell for cell in cells if _steps(cell) <= 320],
        "longer runs": [cell for cell in cells if _steps(cell) > 320],
    }
    groups |= {
        str(regime): [cell for cell in cells if Regime.of(cell.task) == regime] for regime in COUNTS
    }
    lines = [["networks", "count", "accuracy", f"ahead of {rival} by", "in", "clearly", "behind"]]
    for name, members in groups.items():
        pairs = {
            cell.name: (tests[cell.name, LEARNED], tests[cell.name, rival])
            for cell in members
            if {(cell.name, LEARNED), (cell.name, rival)} <= tests.keys()
        }
        if pairs:
            result = compare(pairs)
            accuracy = fmean(mean(first) for first, _ in pairs.values())
            line = [name, str(len(pairs)), f"{100 * accuracy:.1f}", result.interval.text("+")]
            counts = (result.wins, result.clear_wins, result.clear_losses)
            lines.append(line + [str(count) for count in counts])
    return markdown(lines)


def _steps(cell: Cell) -> int:
    return cell.task.horizon * cell.task.steps


def tables(records: Sequence[Record], recipes: Sequence[Record], cells: Sequence[Cell]) -> str:
    """Markdown: all methods at either rate, fewer epochs, and groups of networks."""
    parts = []
    headings = {
        ADVISED: "At the advised rate",
        TEST: "Each at its own rate",
        GIVEN: "At the given rate",
    }
    for stage, heading in headings.items():
        found = [record for record in records if record["stage"] == stage]
        if not found:
            continue
        own = [record for record in found if record["method"] not in SHORTER]
        parts += [f"{heading}:", table([*recipes, *own], cells, stage=stage)]
        names = dict.fromkeys(record["method"] for record in own)
        start, *rivals = [name for name in names if name != LEARNED]
        levels = {
            name: fmean(mean(record) for record in own if record["method"] == name)
            for name in rivals
        }
        for rival in (start, *sorted(levels, key=levels.__getitem__)[-1:]):
            parts.append(by_group(own, cells, rival))
        for name in dict.fromkeys(r["method"] for r in found if r["method"] in SHORTER):
            rest = [r for r in found if r["method"] in (name, *rivals)]
            parts += [f"{name}:", table([*recipes, *rest], cells, name, stage)]
    return "\n\n".join(parts)


def margins(records: Sequence[Record], stage: str) -> dict[str, dict[str, float]]:
    """By how much the learned schedule is ahead, by method and network.

    Methods that run as many epochs, the hardest to beat first.
    """
    found: dict[str, dict[str, float]] = {}
    for record in records:
        if record["stage"] == stage and record["method"] not in SHORTER:
            found.setdefault(record["method"], {})[record["cell"]] = mean(record)
    own = found.pop(LEARNED)
    ahead = {
        method: {cell: own[cell] - level for cell, level in levels.items() if cell in own}
        for method, levels in found.items()
    }
    return dict(sorted(ahead.items(), key=lambda item: fmean(item[1].values())))


def draw(records: Sequence[Record], path: Path, stage: str) -> None:
    """The margins, a dot a network."""
    ranking(
        margins(records, stage),
        path,
        margin="test accuracy of the learned schedule less that of the method",
        dot="network",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    from learnsched.pretrained import load_pretrained

    parser = command_line(
        __doc__,
        quick="one network, three methods",
        json=GOES_ON,
        seed="of the networks",
        artefact=True,
    )
    add_kinds(
        parser,
        {
            "other_kinds": "shifted digits, and signals under wide kernels",
            "other_networks": "transformers, depthwise separable convolutions, group norms",
            "tables": "MLPs for tables of numbers",
        },
    )
    parser.add_argument(
        "--rate", type=float, help="one learning rate for all, in place of those two"
    )
    parser.add_argument("--networks", type=int, help="at most so many; all if omitted")
    parser.add_argument(
        "--bits",
        nargs="+",
        choices=list(dict.fromkeys(regime.bits for regime in COUNTS)),
        help="of the networks; all if omitted",
    )
    parser.add_argument(
        "--families", nargs="+", choices=FAMILIES, help="of the networks; all if omitted"
    )
    parser.add_argument(
        "--methods", nargs="+", metavar="NAME", help="hand-coded ones; all with recipes if omitted"
    )
    parser.add_argument(
        "--recipes",
        nargs="+",
        type=Path,
        default=[Path("figures/tuned_once.json")],
        help="records of the benchmark of methods that were tuned once; later ones replace earlier",
    )
    add_advised(parser)
    parser.add_argument(
        "--pooled-with",
        type=Path,
        help="count records of another seed's networks, too, in what is told",
    )
    parser.add_argument("--plot", type=Path, help="draw the margins at the one rate of all methods")
    options = parser.parse_args(arguments)
    learned = load_pretrained(options.artefact)
    mix, counts = _KINDS[options.kind]

    def chosen(seed: int) -> list[Cell]:
        found = cells(seed, mix, counts)
        return [
            cell
            for cell in found
            if cell.task.bits in (options.bits or BITS)
            and cell.task.family in (options.families or FAMILIES)
        ]

    networks = chosen(options.seed)[: options.networks]
    stored = [r for path in options.recipes for r in json.loads(path.read_text())["records"]]
    recipes = {(r["regime"], r["method"]): r for r in stored if r["stage"] == RECIPE}
    names = [
        name
        for name in dict.fromkeys(name for _, name in recipes)
        if name.startswith(LEARNED) or name in (options.methods or {name})
    ]
    if options.quick:
        networks, names = networks[:1], names[:3]
    rates = advice(options.advised)
    shorter = SHORTER if options.rate is None else {}
    jobs = {(cell.name, name): (cell, name) for cell in networks for name in (*names, *shorter)}

    def work(job: tuple[Cell, str]) -> list[dict[str, Any]]:
        cell, name = job
        regime = str(Regime.of(cell.task))
        advised = {ADVISED: rates[regime]}
        if name in SHORTER:
            made = measured(field.learned(learned), shortened(cell, SHORTER[name]), advised, None)
        else:
            [method] = compared(learned, cell.task.bits, [name])
            recipe = recipes[regime, name]
            usual = {TEST: recipe["learning_rate"], **advised}
            stages = usual if options.rate is None else {GIVEN: options.rate}
            made = measured(method, cell, stages, carried.tuned(method.suggest, recipe))
        return [{**record, "method": name, "commit": describe()["commit"]} for record in made]

    content = {
        **{name: name == options.kind for name in _KINDS if name},
        "rate": options.rate,
        "quick": options.quick,
    }
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
            **content,
        )
        if options.pooled_with:
            records += stored_records(options.pooled_with, **content)
            networks += chosen(json.loads(options.pooled_with.read_text())["seed"])
        if processes.rank() == 0:
            print(f"\n{tables(records, list(recipes.values()), networks)}")
            if options.plot:
                draw(records, options.plot, ADVISED if options.rate is None else GIVEN)


if __name__ == "__main__":
    main()
