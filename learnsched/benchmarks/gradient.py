"""Is the meta-gradient right? The unrolled gradient against evolution strategies, in the real regime.

    python -m learnsched.benchmarks.gradient [--quick] [--seed N] [--json PATH]
                                             [--noise NAME ...] [--steps N ...] [--width N ...]

Both estimate the gradient of the hard network's validation loss with respect to a schedule of a few
coordinates: the values of each output at the beginning and at the end of the run, all layers alike.
Each seed is a network with its own data order. Evolution strategies have noise of their own: the
agreement of one half of their pairs with the other says how much, and what agreement a perfect
gradient could reach.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from learnsched.benchmarks.environment import describe
from learnsched.data import DataSet, load
from learnsched.files import write_text
from learnsched.meta.estimators import Unrolled, policy_rollout, run_forward
from learnsched.meta.evolution import EvolutionStrategies, project, tangent_basis
from learnsched.meta.tasks import Task
from learnsched.policies import BaseCurve, LearnedPolicy, MetaNetwork

_KNOTS = 2

ESTIMATORS = {"unrolled": Unrolled(), "unrolled, damped by ½": Unrolled(damping=0.5)}


def measure(
    data: DataSet,
    *,
    noise: str,
    horizon: int,
    steps: int,
    width: int,
    learning_rate: float,
    seeds: int,
    pairs: int,
    seed: int,
    base: BaseCurve,
) -> dict[str, Any]:
    """Agreement of the two estimators on one kind of run.

    Args:
        data: MNIST-1D.
        noise: shape of the noise.
        horizon: epochs.
        steps: optimizer steps of the run.
        width: channels of the four-layer network.
        learning_rate: maximum of the cosine schedule.
        seeds: networks, each with a gradient of its own.
        pairs: antithetic pairs of the reference, for each network.
        seed: of all random numbers.
        base: the schedule at which gradients are taken.
    """
    task = Task(
        "cnn1d", "mnist1d", width, 4, horizon, steps // horizon, 32, "ternary/2-bit",
        (learning_rate,) * seeds, False, seed,
    )  # fmt: skip
    inner = task.build(data, noise=noise)
    policy = LearnedPolicy(MetaNetwork(), base, open_loop=True)

    def rollout() -> Any:
        return policy_rollout(policy, inner.run, seeds)

    start = time.perf_counter()
    table = run_forward(inner, rollout())[1].detach()
    basis = tangent_basis(table, _KNOTS, by_layer=False)
    halves = []
    for half in (0, 1):
        reference = EvolutionStrategies(
            pairs // 2, knots=_KNOTS, by_layer=False, seed=2 * seed + half, ridge=0.01
        )
        halves.append(project(basis, reference(inner, rollout()).gradient))
    reference_seconds = time.perf_counter() - start
    truth = (halves[0] + halves[1]) / 2
    rows = []
    for name, estimator in ESTIMATORS.items():
        start = time.perf_counter()
        ours = project(basis, estimator(inner, rollout()).gradient)
        rows.append(
            {
                "estimator": name,
                "seconds": time.perf_counter() - start,
                "cosines": _cosine(ours, truth).tolist(),
                "cosine_of_mean": float(_cosine(ours.mean(0), truth.mean(0))),
                "norms": ours.norm(dim=1).tolist(),
                "outliers": _outliers(ours),
                "mean": ours.mean(0).tolist(),
            }
        )
    return {
        "noise": noise,
        "steps": steps,
        "width": width,
        "learning_rate": learning_rate,
        "reference": {
            "seconds": reference_seconds,
            "agreement": _cosine(*halves).tolist(),
            "agreement_of_mean": float(_cosine(halves[0].mean(0), halves[1].mean(0))),
            "norms": truth.norm(dim=1).tolist(),
            "mean": truth.mean(0).tolist(),
        },
        "estimators": rows,
    }


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return torch.cosine_similarity(a, b, dim=-1)


def _outliers(gradients: Tensor) -> float:
    """Share of the gradients whose norm is over ten times the median, or not finite."""
    norms = gradients.norm(dim=1)
    return float((~(norms <= 10 * norms.nanmedian())).float().mean())


def table(rows: Sequence[dict[str, Any]], *, head: bool = True) -> str:
    """A Markdown table of the measurements; the reference's agreement is of one half with the other."""
    lines = []
    if head:
        lines = [
            "| noise | steps | width | estimator | cosine, mean over seeds | cosine of the mean "
            "| norm ratio | outliers | s |",
            "| --- |" + " --- |" * 8,
        ]
    for row in rows:
        run = f"| {row['noise']} | {row['steps']} | {row['width']}"
        reference = row["reference"]
        for found in row["estimators"]:
            ratio = _median(found["norms"]) / max(_median(reference["norms"]), 1e-12)
            lines.append(
                f"{run} | {found['estimator']} | {fmean(found['cosines']):.2f} "
                f"| {found['cosine_of_mean']:.2f} | {ratio:.2f} | {100 * found['outliers']:.0f} % "
                f"| {found['seconds']:.0f} |"
            )
        lines.append(
            f"{run} | (reference, its halves) | {fmean(reference['agreement']):.2f} "
            f"| {reference['agreement_of_mean']:.2f} | | | {reference['seconds']:.0f} |"
        )
    return "\n".join(lines)


def _median(values: Sequence[float]) -> float:
    return float(torch.tensor(values).nanmedian())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="short runs, few seeds and pairs")
    parser.add_argument("--noise", nargs="+", default=["normal", "logistic", "triangular"])
    parser.add_argument("--steps", nargs="+", type=int, default=[50, 150])
    parser.add_argument("--width", nargs="+", type=int, default=[8])
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the rows here, after each one")
    options = parser.parse_args()
    if options.quick:
        options.noise, options.steps, options.seeds, options.pairs = ["normal"], [30], 2, 16
    torch.set_num_threads(1)
    data = load("mnist1d")
    rows: list[dict[str, Any]] = []
    for width in options.width:
        for steps in options.steps:
            for noise in options.noise:
                rows.append(
                    measure(
                        data,
                        noise=noise,
                        horizon=10,
                        steps=steps,
                        width=width,
                        learning_rate=options.learning_rate,
                        seeds=options.seeds,
                        pairs=options.pairs,
                        seed=options.seed,
                        base=BaseCurve(),
                    )
                )
                if options.json:
                    content = {
                        "environment": describe(),
                        "seed": options.seed,
                        "pairs": options.pairs,
                        "rows": rows,
                    }
                    write_text(options.json, json.dumps(content, indent=1) + "\n")
                print(table(rows[-1:], head=len(rows) == 1), flush=True)


if __name__ == "__main__":
    main()
