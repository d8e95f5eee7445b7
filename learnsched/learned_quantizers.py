"""Scales and noise that are learned with the weights, by gradient descent, and samples to learn from."""

from __future__ import annotations

import math

import torch
from torch import nn

from learnsched.layers import quantized_activations, quantized_layers
from learnsched.quantizer import as_parameter


def learn_scales_(model: nn.Module) -> list[nn.Parameter]:
    """Make the scale of every quantized activation a parameter, in place.

    Its gradient is that of ``scale * E(x / scale)``: the rounding error of entries inside the range, and
    the outermost level for those beyond. Calibrate before, for the scale starts from what it is; it does
    not fall below a 32nd of that, which ``state_dict`` holds as ``lowest_scale`` beside ``scale``.

    Args:
        model: converted by ``quantize_``.

    Returns:
        the new parameters, one an activation, scalars. An optimizer that was made before does not know
        them: ``optimizer.add_param_group({"params": learn_scales_(model), "weight_decay": 0})``, before
        a learning-rate scheduler of torch is made, which counts the groups. With
        SGD, learn them at a fraction of the weights' learning rate. Adam's steps are about as large as
        the learning rate whatever the scale: small scales, of some hundredths, want a smaller one.

    Raises:
        ValueError: the model has no quantized activations.

    Source:
        Esser et al. 2020 (LSQ, arXiv:1902.08153), equation 3, under a softened staircase; Choi et al.
        2018 (PACT, arXiv:1805.06085).

    Example:
        >>> import torch
        >>> from learnsched import quantize_, ternary, unsigned
        >>> net = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
        >>> [scale] = learn_scales_(quantize_(net, ternary(), unsigned(2)))
        >>> net(torch.randn(16, 8)).sum().backward()
        >>> bool(scale.grad != 0)
        True
    """
    return [activation.learn_scale_() for activation in quantized_activations(model, "learned")]


def learn_weight_scales_(model: nn.Module) -> list[nn.Parameter]:
    """Let every quantized weight learn a factor of its scale, in place: one a channel or a tensor.

    The scale is what the weight's rule makes of it, times ``exp(log_scale)``; both are differentiated.
    The first frozen weight of a channel fixes its scale as ever.

    Args:
        model: converted by ``quantize_``.

    Returns:
        the new parameters ``log_scale``, one a weight, in the shape of its scale, 0 at first. They are
        part of the ``state_dict``, which only models with learned weight scales load. Give them to the
        optimizer as those of :func:`learn_scales_`, without weight decay.

    Raises:
        ValueError: the model has no quantized weights.

    Source:
        Esser et al. 2020 (LSQ, arXiv:1902.08153), equation 3; Louizos et al. 2019 (RQ,
        arXiv:1810.01875), section 2.1. There the scale itself is the parameter.

    Example:
        >>> import torch
        >>> from learnsched import quantize_, ternary
        >>> [log_scale] = learn_weight_scales_(quantize_(nn.Sequential(nn.Linear(8, 4)), ternary()))
        >>> log_scale.shape
        torch.Size([4, 1])
    """
    quantizers = [
        layer.weight.weight_quantizer
        for layer in quantized_layers(model)
        if layer.weight is not None
    ]
    if not quantizers:
        raise ValueError(
            "the model has no quantized weights whose scale could be learned; give quantize_ a weight "
            "level set such as ternary()"
        )
    learned: list[nn.Parameter] = []
    for quantizer in quantizers:
        if quantizer.log_scale is None:
            quantizer.log_scale = as_parameter(torch.zeros_like(quantizer.held_scale))
        learned.append(quantizer.log_scale)
    return learned


def learn_noise_(model: nn.Module) -> list[nn.Parameter]:
    """Let every quantizer learn a factor of its noise, in place; a schedule's std is multiplied by it.

    The factor of forward and backward noise is ``exp(log_std)``; its gradient is that of the forward
    value, under which a network that is sure of its weights narrows their noise. A hard quantizer
    stays hard.

    Args:
        model: converted by ``quantize_``.

    Returns:
        the new parameters ``log_std``, one a quantizer, scalars, 0 at first. They are part of the
        ``state_dict``, which only models with learned noise load.

    Raises:
        ValueError: the model has no quantizers.

    Source:
        Louizos et al. 2019 (RQ, arXiv:1810.01875), section 2.1, where the scale of the logistic noise
        is learned.

    Example:
        >>> import torch
        >>> from learnsched import policies, quantize_, QuantizationScheduler, ternary
        >>> net = quantize_(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)), ternary())
        >>> learned = learn_noise_(net)
        >>> scheduler = QuantizationScheduler(net, policies.RelaxedQuantization(), epochs=3)
        >>> net(torch.randn(16, 8)).square().sum().backward()
        >>> [bool(log_std.grad != 0) for log_std in learned]
        [True, True]
    """
    quantizers = [q for layer in quantized_layers(model) for q in layer.quantizers]
    for quantizer in quantizers:
        if quantizer.log_std is None:
            quantizer.log_std = as_parameter(torch.zeros_like(quantizer.forward_std))
    return [quantizer.log_std for quantizer in quantizers if quantizer.log_std is not None]


def sample_concrete_(model: nn.Module, temperature: float = 1.0) -> None:
    """Let every quantizer draw concrete samples of its levels while its noise lasts, in place.

    In evaluation it computes with their expectation. Samples take the place of the forward mode; their
    gradients are their own, so that the schedule's backward noise counts only once a quantizer is hard.
    They draw from the global generator.

    Args:
        model: converted by ``quantize_``.
        temperature: of the samples, positive; the lower, the nearer to levels.

    Raises:
        ValueError: the temperature is not positive, or the model has no quantizers.

    Source:
        Louizos et al. 2019 (RQ, arXiv:1810.01875), equations 6 to 8.

    Example:
        >>> from learnsched import quantize_, ternary
        >>> net = quantize_(nn.Sequential(nn.Linear(8, 4)), ternary())
        >>> sample_concrete_(net, temperature=0.5)
        >>> net[0].weight_quantizer.temperature
        0.5
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"the temperature must be positive and finite, got {temperature}")
    for layer in quantized_layers(model):
        for quantizer in layer.quantizers:
            quantizer.temperature = temperature
