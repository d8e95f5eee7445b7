"""Quantizers of weights and activations as modules.

Noise levels, memberships and held values are buffers, so that ``state_dict``, ``torch.compile``,
``higher`` and data-parallel wrappers all see them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from learnsched.annealed import MODES, quantize_unchecked
from learnsched.concrete import concrete_quantize
from learnsched.incremental import any_per_channel, hard_membership, hold, priority
from learnsched.levels import LevelSet
from learnsched.noise import NOISE_CODES, noise_shape
from learnsched.scales import ScaleRule
from learnsched.torch_state import can_look

_EXTRA = "_extra_state"  # as torch calls it in a state_dict

NOISE_BUFFERS = ("forward_std", "backward_std", "forward_mean", "backward_mean")

# A learned scale may fall by this factor at most.
_LARGEST_FALL = 32.0


class _Quantizer(nn.Module):
    """What weights and activations share: a level set and the noise, in units of the level step."""

    forward_std: Tensor
    backward_std: Tensor
    forward_mean: Tensor
    backward_mean: Tensor
    layer_name: str = ""
    layer_index: int = 0
    # of the concrete samples in place of the mode's value, after sample_concrete_
    temperature: float | None = None
    # a parameter after learn_noise_
    log_std: nn.Parameter | None
    # the token of the scheduler that made the settings in force
    scheduled_by: object | None = None

    def __init__(self, levels: LevelSet, like: Tensor) -> None:
        super().__init__()
        self.register_parameter("log_std", None)
        self.levels = levels
        self.noise = noise_shape("normal")
        self.mode = "expectation"
        for name in NOISE_BUFFERS:
            initial = 1.0 if name == "backward_std" else 0.0
            self.register_buffer(
                name, torch.full((), initial, dtype=like.dtype, device=like.device)
            )

    def __getstate__(self) -> dict[str, Any]:
        # A noise shape holds functions of torch, not all of which can be pickled: keep its name.
        return {**self.__dict__, "noise": self.noise.name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "noise": noise_shape(state["noise"])})

    def _annealed(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """Quantize ``x``, in units of the level set or, given a constant scale, in its own."""
        step = self.levels.step
        noise = (self.forward_std, self.forward_mean, self.backward_std, self.backward_mean)
        if self.log_std is not None:
            factor = self.log_std.exp()
            noise = (noise[0] * factor, noise[1], noise[2] * factor, noise[3])
        if step != 1:
            noise = tuple(level * step for level in noise)  # type: ignore[assignment]
        # As dropout does, samples end where training does.
        if self.temperature is None or not self.training:
            mode = "mode" if self.mode == "random" and not self.training else self.mode
            return quantize_unchecked(x, self.levels, *noise, self.noise, mode, scale=scale)
        inside = x if scale is None else x / scale
        drawn = concrete_quantize(inside, self.levels, *noise, self.noise, self.temperature)
        return drawn if scale is None else drawn * scale

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # A float checkpoint knows nothing of quantizers: they keep what they have.
        own = {prefix + name: buffer for name, buffer in self.named_buffers(recurse=False)}
        learned = [
            name
            for name in ("scale", "log_scale", "log_std")
            if self._parameters.get(name) is not None
        ]
        own |= {prefix + name: getattr(self, name) for name in learned}
        if own.keys().isdisjoint(state_dict):
            state_dict = {**state_dict, **own}
        if prefix + _EXTRA not in state_dict:  # nor do older states know the level set
            state_dict = {**state_dict, prefix + _EXTRA: self.get_extra_state()}
        bound = prefix + "lowest_scale"
        if bound in own and bound not in state_dict:  # or bounds of learned scales
            scale = state_dict.get(prefix + "scale", own[prefix + "scale"])
            state_dict = {**state_dict, bound: scale / _LARGEST_FALL}
        elif bound in state_dict and bound not in own:  # of a scale that is not learned here
            state_dict = {name: value for name, value in state_dict.items() if name != bound}
        for name, makes in (("log_scale", "learn_weight_scales_"), ("log_std", "learn_noise_")):
            if strict and prefix + name in state_dict and prefix + name not in own:
                error_msgs.append(
                    f"{prefix}{name} was learned; call learnsched.{makes}(model) before this state "
                    "is loaded"
                )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def get_extra_state(self) -> Tensor:
        """Levels and thresholds, which states must have alike to be exchanged, and the kind of noise."""
        kind = NOISE_CODES[self.noise.name] * len(MODES) + MODES.index(self.mode)
        numbers = [*self.levels.values, *self.levels.thresholds, kind]
        return torch.tensor(numbers, dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Take the kind of noise of a state, unless it is of another level set.

        Raises:
            ValueError: the state belongs to another level set.
        """
        own = self.get_extra_state()[:-1]
        # Older states do not know the kind of noise: without it, theirs is an odd number of numbers.
        knows = len(state) % 2 == 0
        sets = state[:-1] if knows else state
        # A state may have been cast with all its tensors.
        if sets.shape != own.shape or not torch.equal(sets, own.to(sets)):
            count = len(sets) // 2 + 1
            raise ValueError(
                f"this state was saved with the levels {sets[:count].tolist()} and thresholds "
                f"{sets[count:].tolist()}, the quantizer of {self.layer_name!r} has "
                f"{list(self.levels.values)} and {list(self.levels.thresholds)}; quantize the model "
                "with the same level sets as before, then load it"
            )
        if knows:
            noise, mode = divmod(int(state[-1]), len(MODES))
            self.noise, self.mode = noise_shape(list(NOISE_CODES)[noise]), MODES[mode]

    def extra_repr(self) -> str:
        return f"levels={self.levels.name}, noise={self.noise.name}"


class WeightQuantizer(_Quantizer):
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
        scale = self._fitted_scale(detached)
        self.register_buffer("membership", torch.zeros_like(detached))
        self.register_buffer("held", torch.zeros_like(detached))
        self.register_buffer("held_scale", torch.ones_like(scale))
        self.register_buffer("scale_held", torch.zeros_like(scale))

    def scale(self, weight: Tensor) -> Tensor:
        """The positive scale in force, in a shape that broadcasts to the weight."""
        # Behind a rule there may be a search: a finished network is spared it.
        if not self.training and can_look(self.scale_held) and bool(self.scale_held.all()):
            return self.held_scale
        return torch.where(self.scale_held > 0, self.held_scale, self._fitted_scale(weight))

    def _fitted_scale(self, weight: Tensor) -> Tensor:
        scale = self._rule_scale(weight)
        return scale if self.log_scale is None else scale * self.log_scale.exp()

    def _rule_scale(self, weight: Tensor) -> Tensor:
        # Rules take the first dimension for the channels.
        moved = self.channel_dim != 0
        scale = self.rule(weight.transpose(0, self.channel_dim) if moved else weight, self.levels)
        if 0 < scale.dim() < weight.dim():  # what broadcasts may lack the first ones
            scale = scale.reshape((1,) * (weight.dim() - scale.dim()) + scale.shape)
        return scale.transpose(0, self.channel_dim) if moved and scale.dim() else scale

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


class ActivationQuantizer(_Quantizer):
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
            scale = nn.Parameter(self.scale.detach().clone())
            del self.scale
            self.scale = scale
            self.bound_scale_()
        return cast(nn.Parameter, self.scale)

    @torch.no_grad()
    def bound_scale_(self) -> None:
        """Let a learned scale fall to a 32nd of what it is now, and no further."""
        if self.learns_scale:
            self.lowest_scale = self.scale / _LARGEST_FALL

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
