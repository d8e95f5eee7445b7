"""Which learned schedule is the best on meta-training's validation tasks, with fresh seeds?

    torchrun --standalone --nproc-per-node 2 -m learnsched.benchmarks.selection ARTEFACT [ARTEFACT ...]
                       [--noise as-made shared own] [--seed N ...] [--preset P] [--quick] [--json PATH]

Artefacts are names or paths. Each is compared with the base curve that it starts from, on the same
runs: the validation tasks of the preset, with seeds that neither training nor its validation saw; no
test data. ``--noise shared own`` asks whether its noise should be shared by the layers, by taking both.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from learnsched.benchmarks.environment import stored_records, write_results
from learnsched.data import load
from learnsched.intervals import interval
from learnsched.meta import distribution
from learnsched.meta.presets import PRESETS
from learnsched.meta.tasks import Task
from learnsched.meta.validation import hard_errors
from learnsched.policies import LearnedPolicy, MetaNetwork
from learnsched.tables import markdown

BASE = "base curve"
_SHARED = {"shared": True, "own": False}


def candidates(names: Sequence[str], noises: Sequence[str]) -> dict[str, LearnedPolicy]:
    """The base curve of the first artefact, then every artefact with every kind of noise.

    Example:
        >>> list(candidates(["default"], ["as-made", "own"]))
        ['base curve', 'default', 'default, own noise']
    """
    from learnsched.pretrained import load_pretrained

    policies = {name: load_pretrained(name) for name in names}
    first = policies[names[0]]
    found = {BASE: LearnedPolicy(MetaNetwork(), first.base, first.domain)}
    for name, policy in policies.items():
        for noise in noises:
            if noise == "as-made":
                found[name] = policy
                continue
            changed = copy.copy(policy)
            changed.shared_noise = _SHARED[noise]
            found[f"{name}, {noise} noise"] = changed
    return found


def fresh(tasks: Sequence[Task], seed: int) -> list[Task]:
    """The tasks with other seeds; those of meta-training's validation have no ``seed``."""
    return [replace(task, seed=task.seed + 10_000 * (1 + seed)) for task in tasks]


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: accuracy under the base curve in %, then the points that each candidate gains."""
    found = {(r["task"], r["seed"], r["policy"]): 1 - np.asarray(r["errors"]) for r in records}
    names = [n for n in dict.fromkeys(r["policy"] for r in records) if n != BASE]
    gains: dict[str, dict[str, list[np.ndarray]]] = {}
    base: dict[str, list[float]] = {}
    for (task, seed, name), accuracy in found.items():
        if name == BASE:
            base.setdefault(task, []).append(float(accuracy.mean()))
        elif (task, seed, BASE) in found:
            gain = accuracy - found[task, seed, BASE]
            gains.setdefault(task, {}).setdefault(name, []).append(gain)
    rows = [["task", BASE, *names]]
    for task, by_name in gains.items():
        cells = [
            interval(np.concatenate(by_name[n])).text("+") if n in by_name else "" for n in names
        ]
        rows.append([task, f"{100 * np.mean(base[task]):.1f}", *cells])
    every = [
        np.concatenate([g for by_name in gains.values() for g in by_name.get(n, [])]) for n in names
    ]
    rows.append(["all runs", f"{100 * np.mean(np.concatenate(list(base.values()))):.1f}",
                 *(interval(gain).text("+") for gain in every)])  # fmt: skip
    return markdown(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artefacts", nargs="*", default=["default"], help="names or paths")
    parser.add_argument("--noise", nargs="+", choices=("as-made", *_SHARED), default=["as-made"])
    parser.add_argument("--preset", choices=PRESETS, default="standard", help="whose tasks")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="of the tasks")
    parser.add_argument("--quick", action="store_true", help="two runs of one task")
    parser.add_argument("--json", type=Path, help="write records here; those there are kept")
    options = parser.parse_args(arguments)
    distribution.start()
    torch.set_num_threads(1)  # the tensors are small: threads cost more than they bring
    policies = candidates(options.artefacts, options.noise)
    tasks = PRESETS[options.preset].trainer.validation
    if options.quick:
        tasks = (replace(tasks[0], learning_rates=tasks[0].learning_rates[:2]),)
    records = stored_records(options.json)
    done = {(r["task"], r["seed"], r["policy"]) for r in records}
    jobs = [
        (task, seed, name)
        for seed in options.seed
        for task in fresh(tasks, seed)
        for name in policies
        if (task.name, seed, name) not in done
    ]

    def measure(job: tuple[Task, int, str]) -> dict[str, Any]:
        task, seed, name = job
        errors = hard_errors(policies[name], task, load(task.data)).tolist()
        return {"task": task.name, "seed": seed, "policy": name, "errors": errors}

    for made in distribution.shared(jobs, measure):
        records += made
        if distribution.rank() == 0:
            write_results(options.json, {"records": records})
    if distribution.rank() == 0:
        print(table(records))
    distribution.stop()


if __name__ == "__main__":
    main()
