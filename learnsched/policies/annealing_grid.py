"""The hand-coded grid of additive noise annealing: 66 policies, each with four shapes of noise."""

from __future__ import annotations

import itertools
import math
import statistics

from learnsched.noise import noise_shape
from learnsched.policies.annealing import INTERVALS, AdditiveNoiseAnnealing, Annealed, Interval

# The published noise lies within half a step to both sides, or 95 % of it where it has no bounds. Here
# as standard deviations.
_HALF, _MASS = 0.5, 0.95
PUBLISHED_STD = {
    "uniform": _HALF / math.sqrt(3),
    "triangular": _HALF / math.sqrt(6),
    "normal": _HALF / statistics.NormalDist().inv_cdf((1 + _MASS) / 2),
    "logistic": _HALF / math.log((1 + _MASS) / (1 - _MASS)) * math.pi / math.sqrt(3),
}

# The noise is subtracted there, with mean -1/2; here it is added.
PUBLISHED_MEAN = 0.5

_POWERS = {"homogeneous": False, "progressive": True}
_MEANS = {"static mean": 0.0, "dynamic mean": PUBLISHED_MEAN}
_STDS: dict[str, Annealed] = {"static std": "neither", "dynamic std": "both"}


def annealing_grid(
    noise: str = "uniform", *, end: float = 0.7
) -> dict[str, AdditiveNoiseAnnealing]:
    """The 66 policies of the paper's experiment by name, for one shape of noise.

    A *noise policy* chooses the forward value (``expectation``, ``mode`` or ``random``) and whether
    mean and std decay or stand still. An expectation whose std stands still would never become hard
    and is left out. Of the 10 that remain, the 2 in which nothing moves have no decay to choose. The
    other 8 are crossed with 4 intervals and 2 powers: 8 × 8 + 2 = 66. A std decays as the square of
    its mean, forward and backward alike.

    Args:
        noise: shape of the noise.
        end: share of the run that is annealed; the paper has 7 of 10 periods.

    Returns:
        policies by names such as ``"expectation, dynamic mean, dynamic std, partition,
        progressive"``.

    Raises:
        ValueError: the noise is unknown, or the end is not in (0, 1].

    Source:
        Spallanzani et al. 2022 (arXiv:2203.11323), section 4; the design of the experiment is in
        pulp-platform/quantlab, systems/CIFAR10/VGG/doe (``get_noise_hyperparameters``). The paper
        shifts the initial weights by the mean too, which is left out here.

    Example:
        >>> grid = annealing_grid("logistic")
        >>> len(grid)
        66
        >>> grid["random, static mean, static std"].annealed
        'neither'
    """
    noise_shape(noise)
    std = PUBLISHED_STD[noise]

    def policy(
        mode: str, mean: str, moving: str, interval: Interval, progressive: bool
    ) -> AdditiveNoiseAnnealing:
        return AdditiveNoiseAnnealing(
            std,
            end,
            interval,
            power=2.0,
            progressive=progressive,
            mean=_MEANS[mean],
            noise=noise,
            mode=mode,
            annealed=_STDS[moving],
        )

    grid = {}
    for mode, mean, moving in itertools.product(("expectation", "mode", "random"), _MEANS, _STDS):
        if (mode, moving) == ("expectation", "static std"):
            continue
        if (mean, moving) == ("static mean", "static std"):
            grid[f"{mode}, {mean}, {moving}"] = policy(mode, mean, moving, "overlapped", False)
            continue
        for interval, (power, progressive) in itertools.product(INTERVALS, _POWERS.items()):
            name = f"{mode}, {mean}, {moving}, {interval}, {power}"
            grid[name] = policy(mode, mean, moving, interval, progressive)  # type: ignore[arg-type]
    return grid
