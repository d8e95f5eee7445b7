"""What an optimizer shows of a loop that trains something else than it should."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from learnsched.layers import Layer


def own_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer that takes the steps: wrappers, as of Accelerate, call it and not its hooks.

    Raises:
        TypeError: there is none.
    """
    while not hasattr(optimizer, "_optimizer_step_post_hooks") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {optimizer!r}")
    return optimizer


def parameters_of(*optimizers: torch.optim.Optimizer) -> set[int]:
    """The ids of the parameters that optimizers hold."""
    groups = (group for optimizer in optimizers for group in optimizer.param_groups)
    return {id(parameter) for group in groups for parameter in group["params"]}


def warn_of_strangers(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Warn of an optimizer that was made for another model, or before modules were replaced.

    Args:
        optimizer: see :func:`own_optimizer`.
        model: what it should train.
    """
    own = {id(parameter) for parameter in model.parameters()}
    given = parameters_of(optimizer)
    if given and own.isdisjoint(given):
        warnings.warn(
            "the optimizer holds no parameter of this model: it would count the steps of another, as of "
            "a copy. Give the scheduler the model that the optimizer trains",
            stacklevel=3,
        )
    elif not given <= own:
        named = model.named_parameters()
        if missing := [name for name, p in named if p.requires_grad and id(p) not in given]:
            warnings.warn(
                f"the optimizer holds parameters that this model has not, and lacks {missing}: modules "
                "seem to have been replaced after it was made. Make it after attention_to_linears_ and "
                "quantize_",
                stacklevel=3,
            )


def warn_of_untrained(layers: Sequence[Layer], optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Warn of scales and noise that were made parameters, and that no optimizer knows.

    Args:
        layers: of the model, from the input.
        optimizers: all that train the model, as far as is known.
    """
    trained = parameters_of(*optimizers)
    idle = [
        f"{name} of {layer.info.name}"
        for layer in layers
        for quantizer in layer.quantizers
        for name, parameter in quantizer.named_parameters(recurse=False)
        if name in ("scale", "log_scale", "log_std")
        and parameter.requires_grad
        and id(parameter) not in trained
    ]
    if idle:
        warnings.warn(
            f"no optimizer holds {idle}, which were made parameters to be learned: they stay as they "
            "are. Give it what learn_scales_ or the like returns, with optimizer.add_param_group, ahead "
            "of training",
            stacklevel=3,
        )
