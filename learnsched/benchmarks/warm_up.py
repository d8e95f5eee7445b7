"""Should the learning rate rise first, and for how long? By task, regime and bits.

    torchrun --standalone --nproc-per-node 2 -m learnsched.benchmarks.warm_up
                       [--bits BITS ...] [--quick] [--seed N] [--json PATH]

The base curve of the default schedule, under a learning rate that rises over a share of the run and
falls as a cosine; with 0 it is the cosine alone. The rest is the same, down to the seeds. Validation
accuracy, each at its best of three learning rates.
"""

from __future__ import annotations

from dataclasses import replace

from learnsched.benchmarks.curve_variants import Study, Sweep

SWEEP = Sweep(
    "warm_until", "until", (0.0, 0.1, 0.2), lambda curve, share: replace(curve, warm_until=share)
)

# Easy and hard data, short and long runs, of no seed of meta-training.
STUDY = Study(
    rows=(
        ("mnist1d", "mlp", 32, 4, 12, 20),
        ("noisy_digits", "cnn2d", 8, 4, 8, 20),
        ("noisy_digits", "residual", 8, 5, 12, 25),
        ("mnist1d", "cnn1d", 16, 4, 12, 32),
        ("digits", "cnn2d", 8, 5, 24, 32),
        ("mnist1d", "cnn1d", 16, 4, 40, 32),
    ),
    regimes=(False, True),
    seed=860_000,
    rates=(0.012, 0.022, 0.04),
    runs=12,
    comparison=SWEEP,
)

if __name__ == "__main__":
    STUDY.main(__doc__)
