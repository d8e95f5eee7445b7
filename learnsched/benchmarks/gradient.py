"""Is the meta-gradient right? Each estimator against converged evolution strategies, on hard losses.

    python -m learnsched.benchmarks.gradient [--quick] [--seed N] [--json PATH] [--plot PATH]
                                             [--noise NAME ...] [--optimizer NAME ...]
                                             [--steps N ...] [--width N ...] [--policy NAME ...]
                                             [--device NAME]

All estimate the gradient of the hard network's validation loss with respect to a schedule of a few
coordinates: the values of each output at the beginning and at the end of the run, all layers alike.
Each seed is a network with its own data order. Noise shapes, optimizers and widths after the first are
measured one at a time, the others at their first. Gradients are taken at the base curve that
meta-training starts from, at the plain curve (a :class:`~learnsched.policies.BaseCurve` as it comes,
which nothing has tuned), or at a learned policy; under the learning rate that each is made for.

Evolution strategies have noise of their own: the agreement of one half of the reference's pairs with
the other says how much, and what agreement a perfect gradient could reach (Spearman–Brown).

With ``--json``, rows are written after each one, and those that are there already are not measured
again, unless with more pairs: an interrupted run goes on, another grid adds to it, and a row whose
reference had not converged is replaced.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from learnsched.benchmarks.command_line import command_line
from learnsched.benchmarks.environment import describe, write_results
from learnsched.data import DataSet, load
from learnsched.figure_style import paper_style, save_figure
from learnsched.meta.estimators import Inner, Rollout, ScheduleEstimate
from learnsched.meta.evolution import EvolutionStrategies, project, tangent_basis
from learnsched.meta.guarded import Guarded
from learnsched.meta.hybrid import Hybrid
from learnsched.meta.presets import PRESETS
from learnsched.meta.rollout import begin, run_forward
from learnsched.meta.tasks import Task
from learnsched.meta.unrolled import Unrolled
from learnsched.policies import LearnedPolicy, MetaNetwork
from learnsched.pretrained import load_pretrained
from learnsched.tables import markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_KNOTS = 2
_HORIZON = 10
BUDGET = EvolutionStrategies(8, knots=_KNOTS, by_layer=False, seed=1_000_003, ridge=0.1)

ESTIMATORS: dict[str, Callable[[Inner, Rollout], ScheduleEstimate]] = {
    "unrolled": Unrolled(),
    "unrolled, damped by ½": Unrolled(damping=0.5),
    "unrolled, first order": Unrolled(damping=0.0),
    "unrolled, windows of 2 epochs": Unrolled(damping=0.5, truncation=2),
    "evolution, 8 pairs": BUDGET,
    "hybrid, damped and 8 pairs": Hybrid(Unrolled(damping=0.5), BUDGET),
    "guarded, damped or 8 pairs": Guarded(Unrolled(damping=0.5), BUDGET),
}

# Maxima of the learning rate that train the networks of this benchmark well.
RATES = {"adam": 0.01, "adamw": 0.01, "momentum": 0.1, "sgd": 1.0}
PLAIN, START = "plain curve", "base curve"

_HEAD = [
    "at", "noise", "optimizer", "steps", "width", "estimator", "cosine, mean over seeds",
    "cosine of the mean", "norm ratio", "outliers", "s",
]  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One kind of run.

    Attributes:
        policy: the schedule at which gradients are taken: :data:`START`, :data:`PLAIN` or an artefact.
        noise: shape of the noise.
        optimizer: of the inner loop.
        steps: optimizer steps of the run.
        width: channels of the four-layer network.
    """

    policy: str
    noise: str
    optimizer: str
    steps: int
    width: int

    def task(self, seeds: int, seed: int) -> Task:
        """The networks, one a seed."""
        return Task(
            family="cnn1d", data="mnist1d", width=self.width, depth=4, horizon=_HORIZON,
            steps=self.steps // _HORIZON, batch=32, bits="ternary/2-bit",
            learning_rates=(RATES[self.optimizer],) * seeds, fine_tuning=False, seed=seed,
            optimizer=self.optimizer,
        )  # fmt: skip

    def learned_policy(self) -> LearnedPolicy:
        """The policy; a fresh network is its base curve."""
        if self.policy == PLAIN:
            return LearnedPolicy(MetaNetwork(), open_loop=True)
        if self.policy == START:
            return LearnedPolicy(MetaNetwork(), PRESETS["standard"].base)
        return load_pretrained(self.policy)


def cells(
    policies: Sequence[str],
    noises: Sequence[str],
    optimizers: Sequence[str],
    steps: Sequence[int],
    widths: Sequence[int],
) -> Iterator[Cell]:
    """The first of each property at every number of steps, then the others one at a time."""
    centre = [
        Cell(policy, noises[0], optimizers[0], s, widths[0]) for s in steps for policy in policies
    ]
    yield from centre
    for cell in centre:
        yield from (replace(cell, noise=noise) for noise in noises[1:])
        yield from (replace(cell, optimizer=name) for name in optimizers[1:])
        yield from (replace(cell, width=width) for width in widths[1:])


