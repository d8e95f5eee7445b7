"""Outer steps an hour of a meta-training preset, on ranks and threads, and where their time goes.

    python -m learnsched.benchmarks.outer_steps [--quick] [--seed N] [--json PATH] [--steps N]
                                                [--preset NAME]

Each variant is ``meta_train``'s own trainer on the preset's mix in processes of its own, from the same
seed and so on the same tasks: one rank with one thread, one rank with two threads, two ranks with one
thread each. They take turns, one outer step after the other. The profile is of one step of preset
``quick`` on one rank: a step of the others has so many operations that their record fills the memory.
Validation is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from learnsched.benchmarks.command_line import RESULTS, command_line
from learnsched.benchmarks.environment import write_results
from learnsched.files import write_text
from learnsched.meta import processes
from learnsched.meta.mix import Mix
from learnsched.meta.presets import PRESETS
from learnsched.meta.tasks import Task
from learnsched.meta.trainer import MetaTrainer
from learnsched.policies import LearnedPolicy, MetaNetwork
from learnsched.tables import markdown

# Ranks and threads of each.
VARIANTS = {"1 rank": (1, 1), "1 rank, 2 threads": (1, 2), "2 ranks": (2, 1)}
_TOP = 8


@dataclass(frozen=True)
class _Later(Mix):
    """A mix as it is after the outer steps before ``first``."""

    first: int = 0

    def sample(self, seed: int, outer_step: int) -> list[Task]:
        return super().sample(seed, self.first + outer_step)


def work(preset: str, seed: int, step: int, threads: int, *, profile: bool) -> dict[str, Any]:
    """Take one outer step: its wall and CPU seconds on this rank, or what it spent them on."""
    torch.set_num_threads(threads)
    chosen = PRESETS[preset]
    mix = _Later(**vars(chosen.trainer.mix), first=step)
    config = replace(chosen.trainer, mix=mix, seed=seed, validation=())
    processes.start()
    torch.manual_seed(seed)
    policy = LearnedPolicy(MetaNetwork(), chosen.base, chosen.domain)
    with tempfile.TemporaryDirectory() as folder:
        data = config.load_data()
        trainer = MetaTrainer(policy, config, folder, data, chosen.estimator)
        processes.barrier()
        start, spent = time.perf_counter(), time.process_time()
        if profile:
            result = _profiled(trainer)
        else:
            trainer.run(1)
            result = {}
        result["seconds"] = time.perf_counter() - start
        result["cpu_seconds"] = time.process_time() - spent
    processes.stop()
    return result


def _profiled(trainer: MetaTrainer) -> dict[str, Any]:
    """The operations that take most of an outer step, as shares of the time in all operations."""
    activity = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        trainer.run(1)
    events = sorted(profiler.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(e.self_cpu_time_total for e in events)
    calls = sum(e.count for e in events)
    return {
        "operations": calls,
        "microseconds_an_operation": total / calls,
        "top": [
            {"name": e.key, "share": e.self_cpu_time_total / total, "calls": e.count}
            for e in events[:_TOP]
        ],
    }


def _in_processes(
    preset: str, seed: int, step: int, ranks: int, threads: int, *, profile: bool = False
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
            str(ranks), "-m", "learnsched.benchmarks.outer_steps", "--preset", preset,
            "--seed", str(seed), "--step", str(step), "--threads", str(threads),
            "--json", str(path), *["--profile"] * profile,
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True)
        result: dict[str, Any] = json.loads(path.read_text())
    return result


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of the variants; ratios are medians over the steps that all have taken."""
    seconds = {name: [r["seconds"] for r in rows if r["variant"] == name] for name in VARIANTS}
    lines = [["", "outer steps an hour", "times 1 rank, median"]]
    for name, spent in seconds.items():
        ratios = [one / own for one, own in zip(seconds["1 rank"], spent, strict=True)]
        rate = 3600 / statistics.fmean(spent)
        lines.append([name, f"{rate:.0f}", f"{statistics.median(ratios):.2f}"])
    return markdown(lines)


def main() -> None:
    """The command line."""
    parser = command_line(__doc__, quick="one step of the preset quick", json=RESULTS)
    parser.add_argument("--preset", choices=PRESETS, default="standard")
    parser.add_argument("--steps", type=int, default=12, help="outer steps of each variant")
    parser.add_argument("--step", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--profile", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step is not None:
        first = os.environ.get("RANK", "0") == "0"
        result = work(
            options.preset, options.seed, options.step, options.threads, profile=options.profile
        )
        if first:
            write_text(options.json, json.dumps(result))
        return
    if options.quick:
        options.preset, options.steps = "quick", 1
    rows: list[dict[str, Any]] = []
    for step in range(options.steps):
        for name, (ranks, threads) in VARIANTS.items():
            result = _in_processes(options.preset, options.seed, step, ranks, threads)
            rows.append({"variant": name, "step": step, **result})
            print(f"step {step}, {name}: {rows[-1]['seconds']:.1f} s", flush=True)
    profile = _in_processes("quick", options.seed, 0, 1, 1, profile=True)
    print(table(rows))
    print(
        f"\n{profile['operations']} operations of {profile['microseconds_an_operation']:.0f} µs "
        "in an outer step of preset quick; the largest:"
    )
    for entry in profile["top"]:
        print(f"  {100 * entry['share']:4.1f} %  {entry['name']}, {entry['calls']} calls")
    write_results(
        options.json,
        {"preset": options.preset, "seed": options.seed, "rows": rows, "profile": profile},
    )


if __name__ == "__main__":
    main()
