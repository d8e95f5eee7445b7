"""The finished network: hard, on its levels to the bit, with batch norm statistics of its own."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from learnsched.activation_quantizer import ActivationQuantizer
from learnsched.batch_norm import moved, reestimate_, statistics
from learnsched.batches import (
    Forward,
    checked,
    on_first,
    put_back_on_failure,
)
from learnsched.layers import Layer, quantized_layers
from learnsched.modules import QUANTIZED_TYPES, QuantizedLayer
from learnsched.quantizer import NOISE_BUFFERS
from learnsched.weight_warnings import has_lost_noise


@dataclass(frozen=True, eq=False)
class IntegerWeights:
    """A quantized weight as codes: the weight is ``values[codes] * scale``, to the bit.

    Attributes:
        codes: index into ``values`` of every weight, int64, the weight's shape.
        values: the level set, increasing.
        scale: positive, in a shape that broadcasts to the weight.

    Example:
        >>> import learnsched as ls
        >>> net = ls.finalize_(ls.quantize_(nn.Linear(8, 4), ls.ternary()))
        >>> found = ls.integer_weights(net)[""]
        >>> found.values, tuple(found.codes.shape), tuple(found.scale.shape)
        ((-1.0, 0.0, 1.0), (4, 8), (4, 1))
        >>> torch.equal(found.integers * found.scale, net.weight)
        True
    """

    codes: Tensor
    values: tuple[float, ...]
    scale: Tensor

    @property
    def integers(self) -> Tensor:
        """The levels themselves as int64, for level sets of integers.

        Raises:
            ValueError: a level is not an integer.
        """
        if any(v != int(v) for v in self.values):
            raise ValueError(f"the levels {self.values} are not integers; use codes and values")
        return torch.tensor([int(v) for v in self.values], device=self.codes.device)[self.codes]


@torch.no_grad()
def finalize_(
    model: nn.Module, loader: Iterable[Any] | None = None, *, forward: Forward | None = None
) -> nn.Module:
    """Harden the network: noise 0, every weight on its level set, batch norm re-estimated.

    Args:
        model: converted by ``quantize_``, trained under a scheduler or by any other means. Averages
            of weights (``torch.optim.swa_utils.AveragedModel``, of buffers too or not, or what it
            wraps) lie between levels: they are projected anew, with a warning; so are other values
            written over frozen weights after the end of training.
        loader: training batches to re-estimate batch norm statistics from, each by its size, as the
            model was fed them, finitely many; None keeps them. Frozen batch norms, which are in
            evaluation inside a module in training, keep theirs in any case. Of data-parallel processes
            each takes its own batches: give all of them the same ones, or finalize in one and save
            that.
        forward: runs the model on a batch of any other kind, see :func:`calibrate_`.

    Returns:
        ``model`` itself. Its parameters hold the quantized weights.

    Raises:
        RuntimeError: a weight is not on its level set, to the bit, a parameter is not finite, a
            learned scale is not positive and finite, or learned noise is not finite.
        TypeError: without ``forward``, a batch is neither a tensor nor a tuple that starts with one.
        ValueError: the model has no quantized layers, the loader or a batch is empty, or too small for
            batch norm, or gives it statistics that are not finite.

        Whatever fails, a batch in the middle of the loader included, the model is as it was.

    Example:
        >>> from learnsched import quantize_, ternary
        >>> net = quantize_(nn.Sequential(nn.Linear(8, 1, bias=False)), ternary())
        >>> len(finalize_(net)[0].weight.unique()) <= 3
        True
    """
    layers = quantized_layers(model)
    run = forward or on_first
    batches = None if loader is None else checked(loader, model, run)
    _check_finite(model, layers)
    with put_back_on_failure(t for layer in layers for t in _tensors(layer)):
        comparable = _has_ended(layers) and not _is_averaged(model)
        _harden(model, layers)
        if batches is not None:
            before = statistics(model)
            reestimate_(model, batches, run)
            if comparable and (norms := moved(before)):
                _warn_of_moved(model, norms)
    return model


def _has_ended(layers: Iterable[Layer]) -> bool:
    """Whether all weights are frozen: before that, an optimizer may move some, and noise statistics."""
    quantizers = [layer.weight.weight_quantizer for layer in layers if layer.weight is not None]
    return bool(quantizers) and all(bool(q.membership.all()) for q in quantizers)


def _is_averaged(model: nn.Module) -> bool:
    return any(isinstance(module, AveragedModel) for module in model.modules())


def _check_finite(model: nn.Module, layers: Iterable[Layer]) -> None:
    """Refuse what training has left without a level.

    Raises:
        RuntimeError: a parameter or learned noise is not finite, or a scale is not positive.
    """
    for layer in layers:
        if has_lost_noise(layer):
            raise RuntimeError(
                f"the learned noise of {layer.info.name} is not finite, so its weights have not been "
                "trained; learn noise at a lower rate"
            )
        if layer.weight is not None:
            if not bool(layer.weight.weight.isfinite().all()):
                raise RuntimeError(
                    f"the weight of {layer.info.name} is not finite, so it has no level; training has "
                    "diverged: lower the learning rate, or look for NaN in the data, which hard "
                    "activations make numbers of before any loss shows it"
                )
            found = layer.weight.weight_quantizer.scale(layer.weight.weight)
            if not bool(((found > 0) & found.isfinite()).all()):
                raise RuntimeError(
                    f"a scale of the weight of {layer.info.name} is not positive and finite; learn "
                    "scales at a lower rate"
                )
        for activation in layer.activations:
            scale = float(activation.bounded_scale)
            if not 0 < scale < math.inf:
                raise RuntimeError(
                    f"the scale of the activation after {layer.info.name} has become {scale:g}, which "
                    "must be positive and finite; learn scales at a lower rate"
                )
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise RuntimeError(
                f"{name} is not finite, though no loss may have shown it, for quantizers make numbers "
                "of NaN; look for it in the data, or lower the learning rate"
            )


def _warn_of_moved(model: nn.Module, norms: Sequence[nn.Module]) -> None:
    names = [name for name, module in model.named_modules() if module in norms]
    warnings.warn(
        f"the loader gives the batch norms {names} far other statistics than they had at the end of "
        "training. If they were frozen there, call finalize_(model) without a loader; if the training "
        "loop prepares its batches, let forward= do so: lambda model, batch: model(prepare(batch[0]))",
        stacklevel=4,
    )


def _tensors(layer: Layer) -> Iterator[Tensor]:
    """What hardening changes of a layer."""
    if layer.weight is not None:
        yield layer.weight.weight
    for activation in layer.activations:
        yield activation.scale
    for quantizer in layer.quantizers:
        yield from quantizer.buffers()


def _harden(model: nn.Module, layers: Iterable[Layer]) -> None:
    """Noise 0 and every weight frozen on its level, checked."""
    _take_moved(model, layers)
    for layer in layers:
        for quantizer in layer.quantizers:
            for name in NOISE_BUFFERS:
                if name != "backward_std":
                    getattr(quantizer, name).zero_()
        for activation in layer.activations:
            activation.restore_scale_()
        if layer.weight is not None:
            layer.weight.weight_quantizer.freeze_(layer.weight.weight, 1.0, "settled")
            _check_on_levels(layer.info.name, layer.weight)


@torch.no_grad()
def integer_weights(model: nn.Module) -> dict[str, IntegerWeights]:
    """Codes and scale of every quantized weight, by the name of its module in ``model``.

    Of modules that share a weight, it is the name of the first.

    Raises:
        RuntimeError: the model is not finalized.
        ValueError: the model has no quantized layers.

    Example:
        >>> from learnsched import quantize_, ternary
        >>> net = finalize_(quantize_(nn.Sequential(nn.Linear(8, 4)), ternary()))
        >>> sorted(integer_weights(net)["0"].integers.unique().tolist())
        [-1, 0, 1]
    """
    # Layers keep the names that they were quantized by; a wrapper, as AveragedModel, changes those.
    names = {module: name for name, module in model.named_modules()}
    weights = [layer.weight for layer in quantized_layers(model) if layer.weight is not None]
    return {names[module]: _check_on_levels(names[module], module) for module in weights}


def check_finalized(model: nn.Module) -> None:
    """Refuse a model that ``finalize_`` has not hardened, or that has been trained on since.

    Raises:
        RuntimeError: a weight is not on its levels, or an activation has noise.
        ValueError: the model has no quantized layers.
    """
    integer_weights(model)
    for name, module in model.named_modules():
        if isinstance(module, ActivationQuantizer) and bool(
            (module.forward_std != 0) | (module.forward_mean != 0)
        ):
            raise RuntimeError(f"{name} has noise; call learnsched.finalize_(model) first")


@torch.no_grad()
def remove_quantizers_(model: nn.Module) -> nn.Module:
    """Turn the quantized layers of a finished model into plain ones, weights on their levels.

    What the model computes stays the same, and its ``state_dict`` is that of the float model, a third as
    large; where activations are quantized, that of ``quantize_(float_model, activation=levels)``, which
    loads it. Activations keep their quantizers, which compute them. The weights ask for no gradient any
    more, so that further training leaves them on their levels. It cannot be exported: do that before.

    Args:
        model: finalized.

    Returns:
        ``model`` itself.

    Raises:
        RuntimeError: the model is not finalized. It is as it was.
        ValueError: the model has no quantized layers.

    Example:
        >>> from learnsched import quantize_, ternary
        >>> net = finalize_(quantize_(nn.Sequential(nn.Linear(8, 4)), ternary()))
        >>> remove_quantizers_(net)
        Sequential(
          (0): Linear(in_features=8, out_features=4, bias=True)
        )
    """
    check_finalized(model)
    plain: dict[type[nn.Module], type[nn.Module]] = {q: p for p, q in QUANTIZED_TYPES.items()}
    for module in model.modules():
        if type(module) in plain:
            del module.weight_quantizer
            module.__class__ = plain[type(module)]
            module.weight.requires_grad_(False)
        elif isinstance(module, ActivationQuantizer):
            module.is_left_over = True
    return model


def _take_moved(model: nn.Module, layers: Iterable[Layer]) -> None:
    """Free frozen weights that hold other values since, if these are meant: averages, or a copy."""
    quantizers = [
        (layer.info.name, layer.weight.weight_quantizer, layer.weight.weight)
        for layer in layers
        if layer.weight is not None
    ]
    averaged, ended = _is_averaged(model), _has_ended(layers)
    taken: list[str] = []
    returned: list[str] = []
    for name, quantizer, weight in quantizers:
        is_moved = quantizer.is_moved(weight)
        # In the middle of a run, an optimizer that the scheduler does not know has moved them.
        if quantizer.is_averaged or (is_moved and (averaged or ended)):
            quantizer.take_(weight)
            taken.append(name)
        elif is_moved:
            returned.append(name)
    if taken:
        warnings.warn(
            f"averages of quantized weights lie between the levels, and so do other values written "
            f"over them, as by an optimizer that the scheduler does not know: those of {taken} are "
            "projected anew. Compare with the model that was not averaged, or give the scheduler the "
            "optimizer",
            stacklevel=5,
        )
    if returned:
        warnings.warn(
            f"frozen weights of {returned} were moved since the scheduler's last step(), and go back "
            "to their levels. If an optimizer did that, give it to the scheduler; if they are averages, "
            "finalize the AveragedModel itself",
            stacklevel=5,
        )


def _check_on_levels(name: str, module: QuantizedLayer) -> IntegerWeights:
    quantizer = module.weight_quantizer
    if not bool((quantizer.membership == 1).all()):
        raise RuntimeError(f"{name} has free weights; call learnsched.finalize_(model) first")
    scale = quantizer.scale(module.weight)
    codes = quantizer.levels.codes(module.weight / scale)
    values = module.weight.new_tensor(quantizer.levels.values)
    if not torch.equal(values[codes] * scale, module.weight):
        raise RuntimeError(
            f"weights of {name} have left their level set, as when an optimizer steps after "
            "finalize_; call finalize_ again"
        )
    return IntegerWeights(codes, quantizer.levels.values, scale)
