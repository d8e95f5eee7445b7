"""The relaxed network: never hardened, the practical upper bound of what a schedule can reach."""

from __future__ import annotations

import math
from dataclasses import dataclass

from learnsched.incremental import check_partition
from learnsched.noise import noise_shape
from learnsched.policies.same_for_all_layers import SameForAllLayers
from learnsched.schedule import Setting


@dataclass(frozen=True)
class Relaxed(SameForAllLayers):
    """Constant noise, forward and backward, until the terminal condition.

    ``finalize_`` hardens the network nonetheless; the upper bound is its accuracy before that.

    Args:
        std: in level steps, positive.
        noise: shape of the noise.

    Raises:
        ValueError: the std is not positive and finite, or the noise or partition is unknown.

    Example:
        >>> from learnsched.schedule import LayerInfo, RunInfo, plan
        >>> run = RunInfo((LayerInfo("fc", 10, 3, 4),), horizon=3)
        >>> plan(Relaxed(0.5), run)["weight_forward_std"].flatten().tolist()
        [0.5, 0.5, 0.0]
    """

    std: float = 0.35
    noise: str = "normal"
    partition: str = "settled"
    metrics: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        noise_shape(self.noise)
        check_partition(self.partition)
        if not 0 < self.std < math.inf:
            raise ValueError(f"std must be positive and finite, got {self.std}")

    def _setting(self, progress: float) -> Setting:
        return Setting(self.std, self.std, self.std, self.std)
