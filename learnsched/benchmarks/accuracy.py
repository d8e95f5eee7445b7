"""Test accuracy of every method in every cell of a grid, each with the same search budget.

    python -m learnsched.benchmarks.accuracy --grid small --out FOLDER [--cells NAME …]
        [--methods WORD …] [--artefact default] [--known FILE] [--shard 1/2] [--seed N]

In each cell a method's learning rate and own parameters are searched by Optuna on validation data; a
learned policy has its learning rate searched with the same number of trials. The chosen ones train
fresh seeds, the same for all methods, whose test accuracies are written to FOLDER/records, a file a
cell and method. Start the program again to go on with what is missing; start it twice, or on two
machines that share the folder, to have the work shared. ``--known figures/methods.jsonl`` starts a
folder from the records that are shipped, so that only your own are made. Then

    python -m learnsched.benchmarks.report FOLDER
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from learnsched.benchmarks import methods as field
from learnsched.benchmarks import plain, training
from learnsched.benchmarks.cells import GRIDS, Cell
from learnsched.benchmarks.environment import describe, write_results
from learnsched.benchmarks.methods import Method
from learnsched.benchmarks.records import (
    FLOAT,
    HAND_CODED,
    LEARNED,
    PARAMETRIC,
    RELAXED,
    START,
    claim,
    read,
    record_path,
    slug,
    unpack,
    write_record,
)
from learnsched.benchmarks.search import Budget, Train, tune
from learnsched.benchmarks.spaces import Trial
from learnsched.data import DataSet, load, reduced
from learnsched.meta.tasks import Task
from learnsched.policies import BaseCurve, BaseCurves, LearnedPolicy
from learnsched.policies.domain import LATER_RANGES

# Horizons, as shares of the cell's, at which learned schedules run too: what they need to match.
SHORTER = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Entry:
    """A method as the benchmark runs it.

    Attributes:
        name: as in tables.
        role: what it is to the comparison, one of those in :mod:`learnsched.benchmarks.records`.
        train: from tasks and policies to accuracies.
        suggest: from a trial to a policy; None if only the learning rate is searched.
        source: paper and equation.
        version: of what the name does not tell; a record of another version is made again.
        shorter: shares of the horizon at which the final seeds run too.
    """

    name: str
    role: str
    train: Train
    suggest: Callable[[Trial], Any] | None = None
    source: str = ""
    version: str = ""
    shorter: tuple[float, ...] = ()


def entries(task: Task, policy: LearnedPolicy | None, name: str = "learned") -> list[Entry]:
    """All methods that apply to a task.

    Args:
        task: of a cell; its bits and regime count.
        policy: the learned policy; None leaves it and its start out.
        name: of the learned policy.
    """
    bits = task.bits
    found = [_entry(method, HAND_CODED) for method in field.hand_coded(bits)]
    found.append(_entry(field.parametric(bits), PARAMETRIC))
    found.append(_entry(field.upper_bound(), RELAXED))
    found.append(Entry("float", FLOAT, functools.partial(plain.train, plain.adam)))
    if policy is not None:
        curve = _curve(policy.base, task)
        # The network of the start has random weights that change nothing: its curve tells all.
        start = hashlib.sha256(repr(_numbers(curve)).encode()).hexdigest()[:16]
        learned = replace(field.learned(policy), name=name)
        found.append(_entry(field.start_of(policy), START, version=start))
        found.append(_entry(learned, LEARNED, version=_digest(policy, curve), shorter=SHORTER))
    return found


def _entry(
    method: Method, role: str, *, version: str = "", shorter: tuple[float, ...] = ()
) -> Entry:
    train = training.trained(method)
    return Entry(method.name, role, train, method.suggest, method.source, version, shorter)


def _curve(base: BaseCurves, task: Task) -> BaseCurve:
    """The curve as it applies to a task."""
    run = task.run_of(_some(task.data))
    curve = base.nearest(run)
    return replace(curve, loss_power=curve.power_in(run), loss_from=0.0)


@functools.cache
def _some(name: str) -> DataSet:
    """Enough of a data set to make its networks; cells share three of them."""
    return reduced(load(name), 1000, 1000, 1000)


def _digest(policy: LearnedPolicy, curve: BaseCurve) -> str:
    """A hash of a learned policy: base curve, what it sees and has seen, and weights.

    Records that are there hold it; another would have them made again.
    """
    # Ranges that are those of the first artefacts, which do not name them, leave records as they are.
    ranges = asdict(policy.domain).items()
    seen = sorted((name, ends) for name, ends in ranges if LATER_RANGES.get(name) != ends)
    choices = (policy.open_loop, policy.shared_noise) + (True,) * policy.moved_start
    digest = hashlib.sha256(repr((_numbers(curve), choices, seen)).encode())
    for name, value in sorted(policy.network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _numbers(curve: BaseCurve) -> list[tuple[str, float]]:
    """Those that are not 0: one that comes later, and is 0, leaves records as they are."""
    return sorted((name, number) for name, number in asdict(curve).items() if number)


def is_done(folder: Path, cell: Cell, entry: Entry, budget: Budget, seed: int) -> bool:
    """Whether the record of a cell and method is there: of this version, budget and seed."""
    path = record_path(folder, cell.name, entry.name)
    if not path.exists():
        return False
    record = json.loads(path.read_text())
    wanted = {"version": entry.version, "budget": asdict(budget), "seed": seed}
    return all(record[name] == value for name, value in wanted.items())


def measure(
    cell: Cell, entry: Entry, data: DataSet, budget: Budget, seed: int, journal: Path | None = None
) -> dict[str, Any]:
    """The record of one method in one cell: search on validation data, then fresh seeds on test.

    Args:
        cell: what is trained.
        entry: the method.
        data: of the cell.
        budget: of the search and the final runs.
        seed: of the search.
        journal: of the search, to go on from.
    """
    wall, cpu = time.perf_counter(), time.process_time()
    found = tune(entry.train, entry.suggest, [(cell.task, data)], budget, seed, journal)

    def final(share: float) -> list[float]:
        horizon = max(2, round(share * cell.task.horizon))
        task = replace(cell.task, seed=cell.task.seed + 1, horizon=horizon)
        rates, policies = [found.learning_rate], [found.policy]
        test = entry.train(task, data, rates, policies, budget.runs, data.test)
        return cast(list[float], test.flatten().tolist())

    test = final(1.0)
    main_cpu = time.process_time() - cpu
    return {
        "cell": cell.name,
        "description": cell.task.name,
        "data": cell.task.data,
        "bits": cell.task.bits,
        "horizon": cell.task.horizon,
        "fine_tuning": cell.task.fine_tuning,
        "method": entry.name,
        "role": entry.role,
        "source": entry.source,
        "version": entry.version,
        "learning_rate": found.learning_rate,
        "parameters": found.parameters,
        "validation": found.validation,
        "test": test,
        "shorter": {str(share): final(share) for share in entry.shorter},
        "trials": found.trials,
        "space": found.space,
        "budget": asdict(budget),
        "seed": seed,
        "examples": [len(data.train), len(data.validation), len(data.test)],
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": main_cpu,
        "environment": _environment(),
    }


@functools.cache
def _environment() -> dict[str, str | int]:
    """As the program's code was when it started."""
    return describe()


