"""A quantizer for a network's input, so that its first layer computes with integers too."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from learnsched.levels import LevelSet, check_level_set, signed


class QuantizedInput(nn.Module):
    """Rounds a network's input to levels, as an accelerator's input buffer holds it.

    Put it in front of a network before or after training: ``nn.Sequential(QuantizedInput(0.03), net)``.
    It has no parameters, no noise and no gradient: schedules do not see it.

    Args:
        scale: positive; a level stands for ``level * scale``.
        levels: 8-bit signed by default. For pixels divided by 255, ``unsigned(8)`` with the scale
            1 / 255.

    Raises:
        TypeError: ``levels`` is no :class:`learnsched.LevelSet`.
        ValueError: the scale is not positive and finite.

    Example:
        >>> QuantizedInput(0.5)(torch.tensor([0.2, 0.25, -9.0])).tolist()
        [0.0, 0.5, -9.0]
    """

    scale: Tensor

    def __init__(self, scale: float, levels: LevelSet | None = None) -> None:
        super().__init__()
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"the scale must be positive and finite, got {scale}")
        self.levels = _or_default(levels)
        self.before = None
        self.register_buffer("scale", torch.tensor(float(scale)))

    @classmethod
    def fit(cls, x: Tensor, levels: LevelSet | None = None) -> QuantizedInput:
        """The quantizer whose outermost level is the largest magnitude in ``x``.

        Raises:
            TypeError: ``levels`` is no :class:`learnsched.LevelSet`.
            ValueError: ``x`` is empty, not finite, or 0 everywhere.

        Example:
            >>> QuantizedInput.fit(torch.tensor([-254.0, 3.0])).scale.item()
            2.0
        """
        levels = _or_default(levels)
        if not x.numel():
            raise ValueError(f"x must hold numbers to fit the scale to, got shape {tuple(x.shape)}")
        largest = float(x.detach().float().abs().max())
        if not 0 < largest < math.inf:
            raise ValueError(
                f"the largest magnitude in x is {largest:g}, to which no scale fits; give inputs as the "
                "network will see them, finite and not 0 everywhere"
            )
        return cls(largest / max(map(abs, levels.values)), levels)

    def ahead(self, x: Tensor) -> Tensor:
        """What the staircase is applied to: ``x`` itself."""
        return x

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.levels.quantize(x / self.scale) * self.scale

    def extra_repr(self) -> str:
        return f"levels={self.levels.name}, scale={self.scale.item():.4g}"


def _or_default(levels: LevelSet | None) -> LevelSet:
    if levels is None:
        return signed(8)
    check_level_set(levels)
    return levels
