"""Time and peak memory of one unrolled gradient: recomputed epochs, one full graph, TorchOpt.

    python -m learnsched.benchmarks.unroll [--quick] [--seed N] [--json PATH] [--rounds N]
                                           [--optimizer adam momentum]

All three differentiate the same runs of the same networks under the same schedule:

- *recomputed* is :class:`learnsched.meta.unrolled.Unrolled`, which keeps one epoch's graph at a time;
- *full graph* is the same inner loop with one graph over the whole run;
- *torchopt* is that with TorchOpt's differentiable optimizers in place of ``higher``, if it is
  installed. Its Adam has ε elsewhere in the formula, which is another run where gradients are small;
  momentum is the same formula in both, so there the gradients must agree.

Each measurement has a process of its own, since a peak never falls; methods take turns, so that other
load on the machine meets all alike. Times are CPU seconds of one thread, of the second gradient.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from learnsched.benchmarks.command_line import RESULTS, command_line
from learnsched.benchmarks.environment import write_results
from learnsched.data import load
from learnsched.meta.inner import InnerLoop, InnerState, member_losses
from learnsched.meta.inner_optimizers import Adam
from learnsched.meta.rollout import table_rollout, terminal_settings
from learnsched.meta.tasks import task_of
from learnsched.meta.unrolled import Unrolled
from learnsched.policies import BaseCurve
from learnsched.schedule import plan

_RATES = {"adam": 0.01, "momentum": 0.1}
_MEMBERS = 8


def recomputed(inner: InnerLoop, table: Tensor) -> Tensor:
    """The gradient in the schedule, memory flat in the horizon."""
    return Unrolled()(inner, table_rollout(table)).gradient


def full_graph(inner: InnerLoop, table: Tensor) -> Tensor:
    """The same gradient from one graph."""
    leaf = table.clone().requires_grad_()
    state = _with_graph(inner)
    for epoch, settings in enumerate(leaf):
        state, _ = inner.epoch(state, settings, epoch, track=True)
    (gradient,) = torch.autograd.grad(inner.outer_loss(state, leaf[-1]).sum(), leaf)
    return gradient


def torchopt_graph(inner: InnerLoop, table: Tensor) -> Tensor:
    """The same gradient from one graph, its updates made by TorchOpt."""
    loop = _TorchOptLoop(
        inner.population, inner.batches, inner.learning_rate, optimizer=inner.optimizer
    )
    return loop.gradient(table)


class _TorchOptLoop(InnerLoop):
    def gradient(self, table: Tensor) -> Tensor:
        import torchopt

        leaf = table.clone().requires_grad_()
        total = self.batches.order.shape[:2].numel()
        maximum = float(self.learning_rate[0])

        def rate(count: Tensor) -> Tensor:  # TorchOpt has no cosine schedule, but takes a function
            return 0.5 * maximum * (1 + torch.cos(torch.pi * count / total))

        if isinstance(self.optimizer, Adam):
            optimizer = torchopt.adam(
                rate, eps=self.optimizer.eps, eps_root=1e-14, moment_requires_grad=True
            )
        else:
            optimizer = torchopt.sgd(rate, momentum=0.9, moment_requires_grad=True)
        state = _with_graph(self)
        names = [name for name, _ in self.population.named_parameters()]
        parameters = dict(zip(names, state.tensors, strict=False))
        carried = state.tensors[self._carried_from :]
        moments = optimizer.init(parameters)
        for epoch, settings in enumerate(leaf):
            carried = self._freeze(list(parameters.values()), carried, settings, epoch)
            replaced = {
                **self.population.noise_buffers(settings),
                **self._carried_buffers(carried),
            }
            parameters = {name: p.clone() for name, p in parameters.items()}
            for index in self.batches.order[epoch]:
                logits = functional_call(
                    self.population, parameters, (self.batches.x[index], replaced)
                )
                loss = member_losses(logits, self.batches.y[index]).sum()
                found = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
                updates, moments = optimizer.update(
                    dict(zip(names, found, strict=True)), moments, inplace=False
                )
                parameters = torchopt.apply_updates(parameters, updates, inplace=False)
        unused = state.tensors[len(names) : self._carried_from]
        end = InnerState((*parameters.values(), *unused, *carried), total)
        (gradient,) = torch.autograd.grad(self.outer_loss(end, leaf[-1]).sum(), leaf)
        return gradient


METHODS: dict[str, Callable[[InnerLoop, Tensor], Tensor]] = {
    "recomputed": recomputed,
    "full graph": full_graph,
    "torchopt": torchopt_graph,
}


def _with_graph(inner: InnerLoop) -> InnerState:
    state = inner.initial()
    return InnerState(tuple(t.requires_grad_() for t in state.tensors), state.step)


def measure(method: str, optimizer: str, horizon: int, steps: int, seed: int) -> dict[str, Any]:
    """CPU seconds of the gradient, MiB that it adds to the process's peak, and the gradient."""
    torch.set_num_threads(1)
    task = task_of(
        ("digits", "cnn2d", 6, 4, horizon, steps),
        batch=32,
        bits="ternary/2-bit",
        learning_rates=(_RATES[optimizer],) * _MEMBERS,
        fine_tuning=False,
        seed=seed,
        optimizer=optimizer,
    )
    inner = task.build(load("digits"))
    rows = plan(BaseCurve(), inner.run).table.float()
    table = rows.unsqueeze(1).expand(-1, _MEMBERS, -1, -1)
    table = torch.stack([terminal_settings(row, inner.run, e) for e, row in enumerate(table)])
    before = _peak()
    gradient = METHODS[method](inner, table)
    mib = _peak() - before
    start = time.process_time()
    METHODS[method](inner, table)
    return {
        "method": method,
        "optimizer": optimizer,
        "horizon": horizon,
        "steps": steps,
        "seconds": time.process_time() - start,
        "mib": mib,
        "gradient": gradient.flatten().tolist(),
    }


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Ratios within the run of one optimizer, in words; of several rounds the fastest counts."""

    def best(method: str, horizon: int, what: str) -> float:
        found = [r[what] for r in rows if (r["method"], r["horizon"]) == (method, horizon)]
        return float(min(found))

    def ratio(what: str, method: str, horizon: int, other: str, to: int) -> float:
        return best(method, horizon, what) / best(other, to, what)

    short, long = (f(r["horizon"] for r in rows) for f in (min, max))
    optimizer = rows[0]["optimizer"]
    lines = [
        f"{optimizer}: recomputed, memory at {long} epochs over {short}: "
        f"{ratio('mib', 'recomputed', long, 'recomputed', short):.2f}"
    ]
    for method in dict.fromkeys(r["method"] for r in rows):
        if method == "full graph":
            continue
        for horizon in (short, long):
            lines.append(
                f"{optimizer}: {method} over full graph at {horizon} epochs: "
                f"time {ratio('seconds', method, horizon, 'full graph', horizon):.2f}, "
                f"memory {ratio('mib', method, horizon, 'full graph', horizon):.2f}, "
                f"cosine of gradients {best(method, horizon, 'cosine'):.6f}"
            )
    return lines


def main() -> None:
    """The command line."""
    parser = command_line(__doc__, quick="two steps an epoch, one round", json=RESULTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--optimizer", nargs="+", choices=_RATES, default=list(_RATES))
    parser.add_argument("--method", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--horizon", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    steps = 2 if options.quick else 5
    if options.method:
        print(
            json.dumps(
                measure(options.method, options.optimizer[0], options.horizon, steps, options.seed)
            )
        )
        return
    methods = list(METHODS)
    if importlib.util.find_spec("torchopt") is None:
        methods.remove("torchopt")
        print("torchopt is not installed: left out")
    rows: list[dict[str, Any]] = []
    lines: list[str] = []
    for optimizer in options.optimizer:
        mine = [
            _in_a_process(method, optimizer, horizon, options)
            for _ in range(1 if options.quick else options.rounds)
            for horizon in (10, 40)
            for method in methods
        ]
        _compare(mine)
        lines += summary(mine)
        rows += mine
    print("\n".join(lines))
    write_results(options.json, {"seed": options.seed, "summary": lines, "rows": rows})


def _compare(rows: Sequence[dict[str, Any]]) -> None:
    """Put in place of each gradient its cosine with that of the full graph."""
    full = {r["horizon"]: r["gradient"] for r in rows if r["method"] == "full graph"}
    for row in rows:
        ours, theirs = (
            torch.tensor(gradient, dtype=torch.float64)
            for gradient in (row.pop("gradient"), full[row["horizon"]])
        )
        row["cosine"] = float(torch.cosine_similarity(ours, theirs, dim=0))


def _in_a_process(
    method: str, optimizer: str, horizon: int, options: argparse.Namespace
) -> dict[str, Any]:
    command = [
        sys.executable, "-m", "learnsched.benchmarks.unroll", "--method", method,
        "--horizon", str(horizon), "--seed", str(options.seed),
        "--optimizer", optimizer, *["--quick"] * options.quick,
    ]  # fmt: skip
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    row: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    print(
        f"{optimizer:>8}, {method:>10}, {horizon:2} epochs: {row['mib']:6.0f} MiB, "
        f"{row['seconds']:6.1f} CPU s",
        flush=True,
    )
    return row


if __name__ == "__main__":
    main()