def run(
    jobs: Sequence[tuple[Cell, Entry]],
    budget: Budget,
    folder: Path,
    *,
    seed: int = 0,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Make the records that are missing and that no other process is making.

    Args:
        jobs: cells and methods.
        budget: the same for every method.
        folder: of records, journals and claims.
        seed: of the search.
        progress: called with each record as it is made.
    """
    data: dict[str, DataSet] = {}
    for cell, entry in jobs:
        if is_done(folder, cell, entry, budget, seed):
            continue
        name = f"{slug(cell.name)}--{slug(entry.name)}"
        with claim(folder / "claims" / name) as mine:
            # Another process may have made it since the first look.
            if not mine or is_done(folder, cell, entry, budget, seed):
                continue
            if cell.name not in data:
                data = {cell.name: cell.data()}
            # One file a search: trials of another version, budget or seed are none of its own.
            trials = f"{budget.rounds}x{budget.trials}x{budget.trial_runs}-{seed}"
            version = entry.version and f"-{entry.version}"
            journal = folder / "searches" / f"{name}{version}-{trials}.log"
            record = measure(cell, entry, data[cell.name], budget, seed, journal)
            write_record(record, folder)
        if progress is not None:
            progress(record)


def matching(found: Sequence[Entry], words: Sequence[str] | None) -> list[Entry]:
    """Entries that words stand for, all without words.

    Args:
        found: to choose from.
        words: a role, a name, or a part of names where no name is the word itself; in any case.
    """
    if not words:
        return list(found)
    chosen: set[str] = set()
    for word in map(str.lower, words):
        exact = {e.name for e in found if word in (e.name.lower(), e.role)}
        chosen |= exact or {e.name for e in found if word in e.name.lower()}
    return [entry for entry in found if entry.name in chosen]


def _shard(text: str) -> tuple[int, int]:
    index, count = (int(part) for part in text.split("/"))
    if not 1 <= index <= count:
        raise ValueError(text)
    return index, count


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that this program and that of peers share."""
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--grid", choices=list(GRIDS), default="small")
    result.add_argument("--quick", action="store_true", help="the same as --grid quick")
    result.add_argument(
        "--out", type=Path, help="folder of the results; a temporary one if omitted"
    )
    result.add_argument(
        "--known", type=Path, help="folder, or file of JSON lines, with records made before"
    )
    result.add_argument("--cells", nargs="*", metavar="NAME", help="all of the grid if omitted")
    result.add_argument(
        "--methods", nargs="*", metavar="WORD", help="roles, or parts of names; all if omitted"
    )
    result.add_argument("--shard", type=_shard, default=(1, 1), help="i/n: the i-th of n parts")
    result.add_argument("--seed", type=int, default=0, help="of the search")
    result.add_argument("--json", type=Path, help="write all records of the folder here, too")
    return result


def execute(options: argparse.Namespace, choose: Callable[[Task], list[Entry]]) -> None:
    """Run what the options of :func:`parser` ask for.

    Args:
        options: parsed.
        choose: from the task of a cell to the methods that apply.
    """
    torch.set_num_threads(1)  # the tensors are small: threads cost more than they bring
    grid = GRIDS["quick" if options.quick else options.grid]
    jobs = [
        (cell, entry)
        for cell in grid.chosen(options.cells)
        for entry in matching(choose(cell.task), options.methods)
    ]
    if not jobs:
        raise SystemExit(f"no method's role or name matches {' '.join(options.methods)}")
    index, count = options.shard
    folder = options.out or Path(tempfile.mkdtemp(prefix="accuracy-"))
    if options.known is not None:
        if not options.known.exists():
            raise SystemExit(f"--known: {options.known} is neither a folder nor a file")
        unpack(read(options.known), folder)
    print(f"{len(jobs[index - 1 :: count])} cells × methods, records in {folder}", flush=True)

    def show(record: dict[str, Any]) -> None:
        mean = sum(record["test"]) / len(record["test"])
        print(
            f"{record['cell']:24} {record['method']:32} {100 * mean:5.1f} % "
            f"{record['seconds']:5.0f} s",
            flush=True,
        )

    run(jobs[index - 1 :: count], grid.budget, folder, seed=options.seed, progress=show)
    content = {"environment": _environment(), "seed": options.seed, "records": read(folder)}
    write_results(options.json, content)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    from learnsched.pretrained import load_pretrained

    options_parser = parser(__doc__)
    options_parser.add_argument("--artefact", default="default", help="a learned schedule, or none")
    options = options_parser.parse_args(arguments)
    policy = None if options.artefact == "none" else load_pretrained(options.artefact)
    plain_name = options.artefact == "default"
    name = "learned" if plain_name else f"learned ({Path(options.artefact).stem})"
    execute(options, lambda task: entries(task, policy, name))


if __name__ == "__main__":
    main()
