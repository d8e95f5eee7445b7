"""What quantizers of weights and of activations share.

Noise levels, memberships and held values are buffers, so that ``state_dict``, ``torch.compile``,
``higher`` and data-parallel wrappers all see them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from learnsched.annealed import MODES, quantize_unchecked
from learnsched.concrete import concrete_quantize
from learnsched.levels import LevelSet
from learnsched.noise import NOISE_CODES, noise_shape

_EXTRA = "_extra_state"  # as torch calls it in a state_dict

NOISE_BUFFERS = ("forward_std", "backward_std", "forward_mean", "backward_mean")

# A learned scale may fall by this factor at most.
LARGEST_FALL = 32.0


def as_parameter(values: Tensor) -> nn.Parameter:
    """A parameter of these values that optimizers can change, wherever it is made.

    Example:
        >>> with torch.inference_mode():
        ...     parameter = as_parameter(torch.zeros(2))
        >>> parameter.is_inference()
        False
    """
    with torch.inference_mode(False):
        return nn.Parameter(values.detach().clone())


class Quantizer(nn.Module):
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
            state_dict = {**state_dict, bound: scale / LARGEST_FALL}
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
        """Levels and thresholds, which states must have alike to be exchanged, and the kind of noise.

        The latter is a number of its shape and mode, and the temperature of concrete samples, 0 without.
        """
        kind = NOISE_CODES[self.noise.name] * len(MODES) + MODES.index(self.mode)
        numbers = [*self.levels.values, *self.levels.thresholds, kind, self.temperature or 0.0]
        return torch.tensor(numbers, dtype=torch.float64, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Take the kind of noise of a state, unless it is of another level set.

        Raises:
            ValueError: the state belongs to another level set.
        """
        # Levels rise, and the first threshold lies below the last of them.
        count = 1 + int((state.diff() < 0).nonzero()[0])
        sets, kind = state[: 2 * count - 1], state[2 * count - 1 :].tolist()
        own = self.get_extra_state()[: len(sets)].to(sets)  # which may have been cast
        if count != len(self.levels.values) or not torch.equal(sets, own):
            raise ValueError(
                f"this state was saved with the levels {sets[:count].tolist()} and thresholds "
                f"{sets[count:].tolist()}, the quantizer of {self.layer_name!r} has "
                f"{list(self.levels.values)} and {list(self.levels.thresholds)}; quantize the model "
                "with the same level sets as before, then load it"
            )
        # Older states do not know the kind of noise, and somewhat older ones its temperature.
        if kind:
            noise, mode = divmod(int(kind[0]), len(MODES))
            self.noise, self.mode = noise_shape(list(NOISE_CODES)[noise]), MODES[mode]
        if kind[1:]:
            self.temperature = kind[1] or None

    def extra_repr(self) -> str:
        return f"levels={self.levels.name}, noise={self.noise.name}"
