"""Settings, one a layer, on the quantized layers of a model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from learnsched.layers import Layer, noise_fields
from learnsched.modules import QUANTIZED_LAYERS
from learnsched.optimizer_checks import parameters_of
from learnsched.schedule import Setting

# A std that no dtype of a network rounds to 0.
_VISIBLE = 1e-4


def check_fractions(
    layers: Sequence[Layer], before: Sequence[Setting], settings: Sequence[Setting]
) -> None:
    """Refuse settings that would have frozen weights thaw.

    Args:
        layers: of the model, from the input.
        before: the settings in force, one a layer.
        settings: those to come.

    Raises:
        ValueError: a fraction decreases, or more weights are frozen already.
    """
    for layer, old, new in zip(layers, before, settings, strict=True):
        if new.fraction < old.fraction:
            raise ValueError(
                f"the policy lets the INQ fraction of {layer.info.name} decrease from "
                f"{old.fraction} to {new.fraction}; fractions are cumulative"
            )
        if layer.weight is None:
            continue
        membership = layer.weight.weight_quantizer.membership
        frozen = int(torch.count_nonzero(membership))
        if frozen > round(new.fraction * membership.numel()):
            raise ValueError(
                f"{frozen} of {membership.numel()} weights of {layer.info.name} are frozen, the "
                f"policy asks for the fraction {new.fraction}. To resume, make the scheduler "
                "before the model's and its own state are loaded; to train anew, quantize the "
                "float model again"
            )


@torch.no_grad()
def set_noise_(layers: Sequence[Layer], settings: Sequence[Setting]) -> None:
    """Give every quantizer the noise of its layer's setting."""
    for layer, setting in zip(layers, settings, strict=True):
        for quantizer in layer.quantizers:
            for buffer, field in noise_fields(quantizer).items():
                getattr(quantizer, buffer).fill_(getattr(setting, field))


def freeze_(
    layers: Sequence[Layer], settings: Sequence[Setting], partition: str, seed: int
) -> None:
    """Freeze weights up to the fraction of each layer's setting.

    Args:
        layers: of the model, from the input.
        settings: one a layer.
        partition: the order in which weights are taken, see :data:`learnsched.incremental.PARTITIONS`.
        seed: of random orders; layers draw from seeds that follow it.
    """
    for index, (layer, setting) in enumerate(zip(layers, settings, strict=True)):
        if layer.weight is None:
            continue
        weight = layer.weight.weight
        generator = torch.Generator(weight.device)
        generator.manual_seed((seed + index) % 2**63)
        layer.weight.weight_quantizer.freeze_(weight, setting.fraction, partition, generator)


def restore_(layers: Sequence[Layer], optimizer: torch.optim.Optimizer) -> None:
    """Put frozen weights and learned scales in their place where an optimizer has moved them.

    Others are left alone: to write to them would spoil a backward pass under way, as that of a second
    optimizer's part of the model.
    """
    moved = parameters_of(optimizer)
    for layer in layers:
        for activation in layer.activations:
            if id(activation.scale) in moved:
                activation.restore_scale_()
        # remove_quantizers_ may have finished one of the models that an optimizer trains.
        if isinstance(layer.weight, QUANTIZED_LAYERS) and id(layer.weight.weight) in moved:
            layer.weight.weight_quantizer.restore_(layer.weight.weight)


def has_noise_of(layers: Sequence[Layer], settings: Sequence[Setting]) -> bool:
    """Whether the model holds the noise of these settings, but for what its dtype has rounded."""
    return all(
        math.isclose(
            float(getattr(quantizer, buffer)),
            getattr(setting, field),
            rel_tol=0.01,
            abs_tol=_VISIBLE,
        )
        for layer, setting in zip(layers, settings, strict=True)
        for quantizer in layer.quantizers
        for buffer, field in noise_fields(quantizer).items()
    )


def is_finalized(layers: Sequence[Layer], settings: Sequence[Setting]) -> bool:
    """Whether a std that the settings made positive is 0, or all is frozen before its time."""
    frozen = [
        (setting.fraction, layer.weight.weight_quantizer.membership)
        for layer, setting in zip(layers, settings, strict=True)
        if layer.weight is not None
    ]
    # A fraction below 1 may be all of a small weight.
    early = any(round(fraction * marks.numel()) < marks.numel() for fraction, marks in frozen)
    if early and all(bool(marks.all()) for _, marks in frozen):
        return True
    return any(
        getattr(setting, noise_fields(quantizer)["forward_std"]) > _VISIBLE
        and not bool(quantizer.forward_std.any())
        for layer, setting in zip(layers, settings, strict=True)
        for quantizer in layer.quantizers
    )
