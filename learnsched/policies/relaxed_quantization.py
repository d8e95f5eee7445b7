"""Relaxed quantization: logistic noise, forward and backward alike, that narrows over the run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from learnsched.annealed import MODES
from learnsched.choices import check_choice
from learnsched.incremental import check_partition
from learnsched.noise import noise_shape
from learnsched.policies.geometric import geometric
from learnsched.policies.same_for_all_layers import SameForAllLayers
from learnsched.schedule import Setting

# Logistic noise of scale 1/3 step.
_THIRD = math.pi / (3 * math.sqrt(3))


@dataclass(frozen=True)
class RelaxedQuantization(SameForAllLayers):
    """RQ: the std of the noise falls geometrically; then the network is hard.

    The gradient is that of the expectation, under the same noise as the value. With
    ``mode="random"`` the value is a sample of the levels' categorical distribution: RQ ST. With
    ``mode="expectation"`` it is that distribution's mean, the mean of RQ's concrete samples up to
    their temperature; after :func:`learnsched.sample_concrete_` it is one of these samples.

    The std is scheduled; as in the paper, each quantizer learns a factor of it after
    :func:`learnsched.learn_noise_`, and the scales of activations and weights after
    :func:`learnsched.learn_scales_` and :func:`learnsched.learn_weight_scales_`.

    Args:
        std: of the noise at the start, in level steps, positive.
        std_end: of the noise when the network hardens, positive.
        end: progress from which the network is hard, in (0, 1]; the backward noise stays as it is.
        mode: the forward value, ``expectation`` or ``random`` (RQ ST), or ``mode``.
        noise: shape of the noise.

    Raises:
        ValueError: an argument is out of range, or the noise, mode or partition is unknown.

    Source:
        Louizos et al. 2019 (arXiv:1810.01875), algorithm 1 and section 2.1.

    Example:
        >>> from learnsched.schedule import LayerInfo, RunInfo, plan
        >>> run = RunInfo((LayerInfo("fc", 10, 3, 4),), horizon=5)
        >>> policy = RelaxedQuantization(0.8, 0.2, end=0.75)
        >>> [round(std, 2) for std in plan(policy, run)["weight_forward_std"].flatten().tolist()]
        [0.8, 0.5, 0.32, 0.0, 0.0]
    """

    std: float = _THIRD
    std_end: float = _THIRD / 3
    end: float = 1.0
    mode: str = "expectation"
    noise: str = "logistic"
    partition: str = "settled"
    metrics: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        noise_shape(self.noise)
        check_partition(self.partition)
        check_choice("mode", self.mode, MODES)
        for name in ("std", "std_end"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if not 0 < self.end <= 1:
            raise ValueError(f"end is a share of the run in (0, 1], got {self.end}")

    def _setting(self, progress: float) -> Setting:
        elapsed = min(progress / self.end, 1.0)
        backward = geometric(self.std, self.std_end, elapsed)
        forward = backward if elapsed < 1 else 0.0
        return Setting(forward, backward, forward, backward)
