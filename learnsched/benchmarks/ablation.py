"""What each part of a learned schedule is worth: the same schedule with one part taken out.

    torchrun --standalone --nproc-per-node 2 -m learnsched.benchmarks.ablation [--artefact default]
                                                        [--quick] [--json PATH]

Nothing is trained again: this tells what the schedule uses, not what one without the part could
learn. The learning rate of every variant is searched on validation data, with the same rates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from learnsched.benchmarks import methods as field
from learnsched.benchmarks.campaign import one_of_the_ranks, stored_records
from learnsched.benchmarks.command_line import GOES_ON, command_line
from learnsched.benchmarks.environment import write_results
from learnsched.benchmarks.held_out import HELD_OUT
from learnsched.benchmarks.methods import Method
from learnsched.benchmarks.search import Budget
from learnsched.benchmarks.transfer import transfer
from learnsched.intervals import interval
from learnsched.meta import processes
from learnsched.meta.estimators import Rollout
from learnsched.meta.inner import InnerLoop
from learnsched.meta.rollout import table_rollout
from learnsched.policies import LearnedPolicy, MetaNetwork
from learnsched.schedule import (
    BACKWARD_STDS,
    FIELDS,
    FORWARD_STDS,
    FRACTION,
    Policy,
    plan,
)
from learnsched.tables import markdown

TASKS = ("other seeds", "fine-tuned", "other width", "twice the horizon")
_SHOWN = Budget(rounds=1, trials=8, trial_runs=2, runs=24)
_QUICK = Budget(rounds=1, trials=2, trial_runs=1, runs=2)


@dataclass(frozen=True)
class Ablated(Method):
    """A learned method whose settings, shape ``(members, layers, len(FIELDS))``, are changed."""

    change: Callable[[Tensor], Tensor] = torch.clone

    def rollout(self, inner: InnerLoop, policies: list[Policy]) -> Rollout:
        whole = super().rollout(inner, policies)
        return lambda epoch, telemetry: self.change(whole(epoch, telemetry))


@dataclass(frozen=True)
class Blind(Method):
    """A learned method that is shown no telemetry: its plan, made before training."""

    def rollout(self, inner: InnerLoop, policies: list[Policy]) -> Rollout:
        return table_rollout(_planned(self, inner))


@dataclass(frozen=True)
class Unscheduled(Method):
    """A learned method whose backward noise stays, in each layer, at its plan's geometric mean."""

    def rollout(self, inner: InnerLoop, policies: list[Policy]) -> Rollout:
        whole = super().rollout(inner, policies)
        mean = _planned(self, inner)[..., list(BACKWARD_STDS)].log().mean(0).exp()

        def rollout(epoch: int, telemetry: Any) -> Tensor:
            settings = whole(epoch, telemetry).clone()
            settings[..., list(BACKWARD_STDS)] = mean
            return settings

        return rollout


class LayersAlike(MetaNetwork):
    """A meta-network that is shown, for every layer, the mean over the layers.

    What the base curve makes of each layer stays.
    """

    def forward(self, features: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(features.mean(-2, keepdim=True).expand_as(features), state)


def _planned(method: Method, inner: InnerLoop) -> Tensor:
    """Settings of all members with telemetry at rest, horizon first."""
    if method.learned is None:
        raise TypeError(f"{method.name} has no learned policy to plan with")
    table = plan(method.learned, inner.run).table.float()
    return table.unsqueeze(1).expand(-1, inner.population.members, -1, -1)


def variants(policy: LearnedPolicy) -> list[Method]:
    """The whole schedule first, then without each part."""

    def without(*columns: int) -> Callable[[Tensor], Tensor]:
        keep = torch.ones(len(FIELDS))
        keep[list(columns)] = 0
        return lambda settings: settings * keep.to(settings)

    whole = field.learned(policy)
    shared: dict[str, Any] = {"noise": whole.noise, "partition": whole.partition, "learned": policy}
    found = [
        whole,
        Ablated("without early freezing", **shared, change=without(FRACTION)),
        Ablated("without forward noise", **shared, change=without(*FORWARD_STDS)),
        Unscheduled("with constant backward noise", **shared),
        Blind("without telemetry", **shared),
    ]
    if policy.shared_noise:
        apart = policy.replaced(shared_noise=False)
        found.append(replace(whole, name="noise of its own in each layer", learned=apart))
    network = LayersAlike(policy.network.hidden, policy.network.embedding)
    network.load_state_dict(policy.network.state_dict())
    alike = policy.replaced(network=network)
    found.append(replace(whole, name="without inputs of the layers", learned=alike))
    return found


def table(records: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> str:
    """Markdown: accuracy of the whole in %, then what each variant loses, paired over seeds."""
    found = {(r["cell"], r["method"]): np.asarray(r["test"]) for r in records}
    names = list(dict.fromkeys(r["method"] for r in records))
    rows = [["variant", *tasks]]
    for name in names:
        row = [name]
        for task in tasks:
            whole = found[HELD_OUT[task].name, names[0]]
            here = found[HELD_OUT[task].name, name]
            if name == names[0]:
                row.append(f"{100 * whole.mean():.1f}")
                continue
            row.append(interval(here - whole).text("+"))
        rows.append(row)
    return markdown(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    from learnsched.pretrained import load_pretrained

    parser = command_line(
        __doc__, quick="one task, few trials and seeds", json=GOES_ON, seed=None, artefact=True
    )
    options = parser.parse_args(arguments)
    with one_of_the_ranks():
        tasks = TASKS[:1] if options.quick else TASKS
        policy = load_pretrained(options.artefact)
        content = {
            "quick": options.quick, "artefact": options.artefact, "schedule": repr(policy),
        }  # fmt: skip

        def keep(records: list[dict[str, Any]]) -> None:
            if processes.rank() == 0:
                write_results(options.json, {**content, "records": records})

        records = transfer(
            [(method, None) for method in variants(policy)],
            {"task": {name: HELD_OUT[name] for name in tasks}},
            _QUICK if options.quick else _SHOWN,
            done=stored_records(options.json, **content),
            progress=keep,
        )
        if processes.rank() == 0:
            print(table(records, tasks))


if __name__ == "__main__":
    main()