def measure(
    data: DataSet, cell: Cell, *, seeds: int, pairs: int, seed: int, device: str = "cpu"
) -> dict[str, Any]:
    """Agreement of the estimators with the reference on one kind of run.

    Args:
        data: MNIST-1D.
        cell: the kind of run.
        seeds: networks, each with a gradient of its own.
        pairs: antithetic pairs of the reference, for each network.
        seed: of all random numbers.
        device: where inner runs train.
    """
    policy = cell.learned_policy()
    policy.network.to(device)
    inner, rollout = begin(policy, cell.task(seeds, seed), data, device, noise=cell.noise)

    start = time.perf_counter()
    table = run_forward(inner, rollout)[1].detach()
    basis = tangent_basis(table, _KNOTS, by_layer=False)
    halves = []
    for half in (0, 1):
        reference = EvolutionStrategies(
            pairs // 2, knots=_KNOTS, by_layer=False, seed=2 * seed + half, ridge=0.01
        )
        halves.append(project(basis, reference(inner, rollout).gradient))
    reference_seconds = time.perf_counter() - start
    truth = (halves[0] + halves[1]) / 2
    rows = []
    for name, estimator in ESTIMATORS.items():
        start = time.perf_counter()
        ours = project(basis, estimator(inner, rollout).gradient)
        rows.append(
            {
                "estimator": name,
                "seconds": time.perf_counter() - start,
                "cosines": _cosine(ours, truth).tolist(),
                "cosine_of_mean": float(_cosine(ours.mean(0), truth.mean(0))),
                "interval": interval_of_mean(ours, truth),
                "norms": ours.norm(dim=1).tolist(),
                "outliers": _outliers(ours),
                "mean": ours.mean(0).tolist(),
            }
        )
    return {
        **asdict(cell),
        "commit": describe()["commit"],
        "device": torch.cuda.get_device_name() if torch.device(device).type == "cuda" else "cpu",
        "learning_rate": RATES[cell.optimizer],
        "reference": {
            "pairs": pairs,
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


def interval_of_mean(ours: Tensor, truth: Tensor) -> list[float]:
    """The 95 % interval of the cosine of the means, over seeds drawn with replacement.

    Near an optimum the mean gradient is small, and which way it points may hang on a few seeds.

    Args:
        ours: gradients, shape ``(seeds, coordinates)``.
        truth: those of the reference for the same seeds.

    Example:
        >>> along = torch.ones(8, 2)
        >>> [round(end, 3) for end in interval_of_mean(along, 2 * along)]
        [1.0, 1.0]
    """
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(ours), (2000, len(ours)), generator=generator)
    cosines = _cosine(ours.cpu()[drawn].mean(1), truth.cpu()[drawn].mean(1))
    low, high = cosines.quantile(torch.tensor([0.025, 0.975]).to(cosines)).tolist()
    return [low, high]


def _outliers(gradients: Tensor) -> float:
    """Share of the gradients whose norm is over ten times the median, or not finite."""
    norms = gradients.norm(dim=1)
    return float((~(norms <= 10 * norms.nanmedian())).float().mean())


def attainable(agreement: float) -> float:
    """The cosine of a perfect gradient with a reference whose halves agree so far; 0 if they do not.

    Example:
        >>> attainable(1.0), round(attainable(0.6), 3), attainable(-0.1)
        (1.0, 0.866, 0.0)
    """
    return math.sqrt(2 * agreement / (1 + agreement)) if agreement > 0 else 0.0


def table(rows: Sequence[dict[str, Any]], *, head: bool = True) -> str:
    """A Markdown table; a perfect gradient's line has the reference's cost."""
    cells = [_HEAD] if head else []
    for row in rows:
        run = [str(row[n]) for n in ("policy", "noise", "optimizer", "steps", "width")]
        reference = row["reference"]
        for found in row["estimators"]:
            ratio = _median(found["norms"]) / max(_median(reference["norms"]), 1e-12)
            cells.append([
                *run,
                found["estimator"],
                f"{fmean(found['cosines']):.2f}",
                _with_interval(found),
                f"{ratio:.2g}",
                f"{100 * found['outliers']:.0f} %",
                f"{found['seconds']:.0f}",
            ])  # fmt: skip
        limits = [
            attainable(a) for a in (fmean(reference["agreement"]), reference["agreement_of_mean"])
        ]
        cosines = (f"{limit:.2f}" for limit in limits)
        cells.append([*run, "(a perfect one)", *cosines, "1", "0 %", f"{reference['seconds']:.0f}"])
    return markdown(cells, head=head)


def _with_interval(found: Mapping[str, Any]) -> str:
    """The cosine of the mean; rows that are older have no interval."""
    ends = ", ".join(f"{end:.2f}" for end in found.get("interval", ()))
    return f"{found['cosine_of_mean']:.2f}" + (f" [{ends}]" if ends else "")


def _median(values: Sequence[float]) -> float:
    return float(torch.tensor(values).nanmedian())


def plot(rows: Sequence[dict[str, Any]]) -> Figure:
    """Cosine of the mean gradient over the number of steps, one panel a policy.

    The rows shown are those of the first row's noise, optimizer and width. The hatched region lies
    above what a perfect gradient could reach.
    """
    from matplotlib.figure import Figure

    same = ("noise", "optimizer", "width")
    rows = [r for r in rows if all(r[n] == rows[0][n] for n in same)]
    curves = [PLAIN, START]
    policies = [name for name in curves if any(r["policy"] == name for r in rows)]
    policies += sorted({r["policy"] for r in rows} - set(curves))
    figure = Figure(figsize=(max(5.0, 3.4 * len(policies)), 3.4), layout="constrained")
    panels = figure.subplots(1, len(policies), sharey=True, squeeze=False)[0]
    styles = [(m, d) for d in ("-", "--", ":") for m in ("o", "s", "^")]
    for panel, policy in zip(panels, policies, strict=True):
        mine = sorted((r for r in rows if r["policy"] == policy), key=lambda r: r["steps"])
        steps = [r["steps"] for r in mine]
        for index, (marker, dashes) in zip(range(len(ESTIMATORS)), styles, strict=False):
            cosines = [r["estimators"][index]["cosine_of_mean"] for r in mine]
            shade = str(0.6 * index / len(ESTIMATORS))
            name = mine[0]["estimators"][index]["estimator"]
            panel.plot(steps, cosines, dashes, marker=marker, ms=4, lw=1, color=shade, label=name)
        limits = [attainable(r["reference"]["agreement_of_mean"]) for r in mine]
        panel.fill_between(
            steps, limits, 1.02, facecolor="none", edgecolor="0.7", hatch="////", lw=0,
            label="out of a perfect gradient's reach",
        )  # fmt: skip
        panel.axhline(0, color="0.5", lw=0.6)
        panel.set_xscale("log")
        panel.set_xticks(steps, [str(s) for s in steps], minor=False)
        panel.minorticks_off()
        panel.set_ylim(-1.02, 1.02)
        panel.set_xlabel("inner optimizer steps")
        panel.set_title(f"at the {policy}" if policy in curves else f"at {policy!r}", fontsize=9)
    panels[0].set_ylabel("cosine of the mean gradient\nwith the reference")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=7, frameon=False)
    return figure


