"""Is the meta-gradient right? The unrolled gradient against evolution strategies, in the real regime.

    python -m learnsched.benchmarks.gradient [--quick] [--seed N] [--json PATH]
                                             [--noise NAME ...] [--steps N ...] [--width N ...]

Both estimate the gradient of the hard network's validation loss with respect to a schedule of a few
coordinates: the values of each output at the beginning, in the middle and at the end of the run, all
layers alike. Each seed is a network with its own data order. Evolution strategies have noise of their
own: the agreement of one half of their pairs with the other says how much, and what agreement a
perfect gradient could reach.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learnsched.benchmarks.environment import describe
from learnsched.data import DataSet, load
from learnsched.files import write_text
from learnsched.meta.estimators import Unrolled, policy_rollout
from learnsched.meta.evolution import EvolutionStrategies, project, tangent_basis
from learnsched.meta.tasks import Task
from learnsched.policies.learned import BaseCurve, LearnedPolicy, MetaNetwork

_KNOTS = 3


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
    std: float,
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
        std: of the reference's perturbations.
        seed: of all random numbers.
        base: the schedule at which gradients are taken.
    """
    task = Task(
        "cnn1d", "mnist1d", width, 4, horizon, steps // horizon, 64, "ternary/2-bit",
        (learning_rate,) * seeds, False, seed,
    )  # fmt: skip
    inner = task.build(data, noise=noise)
    policy = LearnedPolicy(MetaNetwork(), base, open_loop=True)

    def rollout() -> Any:
        return policy_rollout(policy, inner.run, seeds)

    start = time.perf_counter()
    unrolled = Unrolled()(inner, rollout())
    middle = time.perf_counter()
    basis = tangent_basis(unrolled.settings.detach(), _KNOTS, by_layer=False)
    halves = [
        project(
            basis,
            EvolutionStrategies(pairs // 2, std, _KNOTS, by_layer=False, seed=half)(
                inner, rollout()
            ).gradient,
        )
        for half in (0, 1)
    ]
    end = time.perf_counter()
    ours, reference = project(basis, unrolled.gradient), (halves[0] + halves[1]) / 2
    cosines = torch.cosine_similarity(ours, reference, dim=1)
    return {
        "noise": noise,
        "steps": steps,
        "width": width,
        "learning_rate": learning_rate,
        "cosines": cosines.tolist(),
        "cosine_of_mean": float(torch.cosine_similarity(ours.mean(0), reference.mean(0), dim=0)),
        "reference_agreement": torch.cosine_similarity(*halves, dim=1).tolist(),
        "norms": ours.norm(dim=1).tolist(),
        "reference_norms": reference.norm(dim=1).tolist(),
        "outliers": _outliers(ours),
        "seconds": [middle - start, end - middle],
    }


def _outliers(gradients: Tensor) -> float:
    """Share of the gradients whose norm is over ten times the median, or not finite."""
    norms = gradients.norm(dim=1)
    return float((~(norms <= 10 * norms.nanmedian())).float().mean())


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of the measurements."""
    lines = [
        "| noise | steps | width | cosine, mean over seeds | of the mean gradient "
        "| reference with itself | norm ratio | outliers | s, unrolled | s, reference |",
        "| --- |" + " --- |" * 9,
    ]
    for row in rows:
        ratio = _median(row["norms"]) / max(_median(row["reference_norms"]), 1e-12)
        lines.append(
            f"| {row['noise']} | {row['steps']} | {row['width']} | {_mean(row['cosines']):.2f} "
            f"| {row['cosine_of_mean']:.2f} | {_mean(row['reference_agreement']):.2f} "
            f"| {ratio:.2f} | {100 * row['outliers']:.0f} % "
            f"| {row['seconds'][0]:.0f} | {row['seconds'][1]:.0f} |"
        )
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


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
    parser.add_argument("--std", type=float, default=0.1, help="of the reference's perturbations")
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
                        std=options.std,
                        seed=options.seed,
                        base=BaseCurve(),
                    )
                )
                if options.json:
                    content = {
                        "environment": describe(),
                        "seed": options.seed,
                        "pairs": options.pairs,
                        "std": options.std,
                        "rows": rows,
                    }
                    write_text(options.json, json.dumps(content, indent=1) + "\n")
                print(table(rows[-1:]) if len(rows) == 1 else table(rows[-1:]).splitlines()[-1])


if __name__ == "__main__":
    main()
