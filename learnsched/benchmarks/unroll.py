"""Peak memory and time of one unrolled gradient over the horizon.

    python -m learnsched.benchmarks.unroll [--quick] [--seed N] [--json PATH]

Each horizon runs in a process of its own, since a peak never falls.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from learnsched.benchmarks.environment import describe
from learnsched.data import load
from learnsched.files import write_text
from learnsched.meta.estimators import Unrolled, policy_rollout
from learnsched.meta.tasks import Task
from learnsched.policies import LearnedPolicy, MetaNetwork


def measure(horizon: int, steps: int, seed: int) -> dict[str, Any]:
    """Seconds of the gradient and MiB that it adds to the peak of the process."""
    torch.set_num_threads(1)
    data = load("digits")
    rates = (0.01,) * 8
    task = Task("cnn2d", "digits", 6, 4, horizon, steps, 32, "ternary/2-bit", rates, False, seed)
    inner = task.build(data)
    before = _peak()
    start = time.perf_counter()
    Unrolled()(inner, policy_rollout(LearnedPolicy(MetaNetwork()), inner.run, len(rates)))
    seconds = time.perf_counter() - start
    return {"horizon": horizon, "steps": steps, "seconds": seconds, "mib": _peak() - before}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two steps an epoch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--horizon", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    steps = 2 if options.quick else 5
    if options.horizon:
        print(json.dumps(measure(options.horizon, steps, options.seed)))
        return
    rows = []
    for horizon in (10, 20, 40):
        command = [sys.executable, "-m", "learnsched.benchmarks.unroll", *sys.argv[1:]]
        command += ["--horizon", str(horizon)]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        rows.append(json.loads(result.stdout))
        row = rows[-1]
        print(f"{horizon:3} epochs: {row['mib']:6.0f} MiB, {row['seconds']:6.1f} s", flush=True)
    if options.json:
        content = {"environment": describe(), "seed": options.seed, "rows": rows}
        write_text(options.json, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
