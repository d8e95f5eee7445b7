"""The straight-through estimator: hard from the first epoch, with gradients under backward noise."""

from __future__ import annotations

from dataclasses import dataclass

from learnsched.incremental import check_partition
from learnsched.noise import noise_shape
from learnsched.policies.geometric import geometric
from learnsched.policies.same_for_all_layers import SameForAllLayers
from learnsched.schedule import Setting


@dataclass(frozen=True)
class StraightThrough(SameForAllLayers):
    """Hard values, gradients as if under noise, whose std may move geometrically over the run.

    With uniform noise of std ``1 / sqrt(12)``, in level steps, the gradient of a sign is the clipped
    identity of Hubara et al. 2016 (equation 4).

    Args:
        weight_backward_std: in level steps, at least 0.
        activation_backward_std: in level steps, at least 0; as for the weights if None.
        noise: shape of the backward noise.
        weight_backward_end: std in the last epoch, positive, reached geometrically in progress; the
            std stands still if None.
        activation_backward_end: the same for activations.
        weight_sample_std: std of the noise under which a level is drawn for each weight in each
            step, as in stochastic BinaryConnect; 0 takes the nearest level.

    Raises:
        ValueError: a std is negative or not finite, one of a pair of start and end is 0, or the noise
            or partition is unknown.

    Source:
        Bengio et al. 2013 (arXiv:1308.3432); with other level sets and scales BinaryConnect
        (arXiv:1511.00363), TWN (arXiv:1605.04711) and XNOR-Net (arXiv:1603.05279).

    Example:
        >>> from learnsched.schedule import LayerInfo, RunInfo, plan
        >>> run = RunInfo((LayerInfo("fc", 10, 3, 4),), horizon=2)
        >>> plan(StraightThrough(0.5), run)["weight_backward_std"].flatten().tolist()
        [0.5, 0.5]
        >>> falling = StraightThrough(2.0, weight_backward_end=0.5)
        >>> plan(falling, run)["weight_backward_std"].flatten().tolist()
        [2.0, 0.5]
    """

    weight_backward_std: float = 0.7
    activation_backward_std: float | None = None
    noise: str = "normal"
    partition: str = "settled"
    metrics: tuple[str, ...] = ()
    weight_backward_end: float | None = None
    activation_backward_end: float | None = None
    weight_sample_std: float = 0.0

    def __post_init__(self) -> None:
        noise_shape(self.noise)
        check_partition(self.partition)
        for start, end in (self._weight, self._activation):
            if end is not None and not (start > 0 and end > 0):
                raise ValueError(
                    f"a backward std that moves geometrically is positive, got {start} to {end}"
                )
        for progress in (0.0, 1.0):
            self._setting(progress)  # checks the levels of noise

    @property
    def mode(self) -> str:
        """The forward value, see :func:`learnsched.annealed_quantize`."""
        return "random" if self.weight_sample_std else "expectation"

    @property
    def _weight(self) -> tuple[float, float | None]:
        return self.weight_backward_std, self.weight_backward_end

    @property
    def _activation(self) -> tuple[float, float | None]:
        if self.activation_backward_std is None and self.activation_backward_end is None:
            return self._weight
        start = self.activation_backward_std
        return self.weight_backward_std if start is None else start, self.activation_backward_end

    def _setting(self, progress: float) -> Setting:
        return Setting(
            weight_forward_std=self.weight_sample_std,
            weight_backward_std=geometric(*self._weight, progress),
            activation_backward_std=geometric(*self._activation, progress),
        )
