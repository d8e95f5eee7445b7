"""The quantizer of an activation, in place of the activation function or behind it."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from learnsched.levels import LevelSet
from learnsched.quantizer import LARGEST_FALL, Quantizer, as_parameter
from learnsched.scales import ScaleRule


class ActivationQuantizer(Quantizer):
    """Quantizes an activation with one scale for the tensor.

    Args:
        levels: the level set.
        scale: initial scale, positive.
        rule: how calibration chooses the scale.
        before: applied ahead of the staircase; None where the staircase does all (a ReLU's clipping
            is part of a staircase without negative levels).
        like: a tensor of the dtype and device to use.
        ceiling: positive; what the highest level may not exceed at first and after calibration, where
            the staircase does the clipping of a ReLU6 or Hardtanh.

    Shape:
        any shape in, the same shape out.
    """

    scale: Tensor
    # below which a learned scale does not fall
    lowest_scale: Tensor | None
    # of a finished network, whose weights have none any more
    is_left_over = False

    def __init__(
        self,
        levels: LevelSet,
        scale: float,
        rule: ScaleRule,
        before: nn.Module | None,
        like: Tensor,
        ceiling: float = math.inf,
    ) -> None:
        super().__init__(levels, like)
        self.rule = rule
        self.before = before
        self.ceiling = ceiling
        scale = min(scale, self.largest_scale)
        self.register_buffer("scale", torch.full((), scale, dtype=like.dtype, device=like.device))
        self.register_buffer("lowest_scale", None)

    @property
    def largest_scale(self) -> float:
        """The scale at which the highest level is the ceiling."""
        highest = self.levels.values[-1]
        return self.ceiling / highest if highest > 0 else math.inf

    @property
    def learns_scale(self) -> bool:
        """Whether the scale is a parameter, see :func:`learnsched.learn_scales_`."""
        return "scale" in self._parameters

    @torch.no_grad()
    def learn_scale_(self) -> nn.Parameter:
        """Make the scale a parameter, that of before if it is one, bounded by where it is now."""
        if not self.learns_scale:
            scale = as_parameter(self.scale)
            del self.scale
            self.scale = scale
            self.bound_scale_()
        return cast(nn.Parameter, self.scale)

    @torch.no_grad()
    def bound_scale_(self) -> None:
        """Let a learned scale fall to a 32nd of what it is now, and no further."""
        if self.learns_scale:
            self.lowest_scale = self.scale / LARGEST_FALL

    @torch.no_grad()
    def restore_scale_(self) -> None:
        """Put a learned scale back to its bound if an optimizer took it below."""
        if self.lowest_scale is not None:
            self.scale.copy_(self.bounded_scale)

    @property
    def bounded_scale(self) -> Tensor:
        """The scale, or its bound with the gradient of the scale, so that it can rise again."""
        if self.lowest_scale is None:
            return self.scale
        raised = self.lowest_scale + (self.scale - self.scale.detach())
        return torch.where(self.scale < self.lowest_scale, raised, self.scale)

    def ahead(self, x: Tensor) -> Tensor:
        """What the staircase is applied to."""
        result: Tensor = x if self.before is None else self.before(x)
        return result

    def forward(self, input: Tensor) -> Tensor:
        x = self.ahead(input)
        if not x.is_floating_point():
            x = x.to(self.scale.dtype)  # levels times scale are no whole numbers
        if self.learns_scale or self.scale.requires_grad:
            scale = self.bounded_scale
            return self._annealed(x / scale) * scale
        return self._annealed(x, self.scale)


class PReLUQuantizer(ActivationQuantizer):
    """Quantizes the output of a PReLU, whose learned slope keeps its name in checkpoints."""

    def __init__(
        self, levels: LevelSet, scale: float, rule: ScaleRule, before: nn.PReLU, like: Tensor
    ) -> None:
        super().__init__(levels, scale, rule, None, like)
        self.weight = before.weight

    def ahead(self, x: Tensor) -> Tensor:
        return F.prelu(x, self.weight)
