"""The quantizer of a weight: annealed where INQ has not frozen it yet."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from learnsched.incremental import any_per_channel, hard_membership, hold, priority
from learnsched.levels import LevelSet
from learnsched.quantizer import Quantizer
from learnsched.scales import ScaleRule
from learnsched.torch_state import can_look


class WeightQuantizer(Quantizer):
    """Quantizes a weight: annealed where it is free, held where INQ has frozen it.

    Args:
        levels: the level set.
        rule: chooses the scale anew from the weight at each forward pass, until the first weight of
            a channel is frozen; then that channel's scale stays.
        weight: the weight, of which shape, dtype and device are taken.
        channel_dim: the dimension of the output channels; a transposed convolution has it second. In
            a grouped one, channels of the same place in every group share their scale.

    Shape:
        weight of shape ``(channels, ...)`` in, the same shape out.
    """

    membership: Tensor
    held: Tensor
    held_scale: Tensor
    scale_held: Tensor
    # a parameter after learn_weight_scales_
    log_scale: nn.Parameter | None
    # in place of `quantized`, inside quantize_once
    shared: Callable[[WeightQuantizer, Tensor], Tensor] | None = None

    def __init__(
        self, levels: LevelSet, rule: ScaleRule, weight: Tensor, channel_dim: int = 0
    ) -> None:
        super().__init__(levels, weight)
        self.rule = rule
        self.channel_dim = channel_dim
        self.register_parameter("log_scale", None)
        detached = weight.detach()
        scale = self.fitted_scale(detached)
        self.register_buffer("membership", torch.zeros_like(detached))
        self.register_buffer("held", torch.zeros_like(detached))
        self.register_buffer("held_scale", torch.ones_like(scale))
        self.register_buffer("scale_held", torch.zeros_like(scale))

    def scale(self, weight: Tensor) -> Tensor:
        """The positive scale in force, in a shape that broadcasts to the weight."""
        # Behind a rule there may be a search: a finished network is spared it.
        if not self.training and can_look(self.scale_held) and bool(self.scale_held.all()):
            return self.held_scale
        return torch.where(
            self.scale_held > 0, self.held_scale, self.fitted_scale(weight, self.log_scale)
        )

    def fitted_scale(self, weight: Tensor, log_scale: Tensor | None = None) -> Tensor:
        """The scale that the rule gives a weight, times the exponential of what is learned."""
        # Rules take the first dimension for the channels.
        moved = self.channel_dim != 0
        scale = self.rule(weight.transpose(0, self.channel_dim) if moved else weight, self.levels)
        if 0 < scale.dim() < weight.dim():  # what broadcasts may lack the first ones
            scale = scale.reshape((1,) * (weight.dim() - scale.dim()) + scale.shape)
        scale = scale.transpose(0, self.channel_dim) if moved and scale.dim() else scale
        return scale if log_scale is None else scale * log_scale.exp()

    def forward(self, weight: Tensor) -> Tensor:
        if self.shared is not None:
            return self.shared(self, weight)
        return self.quantized(weight)

    def quantized(self, weight: Tensor) -> Tensor:
        """The weight to compute with."""
        scale = self.scale(weight)
        return torch.lerp(self._annealed(weight / scale) * scale, self.held, self.membership)

    def project(self, weight: Tensor) -> Tensor:
        """The weight on its level set: hard where free, as held where frozen."""
        hard = self._hard(weight, self.scale(weight))
        return torch.where(self.membership > 0, self.held, hard)

    def _hard(self, weight: Tensor, scale: Tensor) -> Tensor:
        # A staircase would give NaN a level, and hide that training has diverged.
        return torch.where(weight.isfinite(), self.levels.quantize(weight / scale) * scale, weight)

    @torch.no_grad()
    def freeze_(
        self,
        weight: Tensor,
        fraction: float,
        partition: str,
        generator: torch.Generator | None = None,
    ) -> None:
        """Project and freeze the share ``fraction`` of the weights, in ``weight`` too.

        Args:
            weight: the parameter; its frozen entries are overwritten with their levels.
            fraction: in [0, 1], not below what is frozen (``redraw`` excepted).
            partition: the order, see :func:`learnsched.incremental.priority`.
            generator: random numbers of the random partitions.

        Raises:
            ValueError: the fraction decreases or leaves [0, 1], or the partition is unknown.
        """
        redraw = partition == "redraw"
        scale = self.scale(weight)
        order = priority(weight / scale, self.levels, partition, generator)
        membership = hard_membership(order, self.membership, fraction, redraw=redraw)
        if not redraw and fraction < 1 and torch.equal(membership, self.membership):
            return self.restore_(weight)  # none is frozen anew, as in most epochs
        projected = self._hard(weight, scale)
        released = torch.zeros_like(self.membership) if redraw else self.membership
        self.held.copy_(hold(self.held, released, projected, membership))
        self.membership.copy_(membership)
        if not redraw or fraction == 1:
            frozen = any_per_channel(membership, self.scale_held)
            started = frozen & (self.scale_held == 0)
            self.held_scale.copy_(torch.where(started, scale, self.held_scale))
            self.scale_held.copy_(torch.maximum(self.scale_held, started.to(self.scale_held)))
        if fraction == 1:
            # A change of dtype since has rounded held weights and held scale apart.
            self.held.copy_(self._hard(self.held, self.held_scale))
        self.restore_(weight)

    @torch.no_grad()
    def restore_(self, weight: Tensor) -> None:
        """Put frozen entries of the parameter back where an optimizer has moved them."""
        torch.where(self.membership > 0, self.held, weight, out=weight.detach())

    @property
    def is_averaged(self) -> bool:
        """Whether memberships are neither 0 nor 1, as after an average of models over their buffers."""
        marks = (self.membership, self.scale_held)
        return any(bool(((mark > 0) & (mark < 1)).any()) for mark in marks)

    def is_moved(self, weight: Tensor) -> bool:
        """Whether frozen entries of the parameter are 1 % of a level step or more off their levels."""
        scale = self.scale(weight)
        # Averages over buffers have taken what is held off its levels, too.
        distance = (weight - self._hard(self.held, scale)).abs()
        return bool(((distance > 0.01 * self.levels.step * scale) & (self.membership > 0)).any())

    @torch.no_grad()
    def release_(self) -> None:
        """Free every weight and scale, so that the next :meth:`freeze_` starts anew."""
        self.membership.zero_()
        self.scale_held.zero_()

    @torch.no_grad()
    def take_(self, weight: Tensor) -> None:
        """Free what is frozen for other values, under the scale, held or fitted, that is nearer to them.

        An average of weights that have been on their levels for long is nearly on them still, under the
        scale that is held; to fit a scale to it would take it for a float weight.
        """
        self.membership.zero_()
        as_held = self.error(weight)
        marks = (self.scale_held > 0).to(self.scale_held)
        self.scale_held.zero_()
        if bool(as_held < self.error(weight)):
            self.scale_held.copy_(marks)

    @torch.no_grad()
    def error(self, weight: Tensor) -> Tensor:
        """Relative quantization error ``|w - project(w)| / |w|``, a scalar at least 0.

        Frozen weights have none, wherever an optimizer has moved their parameter.
        """
        kept = torch.where(self.membership > 0, self.held, weight)
        return (kept - self.project(weight)).norm() / kept.norm().clamp(min=1e-12)
