"""What curves are tried on: lists of tasks, like meta-training's and of none of its seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from learnsched.benchmarks.regimes import Regime, drawn
from learnsched.meta.mix import Mix
from learnsched.meta.tasks import Task, task_of


def usual(bits: str) -> tuple[Task, ...]:
    """What curves are tried on: like meta-training's, of none of its seeds."""
    rows = (
        ("mnist1d", "cnn1d", 8, 4, 8, 25, False),
        ("mnist1d", "cnn1d", 12, 4, 10, 30, False),
        ("mnist1d", "cnn1d", 8, 5, 12, 16, True),
        ("mnist1d", "cnn1d", 12, 6, 12, 25, False),
        ("mnist1d", "cnn1d", 16, 4, 12, 32, True),
        ("digits", "cnn2d", 8, 4, 8, 20, False),
        ("mnist1d", "mlp", 32, 4, 12, 20, False),
    )
    return tuple(
        task_of(
            row,
            batch=64 if row[0] == "mnist1d" else 32,
            bits=bits,
            learning_rates=(),
            fine_tuning=fine_tuning,
            seed=700_000,
        )
        for *row, fine_tuning in rows
    )


def fine_tuned(bits: str) -> tuple[Task, ...]:
    """What curves for fine-tuning are tried on: such runs only, more of them and of images."""
    rows = (
        ("mnist1d", "cnn1d", 8, 4, 8, 20),
        ("mnist1d", "cnn1d", 12, 5, 10, 25),
        ("mnist1d", "cnn1d", 16, 4, 12, 32),
        ("noisy_digits", "cnn2d", 8, 4, 8, 20),
        ("noisy_digits", "cnn2d", 12, 3, 6, 30),
        ("noisy_digits", "residual", 8, 5, 8, 25),
        ("mnist1d", "mlp", 32, 4, 12, 20),
    )
    return _of_one_regime(rows, bits, fine_tuning=True, seed=720_000)


def from_scratch(bits: str) -> tuple[Task, ...]:
    """What curves with a warm-up are tried on: runs from scratch, three of images."""
    rows = (
        ("mnist1d", "cnn1d", 8, 4, 8, 25),
        ("mnist1d", "cnn1d", 12, 4, 10, 30),
        ("mnist1d", "cnn1d", 12, 6, 12, 25),
        ("noisy_digits", "cnn2d", 8, 4, 10, 24),
        ("digits", "cnn2d", 8, 4, 8, 20),
        ("noisy_digits", "residual", 8, 5, 10, 25),
        ("mnist1d", "mlp", 32, 4, 12, 20),
    )
    return _of_one_regime(rows, bits, fine_tuning=False, seed=730_000)


def long(bits: str) -> tuple[Task, ...]:
    """What curves for long runs are tried on: 1,000 to 1,440 steps."""
    rows = (
        ("mnist1d", "cnn1d", 8, 4, 20, 50),
        ("mnist1d", "cnn1d", 12, 5, 24, 60),
        ("noisy_digits", "cnn2d", 8, 4, 20, 50),
        ("mnist1d", "mlp", 32, 4, 20, 60),
    )
    return _of_one_regime(rows, bits, fine_tuning=False, seed=740_000)


# Of all kinds that meta-training has; for every pair of level sets and seed the same networks.
_RANDOM_MIX = Mix(
    architectures=(
        ("mnist1d", "cnn1d", (8, 12, 16), (3, 4, 6)),
        ("mnist1d", "cnn1d_wide", (8, 12, 16), (3, 4, 6)),
        ("noisy_digits", "cnn2d", (6, 10), (3, 4, 6)),
        ("noisy_digits", "residual", (6, 10), (5, 7, 9)),
        ("mnist1d", "mlp", (24, 32, 64), (3, 4, 6)),
        ("noisy_digits", "mlp", (24, 32, 64), (3, 4, 6)),
    ),
    horizons=(6, 8, 12, 20),
    total_steps=(100, 600),
    batches=(32, 64),
    bits=(("ternary/2-bit", 1.0),),
    learning_rates=(0.01, 0.05),
    fine_tuning=0.0,
    members=1,
    tasks=1,
)
RANDOM_FAMILIES = tuple(dict.fromkeys(kind[1] for kind in _RANDOM_MIX.architectures))
_RANDOM_COUNT, _RANDOM_SEED = 16, 790_000


def random(bits: str, families: Sequence[str]) -> tuple[Task, ...]:
    """Networks drawn at random, from scratch, of more kinds and depths than the lists above."""
    kinds = tuple(a for a in _RANDOM_MIX.architectures if a[1] in families)
    mix = replace(_RANDOM_MIX, architectures=kinds)
    return tuple(drawn(mix, {Regime(bits, False): _RANDOM_COUNT}, _RANDOM_SEED))


# Of signals and images whose first layer has more than a few inputs; some are easy to learn, under
# noise, and some are hard.
_MIXED_MIX = replace(
    _RANDOM_MIX,
    architectures=(
        ("mnist1d", "cnn1d_wide", (8, 12, 16), (3, 4, 6)),
        ("mnist1d", "cnn1d_wide", (8, 12, 16), (3, 4, 6)),
        ("shifted_digits", "cnn2d", (8, 12, 16), (3, 4, 6)),
        ("shifted_digits", "cnn2d", (8, 12, 16), (3, 4, 6)),
        ("shifted_digits", "residual", (6, 10), (5, 7)),
        ("noisy_digits", "cnn2d", (6, 10, 16), (3, 4, 6)),
        ("noisy_digits", "residual", (6, 10), (5, 7, 9)),
        ("mnist1d", "mlp", (24, 32, 64), (3, 4, 6)),
        ("noisy_digits", "mlp", (24, 32, 64), (3, 4, 6)),
    ),
)
_MIXED_COUNT, _MIXED_SEED = 24, 795_000


def mixed(bits: str) -> tuple[Task, ...]:
    """Networks drawn at random, from scratch, of easy and of hard problems."""
    return tuple(drawn(_MIXED_MIX, {Regime(bits, False): _MIXED_COUNT}, _MIXED_SEED))


# Of vectors, most of which have classes that no noise hides; two networks of those that tell curves
# apart. (Each kind has a seed of its own.)
_VECTORS = (
    ("mnist1d", 1), ("mnist1d", 1), ("noisy_digits", 1), ("digits", 1), ("products", 2),
    ("clusters", 1), ("friedman", 2), ("hypercube", 1),
)  # fmt: skip
_VECTORS_SEED = 798_000


def vectors(bits: str) -> tuple[Task, ...]:
    """MLPs drawn at random, from scratch, for tables of numbers and for signals and images as such."""
    found: list[Task] = []
    for place, (data, count) in enumerate(_VECTORS):
        mix = replace(
            _RANDOM_MIX,
            architectures=((data, "mlp", (32, 64, 128), (3, 4, 5)),),
            horizons=(8, 12, 20),
            total_steps=(150, 600),
        )
        found += drawn(mix, {Regime(bits, False): count}, _VECTORS_SEED + place)
    return tuple(found)


def _of_one_regime(
    rows: Sequence[tuple[str, str, int, int, int, int]], bits: str, *, fine_tuning: bool, seed: int
) -> tuple[Task, ...]:
    """Tasks by data, family, width, depth, horizon and steps an epoch."""
    return tuple(
        task_of(row, batch=32, bits=bits, learning_rates=(), fine_tuning=fine_tuning, seed=seed)
        for row in rows
    )
