"""How wide should the backward noise of activations be? By task and bits.

    torchrun --standalone --nproc-per-node 2 -m learnsched.benchmarks.activation_width
                       [--bits BITS ...] [--quick] [--seed N] [--json PATH]

The base curve of the default schedule, with the std of the activations' backward noise multiplied by a
factor from the first epoch to the last; the rest is the same, down to the seeds. Validation accuracy,
each at the better of two learning rates.
"""

from __future__ import annotations

from dataclasses import replace

from learnsched.benchmarks.curve_variants import Study, Sweep
from learnsched.policies import BaseCurve


def widened(curve: BaseCurve, factor: float) -> BaseCurve:
    """The curve with backward noise of activations that is wider by a factor.

    Example:
        >>> widened(BaseCurve(activation_backward_std=0.5), 2.0).activation_backward_std
        1.0
    """
    return replace(
        curve,
        activation_backward_std=factor * curve.activation_backward_std,
        activation_backward_end=factor * curve.activation_backward_end,
    )


SWEEP = Sweep("factor", "times", (1.0, 0.5, 2.0), widened)

# Signals, images whose features must not depend on the place, and easy images under noise; vectors.
STUDY = Study(
    rows=(
        ("mnist1d", "cnn1d", 12, 4, 12, 30),
        ("mnist1d", "cnn1d_wide", 12, 4, 12, 30),
        ("mnist1d", "cnn1d_wide", 12, 6, 12, 30),
        ("shifted_digits", "cnn2d", 12, 4, 12, 40),
        ("shifted_digits", "cnn2d", 12, 6, 12, 40),
        ("noisy_digits", "cnn2d", 12, 4, 12, 30),
        ("noisy_digits", "residual", 8, 7, 12, 30),
        ("noisy_digits", "mlp", 32, 4, 12, 30),
        ("mnist1d", "mlp", 32, 4, 12, 30),
    ),
    regimes=(False,),
    seed=865_000,
    rates=(0.022, 0.04),
    runs=8,
    comparison=SWEEP,
    quick=7,
)

if __name__ == "__main__":
    STUDY.main(__doc__)