def _read(path: Path | None, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that a file holds already.

    Raises:
        ValueError: they were measured with other settings.
    """
    if path is None or not path.exists():
        return []
    stored = json.loads(path.read_text())
    if {name: stored.get(name) for name in settings} != settings:
        raise ValueError(
            f"{path} holds rows of other settings than {settings}; choose another file"
        )
    rows: list[dict[str, Any]] = stored["rows"]
    return rows


def main() -> None:
    """The command line."""
    parser = command_line(
        __doc__, quick="short runs, few seeds and pairs", json="write the rows here, after each one"
    )
    parser.add_argument("--noise", nargs="+", default=["normal", "logistic", "triangular"])
    parser.add_argument(
        "--optimizer", nargs="+", choices=RATES, default=["adam", "momentum", "sgd"]
    )
    parser.add_argument("--steps", nargs="+", type=int, default=[50, 150, 400, 800])
    parser.add_argument("--width", nargs="+", type=int, default=[8, 16])
    parser.add_argument(
        "--policy", nargs="+", default=[START], help=f"{START!r}, {PLAIN!r} or artefacts"
    )
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=48)
    parser.add_argument("--device", default="cpu", help="where inner runs train")
    parser.add_argument("--plot", type=Path, help="draw the rows here")
    options = parser.parse_args()
    if options.quick:
        options.noise, options.optimizer, options.width = ["normal"], ["adam", "sgd"], [6]
        options.steps, options.seeds, options.pairs = [20], 2, 8
    torch.set_num_threads(1)
    settings = {"seed": options.seed, "seeds": options.seeds, "estimators": list(ESTIMATORS)}
    try:
        rows = _read(options.json, settings)
    except ValueError as error:
        parser.error(str(error))
    grid = cells(options.policy, options.noise, options.optimizer, options.steps, options.width)
    done = {Cell(**{name: row[name] for name in Cell.__annotations__}): row for row in rows}
    data = load("mnist1d")
    print(table(rows), flush=True)
    for cell in grid:
        if cell in done and done[cell]["reference"]["pairs"] >= options.pairs:
            continue
        done[cell] = measure(
            data, cell, seeds=options.seeds, pairs=options.pairs, seed=options.seed,
            device=options.device,
        )  # fmt: skip
        print(table([done[cell]], head=False), flush=True)
        write_results(options.json, {**settings, "rows": list(done.values())})
    rows = list(done.values())
    if options.plot:
        with paper_style():
            save_figure(plot(rows), options.plot)


if __name__ == "__main__":
    main()
