"""The straight-through estimator: hard from the first epoch, with a backward noise of fixed width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from learnsched.noise import noise_shape
from learnsched.schedule import RunInfo, Setting, Telemetry


@dataclass(frozen=True)
class StraightThrough:
    """Hard values, gradients as if under noise of constant std (Bengio et al. 2013; TWN; BNN).

    With uniform noise of std ``1 / sqrt(3)`` the gradient of a sign is the clipped identity of
    Hubara et al. 2016 (equation 4).

    Args:
        weight_backward_std: in level steps, at least 0.
        activation_backward_std: in level steps, at least 0; as for the weights if None.
        noise: shape of the backward noise.

    Raises:
        ValueError: a std is negative or not finite, or the noise is unknown.

    Example:
        >>> from learnsched.schedule import LayerInfo, plan
        >>> run = RunInfo((LayerInfo("fc", 10, 3, 4),), horizon=2)
        >>> plan(StraightThrough(0.5), run)["weight_backward_std"].flatten().tolist()
        [0.5, 0.5]
    """

    weight_backward_std: float = 0.7
    activation_backward_std: float | None = None
    noise: str = "normal"
    partition: str = "settled"
    metrics: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        noise_shape(self.noise)
        self._setting()  # checks the levels of noise

    def begin(self, run: RunInfo) -> None:
        """No state."""

    def settings(
        self, run: RunInfo, epoch: int, telemetry: Telemetry, state: None
    ) -> tuple[Sequence[Setting], None]:
        """The same setting for every layer and epoch."""
        return [self._setting()] * len(run.layers), None

    def _setting(self) -> Setting:
        backward = self.activation_backward_std
        return Setting(
            weight_backward_std=self.weight_backward_std,
            activation_backward_std=self.weight_backward_std if backward is None else backward,
        )
