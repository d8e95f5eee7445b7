"""Does the default carry to what is no classifier of images or signals?

    torchrun --standalone --nproc-per-node 2 -m learnsched.benchmarks.other_problems [--quick]
        [--problems NAME …] [--artefact default] [--known PATH] [--seed N] [--json PATH]
        [--pooled-with PATH …]

Regression, denoising, segmentation, attention and text, with ternary weights and 2-bit activations, in
a loop that anyone would write. Two hand-coded methods come with what their search found on
Fashion-MNIST (the accuracy benchmark's records), the learned schedule as it is; for all of them, and
for the network without quantizers, the learning rate is chosen on validation data, from a list that
goes on where its best is at an end.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import learnsched as ls
from learnsched.benchmarks import carried
from learnsched.benchmarks import methods as field
from learnsched.benchmarks.campaign import one_of_the_ranks, recorded, stored_records
from learnsched.benchmarks.command_line import KEEPS, command_line
from learnsched.benchmarks.environment import describe
from learnsched.benchmarks.problems import PROBLEMS, Problem, Split
from learnsched.benchmarks.rate_choice import EXTENSIONS, choose
from learnsched.benchmarks.records import read
from learnsched.intervals import interval
from learnsched.learning_rate import warm_cosine
from learnsched.meta import processes
from learnsched.meta.presets import WARM_UNTIL
from learnsched.schedule import Policy
from learnsched.tables import markdown

RIVALS = ("ANA, normal, warm-up", "STE, moving, warm-up")
TUNED_ON = "fashion-cnn"
FLOAT = "float"

RATES = (0.0016, 0.004, 0.01, 0.025, 0.06)
BATCH = 50


@dataclass(frozen=True)
class Size:
    """Epochs of a run, runs on test data."""

    epochs: int
    runs: int


_SHOWN, _QUICK = Size(15, 4), Size(6, 1)


def compared(artefact: str, known: Path) -> dict[str, Policy | None]:
    """The learned schedule, its start, rivals as they were tuned, the network without quantizers.

    Args:
        artefact: name or path of the learned schedule.
        known: records of the accuracy benchmark.

    Raises:
        KeyError: there is no record of a rival.
    """
    learned = ls.load_pretrained(artefact)
    start = field.start_of(learned)
    rows: dict[str, Policy | None] = {"learned": learned, start.name: start.learned}
    records = carried.in_cell(read(known), TUNED_ON, RIVALS)
    for method in field.hand_coded():
        if method.name in RIVALS:
            rows[method.name] = carried.tuned(method.suggest, records[method.name])
    return rows | {FLOAT: None}


def train(
    problem: Problem, data: Split, policy: Policy | None, rate: float, seed: int, epochs: int
) -> nn.Module:
    """A finished network; without a policy, one without quantizers.

    The learning rate has the shape that the default is made for, whatever the method.
    """
    torch.manual_seed(seed)
    net = problem.network()
    steps = len(data.x) // BATCH
    optimizer = torch.optim.Adam(net.parameters(), rate)
    decay = LambdaLR(optimizer, lambda step: warm_cosine(step / (epochs * steps), WARM_UNTIL))
    scheduler = None
    if policy is not None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "no batch norm precedes")
            ls.quantize_(net, ls.ternary(), ls.unsigned(2), example_input=data.x[:2])
        scheduler = ls.QuantizationScheduler(
            net, policy, epochs, steps_per_epoch=steps, optimizer=optimizer
        )
    for _ in range(epochs):
        total = 0.0
        for chosen in torch.randperm(len(data.x)).split(BATCH):
            loss = problem.loss(net(data.x[chosen]), data.y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
            total += loss.item() / steps
        if scheduler is not None:
            scheduler.step({"train_loss": total})
    if scheduler is not None:
        ls.finalize_(net, data.x.split(BATCH))
    return net.eval()


def measured(
    problem: Problem, policy: Policy | None, rates: Sequence[float], size: Size, seed: int
) -> dict[str, Any]:
    """Validation score at every learning rate, test scores of fresh seeds at the best."""
    training, validation, test = problem.data()

    def score(rate: float, seed: int, split: Split) -> float:
        net = train(problem, training, policy, rate, seed, size.epochs)
        with torch.no_grad():
            return problem.score(net(split.x), split.y)

    choice = choose(
        rates,
        lambda rates: [score(rate, seed, validation) for rate in rates],
        extensions=EXTENSIONS,
    )
    return {
        "rates": choice.rates,
        "validation": choice.validation,
        "learning_rate": choice.best,
        "test": [score(choice.best, seed + 1 + n, test) for n in range(size.runs)],
    }


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: test scores in %, mean over seeds, and by how many points the first is ahead.

    Records of one problem and method are pooled, as those of several seeds. Problems that not all
    methods have run on are left out.
    """
    tests: dict[tuple[str, str], list[float]] = {}
    for record in records:
        tests.setdefault((record["problem"], record["method"]), []).extend(record["test"])
    found = {key: 100 * np.asarray(test) for key, test in tests.items()}
    names = list(dict.fromkeys(r["method"] for r in records))
    rows = [["problem", "score", *names, *(f"{names[0]} − {name}" for name in names[1:-1])]]
    for problem in dict.fromkeys(r["problem"] for r in records):
        if all((problem, name) in found for name in names):
            scores = [found[problem, name] for name in names]
            margins = [interval((scores[0] - other) / 100).text("+") for other in scores[1:-1]]
            means = [f"{score.mean():.1f}" for score in scores]
            rows.append([problem, PROBLEMS[problem].metric, *means, *margins])
    return markdown(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = command_line(
        __doc__, quick="regression in six epochs, two rates", json=KEEPS, artefact=True
    )
    carried.add_known(parser)
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=[*PROBLEMS])
    parser.add_argument(
        "--pooled-with",
        nargs="+",
        type=Path,
        default=[],
        metavar="PATH",
        help="files of other seeds; their problems are shown over all seeds, too",
    )
    options = parser.parse_args(arguments)
    names, rates, size = (
        (options.problems[:1], RATES[1:3], _QUICK)
        if options.quick
        else (options.problems, RATES, _SHOWN)
    )
    rows = compared(options.artefact, options.known)
    jobs = {(name, row): (name, row) for name in names for row in rows}

    def work(job: tuple[str, str]) -> list[dict[str, Any]]:
        name, row = job
        made = measured(PROBLEMS[name], rows[row], rates, size, 1000 * options.seed)
        return [{"problem": name, "method": row, **made, "commit": describe()["commit"]}]

    def progress(record: dict[str, Any]) -> None:
        score = 100 * np.mean(record["test"])
        print(f"{record['problem']}, {record['method']}: {score:.1f}", flush=True)

    with one_of_the_ranks():
        records = recorded(
            options.json,
            jobs,
            work,
            lambda record: (record["problem"], record["method"]),
            progress=progress,
            seed=options.seed,
            quick=options.quick,
        )
        if processes.rank() == 0:
            print(f"\n{table(records)}")
            others = [record for path in options.pooled_with for record in stored_records(path)]
            if problems := {record["problem"] for record in others}:
                mine = [record for record in records if record["problem"] in problems]
                print(f"\nover all seeds\n\n{table([*mine, *others])}")


if __name__ == "__main__":
    main()
