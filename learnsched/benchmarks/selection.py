"""Which learned schedule is the best on meta-training's validation tasks, with fresh seeds?

    torchrun --standalone --nproc-per-node 2 -m learnsched.benchmarks.selection ARTEFACT [ARTEFACT ...]
                       [--change CHANGE ...] [--seed N ...] [--preset P] [--quick] [--json PATH]

Artefacts are names or paths. Each is compared with the base curve that it starts from, on the same
runs: the validation tasks of the preset, with seeds that neither training nor its validation saw; no
test data. ``--change shared-noise own-noise`` asks whether its noise should be shared by the layers, by
taking both; ``--change as-made further`` whether its network should put out more than it does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from learnsched.benchmarks.campaign import one_of_the_ranks, recorded
from learnsched.benchmarks.command_line import KEEPS, command_line
from learnsched.data import load
from learnsched.intervals import interval
from learnsched.meta import processes
from learnsched.meta.presets import PRESETS
from learnsched.meta.tasks import Task
from learnsched.meta.validation import hard_errors
from learnsched.policies import LearnedPolicy, MetaNetwork
from learnsched.tables import markdown

BASE = "base curve"
_FURTHER = 1.6


def further(policy: LearnedPolicy) -> LearnedPolicy:
    """The same policy, whose network puts out 1.6 times as much: has meta-training stopped short?"""
    network = copy.deepcopy(policy.network)
    with torch.no_grad():
        for parameter in network.out.parameters():
            parameter.mul_(_FURTHER)
    return policy.replaced(network=network)


# Of an artefact, by the words of the command line.
_CHANGES: dict[str, Callable[[LearnedPolicy], LearnedPolicy]] = {
    "as-made": lambda policy: policy,
    "shared-noise": lambda policy: policy.replaced(shared_noise=True),
    "own-noise": lambda policy: policy.replaced(shared_noise=False),
    "moved-start": lambda policy: policy.replaced(moved_start=True),
    "further": further,
}


def candidates(names: Sequence[str], changes: Sequence[str]) -> dict[str, LearnedPolicy]:
    """The base curve of the first artefact, then every artefact with every change.

    Example:
        >>> list(candidates(["default"], ["as-made", "own-noise"]))
        ['base curve', 'default', 'default, own noise']
    """
    from learnsched.pretrained import load_pretrained

    policies = {name: load_pretrained(name) for name in names}
    first = policies[names[0]]
    found = {BASE: LearnedPolicy(MetaNetwork(), first.base, first.domain)}
    for name, policy in policies.items():
        for change in changes:
            suffix = "" if change == "as-made" else f", {change.replace('-', ' ')}"
            found[name + suffix] = _CHANGES[change](policy)
    return found


def fresh(tasks: Sequence[Task], seed: int) -> list[Task]:
    """The tasks with other seeds; those of meta-training's validation have no ``seed``."""
    return [replace(task, seed=task.seed + 10_000 * (1 + seed)) for task in tasks]


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: accuracy under the base curve in %, then the points that each candidate gains."""
    accuracy = {(r["task"], r["seed"], r["policy"]): 1 - np.asarray(r["errors"]) for r in records}
    tasks, policies = (list(dict.fromkeys(r[key] for r in records)) for key in ("task", "policy"))
    names = [name for name in policies if name != BASE]

    def runs(group: Sequence[str], name: str) -> list[tuple[str, int]]:
        return [(task, seed) for task, seed, policy in accuracy if task in group and policy == name]

    def level(group: Sequence[str]) -> str:
        return f"{100 * np.mean([accuracy[*run, BASE].mean() for run in runs(group, BASE)]):.1f}"

    def gained(group: Sequence[str], name: str) -> str:
        both = [run for run in runs(group, name) if (*run, BASE) in accuracy]
        gains = [accuracy[*run, name] - accuracy[*run, BASE] for run in both]
        return interval(np.concatenate(gains)).text("+") if gains else ""

    groups = {task: [task] for task in tasks} | {"all runs": tasks}
    cells = [
        [label, level(group), *(gained(group, name) for name in names)]
        for label, group in groups.items()
    ]
    return markdown([["task", BASE, *names], *cells])


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = command_line(__doc__, quick="two runs of one task", json=KEEPS, seed=None)
    parser.add_argument("artefacts", nargs="*", default=["default"], help="names or paths")
    parser.add_argument(
        "--change", nargs="+", choices=_CHANGES, default=["as-made"], help="of what they are"
    )
    parser.add_argument("--preset", choices=PRESETS, default="standard", help="whose tasks")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="of the tasks")
    options = parser.parse_args(arguments)
    policies = candidates(options.artefacts, options.change)
    tasks = PRESETS[options.preset].trainer.validation
    if options.quick:
        tasks = (replace(tasks[0], learning_rates=tasks[0].learning_rates[:2]),)
    jobs = {
        (task.name, seed, name): (task, seed, name)
        for seed in options.seed
        for task in fresh(tasks, seed)
        for name in policies
    }

    def measure(job: tuple[Task, int, str]) -> list[dict[str, Any]]:
        task, seed, name = job
        errors = hard_errors(policies[name], task, load(task.data)).tolist()
        return [{"task": task.name, "seed": seed, "policy": name, "errors": errors}]

    with one_of_the_ranks():
        records = recorded(
            options.json,
            jobs,
            measure,
            lambda record: (record["task"], record["seed"], record["policy"]),
            preset=options.preset,
            quick=options.quick,
        )
        if processes.rank() == 0:
            print(table(records))


if __name__ == "__main__":
    main()
