"""Should forward noise give way as the training loss falls? By task, regime and bits.

    torchrun --standalone --nproc-per-node 2 -m learnsched.benchmarks.follow_loss
                       [--bits BITS ...] [--quick] [--seed N] [--json PATH]

The base curve of the default schedule with several exponents of the relative training loss on its
forward std; 0 is a curve that sees no loss. The rest is the same, down to the seeds. Validation
accuracy, each at its best of three learning rates.
"""

from __future__ import annotations

from dataclasses import replace

from learnsched.benchmarks.curve_variants import Study, Sweep

# In runs of any length.
SWEEP = Sweep(
    "powers",
    "exponent",
    (0.0, 0.5, 1.0),
    lambda curve, power: replace(curve, loss_power=power, loss_from=0.0),
)

# Easy and hard data, short and long runs, of no seed of meta-training.
STUDY = Study(
    rows=(
        ("mnist1d", "mlp", 32, 4, 12, 20),
        ("digits", "cnn2d", 8, 5, 24, 32),
        ("noisy_digits", "cnn2d", 8, 5, 24, 32),
        ("mnist1d", "cnn1d", 16, 4, 12, 32),
        ("mnist1d", "cnn1d", 16, 4, 40, 32),
    ),
    regimes=(False, True),
    seed=810_000,
    rates=(0.01, 0.02, 0.035),
    runs=16,
    comparison=SWEEP,
)

if __name__ == "__main__":
    STUDY.main(__doc__)
