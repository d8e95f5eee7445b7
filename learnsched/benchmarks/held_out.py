"""Learned against hand-coded schedules on held-out tasks, every method with the same search budget.

    python -m learnsched.benchmarks.held_out [--artefact default] [--quick] [--json PATH]

Each method's learning rate and own parameters are searched by Optuna on validation data; a learned
policy has its learning rate searched with the same number of trials. The chosen ones train fresh
seeds, which are the same for all methods, and test data is read once. Networks of all trials of a
round train as one population.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, is_dataclass, replace
from typing import Any

from learnsched.benchmarks import methods as field
from learnsched.benchmarks.campaign import completed, one_of_the_ranks, stored_records
from learnsched.benchmarks.command_line import GOES_ON, command_line
from learnsched.benchmarks.comparison import table
from learnsched.benchmarks.environment import describe, write_results
from learnsched.benchmarks.methods import Method
from learnsched.benchmarks.search import Budget
from learnsched.benchmarks.training import train, tune
from learnsched.data import DataSet, load
from learnsched.meta import processes
from learnsched.meta.tasks import Task, task_of
from learnsched.schedule import Policy

QUICK = Budget(rounds=1, trials=6, trial_runs=2, runs=8)


def _task(*row: str | int, fine_tuned: bool = False) -> Task:
    return task_of(
        row,
        batch=64,
        bits="ternary/2-bit",
        learning_rates=(0.01,),
        fine_tuning=fine_tuned,
        seed=77_000,
    )


# Other seeds, another width, another depth, a horizon twice the longest of meta-training.
HELD_OUT: dict[str, Task] = {
    "other seeds": _task("mnist1d", "cnn1d", 8, 4, 8, 20),
    "other seeds, mlp": _task("mnist1d", "mlp", 32, 4, 12, 15),
    "other width": _task("mnist1d", "cnn1d", 24, 4, 10, 30),
    "other depth": _task("mnist1d", "cnn1d", 8, 7, 12, 25),
    "fine-tuned": _task("mnist1d", "cnn1d", 10, 4, 8, 20, fine_tuned=True),
    "twice the horizon": _task("mnist1d", "cnn1d", 20, 4, 40, 20),
}


QUICK_TASKS = {"other seeds": HELD_OUT["other seeds"]}


def compare(
    methods: Sequence[Method],
    tasks: Mapping[str, Task],
    budget: Budget,
    *,
    seed: int = 0,
    progress: Callable[[dict[str, Any]], None] | None = None,
    done: Sequence[Mapping[str, Any]] = (),
) -> list[dict[str, Any]]:
    """One record for each task and method, test accuracies of all runs in it.

    Under torchrun each rank takes one job of a round; every rank gets all records of the round.

    Args:
        methods: what to compare.
        tasks: by name.
        budget: the same for every method.
        seed: of the search.
        progress: called with each record as it is made.
        done: records of an interrupted comparison, which are not made again.
    """
    jobs = {
        (name, method.name): (name, task, method)
        for name, task in tasks.items()
        for method in methods
    }
    data = functools.cache(load)

    def work(job: tuple[str, Task, Method]) -> list[dict[str, Any]]:
        name, task, method = job
        return [_record(name, task, method, data(task.data), budget, seed)]

    def report(made: list[dict[str, Any]], _: list[dict[str, Any]]) -> None:
        if progress is not None:
            for record in made:
                progress(record)

    return completed(done, jobs, work, lambda record: (record["task"], record["method"]), report)


def _record(
    name: str, task: Task, method: Method, data: DataSet, budget: Budget, seed: int
) -> dict[str, Any]:
    start = time.perf_counter()
    found = tune(method, task, data, budget, seed)
    rate, policy = found.learning_rate, found.policy
    final = replace(task, seed=task.seed + 1)
    test = train(method, final, data, [rate], [policy], budget.runs, data.test)
    return {
        "task": name,
        "cell": task.name,
        "method": method.name,
        "learning_rate": rate,
        "policy": _told(policy),
        "validation": found.validation,
        "test": test.flatten().tolist(),
        "seconds": time.perf_counter() - start,
        "commit": describe()["commit"],
    }


def _told(policy: Policy | None) -> dict[str, Any] | str | None:
    """A policy as JSON data: its fields, if it is a dataclass."""
    if is_dataclass(policy) and not isinstance(policy, type):
        return asdict(policy)
    return None if policy is None else repr(policy)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    from learnsched.pretrained import load_pretrained

    parser = command_line(
        __doc__, quick="one task, a small budget", json=GOES_ON, seed="of the search", artefact=True
    )
    parser.add_argument("--tasks", nargs="*", choices=list(HELD_OUT), help="all of them if omitted")
    parser.add_argument("--hand-coded", action="store_true", help="leave the learned schedule out")
    options = parser.parse_args(arguments)
    with one_of_the_ranks():
        names = options.tasks or list(QUICK_TASKS if options.quick else HELD_OUT)
        methods = [*field.rivals(), field.upper_bound()]
        content = {"seed": options.seed, "quick": options.quick, "artefact": options.artefact}
        if not options.hand_coded:
            policy = load_pretrained(options.artefact)
            methods = [field.learned(policy), field.start_of(policy), *methods]
            content["schedule"] = repr(policy)  # a file of that name may have changed
        done = stored_records(options.json, **content)

        def keep(record: dict[str, Any]) -> None:
            mean = sum(record["test"]) / len(record["test"])
            if processes.rank() == 0:
                print(f"{record['task']:20} {record['method']:32} {100 * mean:5.1f} %", flush=True)
                done.append(record)
                write_results(options.json, {**content, "records": done})

        records = compare(
            methods,
            {name: HELD_OUT[name] for name in names},
            QUICK if options.quick else Budget(),
            seed=options.seed,
            progress=keep,
            done=list(done),
        )
        if processes.rank() == 0:
            print(table(records))


if __name__ == "__main__":
    main()
