"""How much noise, and how late a freezing, where weights alone are quantized? By task.

    torchrun --standalone --nproc-per-node 2 -m learnsched.benchmarks.weight_noise --bits ternary/real
                       [--quick] [--seed N] [--json PATH]

The base curve of the default schedule, with more or less forward noise of the weights, which falls more
or less slowly, and with later or earlier freezing; the rest is the same, down to the seeds. Validation
accuracy, each at the better of two learning rates.
"""

from __future__ import annotations

from dataclasses import replace

from learnsched.benchmarks.curve_variants import Study, Sweep
from learnsched.policies import BaseCurve

# What one step changes, and beyond which progress freezing may not start.
_STD, _POWER, _START, _LATEST = 0.07, -0.3, 0.3, 0.97


def softened(curve: BaseCurve, steps: float) -> BaseCurve:
    """The curve with so many steps more of noise and of time until weights freeze.

    Example:
        >>> curve = softened(BaseCurve(weight_forward_std=0.5, power=2.5, freeze_from=0.4), 1)
        >>> round(curve.weight_forward_std, 2), curve.power, curve.freeze_from
        (0.57, 2.2, 0.7)
    """
    return replace(
        curve,
        weight_forward_std=curve.weight_forward_std + steps * _STD,
        power=curve.power + steps * _POWER,
        freeze_from=min(curve.freeze_from + steps * _START, _LATEST),
    )


SWEEP = Sweep("steps", "steps", (0.0, -1.0, 1.0), softened)

# Problems that are hard for a quantized network, and easy ones under noise.
STUDY = Study(
    rows=(
        ("mnist1d", "cnn1d", 12, 4, 12, 30),
        ("mnist1d", "cnn1d_wide", 12, 6, 12, 30),
        ("shifted_digits", "cnn2d", 12, 4, 12, 30),
        ("shifted_digits", "residual", 6, 7, 12, 25),
        ("noisy_digits", "cnn2d", 12, 4, 12, 30),
        ("noisy_digits", "residual", 8, 7, 12, 25),
        ("noisy_digits", "mlp", 32, 4, 12, 30),
        ("mnist1d", "mlp", 32, 4, 12, 30),
    ),
    regimes=(False, True),
    seed=875_000,
    rates=(0.02, 0.033),
    runs=8,
    comparison=SWEEP,
    quick=6,
)

if __name__ == "__main__":
    STUDY.main(__doc__)
