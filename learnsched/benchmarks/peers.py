"""Public peers in the cells of the accuracy benchmark: torchao's PARQ and Brevitas' quantizers.

    python -m venv --system-site-packages peers
    peers/bin/pip install torchao==0.18.0 brevitas==0.13.4
    peers/bin/python -m learnsched.benchmarks.peers --grid small --out FOLDER

Same networks, initial weights, batches, epochs, optimizer and search budget as every other method, and
records in the same folder. The peers have an environment of their own, for they pin what they need.
torchao's PARQ quantizes weights; activations are quantized by this package, with a straight-through
gradient of searched width. Brevitas quantizes both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, cast

import torch
from torch import nn

from learnsched.benchmarks import plain, spaces
from learnsched.benchmarks.accuracy import Entry, execute, parser
from learnsched.benchmarks.records import PEER
from learnsched.benchmarks.search import Train
from learnsched.benchmarks.spaces import Trial
from learnsched.convert import quantize_
from learnsched.meta.tasks import BITS, Task
from learnsched.policies import StraightThrough
from learnsched.scheduler import QuantizationScheduler


@dataclass(frozen=True)
class Parq:
    """Parameters of torchao's PARQ.

    Attributes:
        start: share of the steps after which the slope begins to rise.
        end: share of the steps at which weights are hard.
        steepness: of the sigmoid in between.
        activation_backward_std: of this package's activations.
    """

    start: float
    end: float
    steepness: float
    activation_backward_std: float


@dataclass(frozen=True)
class Brevitas:
    """Parameters of Brevitas' quantizers.

    Attributes:
        scaling: ``constant``, or ``largest`` for a scale from each channel's largest weight, which
            binary weights do not have.
        factor: constant scale of a layer, in standard deviations of its weights at the start.
    """

    scaling: str
    factor: float


def suggest_parq(trial: Trial) -> Parq:
    """torchao's own ranges: annealing may begin at once and must leave hard steps at the end."""
    return Parq(
        start=trial.suggest_float("start", 0.0, 0.3),
        end=trial.suggest_float("end", 0.5, 0.95),
        steepness=trial.suggest_float("steepness", 1.0, 50.0, log=True),
        activation_backward_std=trial.suggest_float("activation_backward_std", 0.2, 3.0, log=True),
    )


def suggest_brevitas(trial: Trial, bits: str) -> Brevitas:
    """The rule of the scale, where there is a choice, and its factor."""
    ternary = bits.startswith("ternary")
    choice = (
        trial.suggest_categorical("scaling", ["constant", "largest"]) if ternary else "constant"
    )
    return Brevitas(choice, trial.suggest_float("factor", 0.4, 2.5, log=True))


def prepare_parq(
    model: nn.Module, policy: Parq, task: Task
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Activations of this package, weights quantized by torchao's optimizer, a channel at a time."""
    from torchao.prototype.parq.optim import ProxPARQ, QuantOptimizer
    from torchao.prototype.parq.quant import LSBQuantizer

    activation = BITS[task.bits][1]
    if activation is not None:
        quantize_(model, None, activation)
        ste = StraightThrough(policy.activation_backward_std, policy.activation_backward_std)
        QuantizationScheduler(model, ste, epochs=2)  # constant until the end, where nothing changes
    weights = [layer.weight for layer in _layers_to_quantize(model, task)]
    chosen = {id(weight) for weight in weights}
    others: dict[str, Any] = {"params": [p for p in model.parameters() if id(p) not in chosen]}
    # torchao calls ternary 0 bits.
    quant_bits = 0 if task.bits.startswith("ternary") else 1
    base = torch.optim.Adam([{"params": weights, "quant_bits": quant_bits}, others], lr=1.0)
    steps = task.horizon * task.steps
    first, last = int(policy.start * steps), max(1, int(policy.end * steps))
    optimizer = QuantOptimizer(
        base,
        LSBQuantizer(optimal=False),
        ProxPARQ(first, max(first + 1, last), steepness=policy.steepness),
        quant_per_channel=True,
    )
    return model, optimizer


def prepare_brevitas(
    model: nn.Module, policy: Brevitas, task: Task
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Layers and activations replaced by Brevitas' own, the weights kept."""
    weight, activation = _brevitas_layers(task.bits, policy, task.horizon * task.steps)
    _replace(model, _layers_to_quantize(model, task), weight, activation)
    return plain.adam(model, None, task)


def _layers_to_quantize(model: nn.Module, task: Task) -> list[Any]:
    """The weight layers, without the ends where those stay real."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)]
    return layers[1:-1] if task.float_ends else layers


def _brevitas_layers(
    bits: str, policy: Brevitas, steps: int
) -> tuple[Callable[[nn.Module], nn.Module], Callable[[], nn.Module]]:
    import brevitas.nn as qnn
    from brevitas.quant import Int8WeightPerChannelFloat
    from brevitas.quant.binary import (
        SignedBinaryActPerTensorConst,
        SignedBinaryWeightPerTensorConst,
    )
    from brevitas.quant.ternary import (
        SignedTernaryActPerTensorConst,
        SignedTernaryWeightPerTensorConst,
    )

    kind, after = bits.split("/")

    def quantizer(layer: nn.Module) -> Any:
        scale = policy.factor * cast(torch.Tensor, layer.weight).detach().std().item()
        if kind == "binary":
            return SignedBinaryWeightPerTensorConst.let(scaling_const=scale)
        if policy.scaling == "constant":
            return SignedTernaryWeightPerTensorConst.let(scaling_const=scale)
        return Int8WeightPerChannelFloat.let(bit_width=2, narrow_range=True)

    def weight(layer: nn.Module) -> nn.Module:
        has_bias, quant = layer.bias is not None, quantizer(layer)
        if isinstance(layer, nn.Linear):
            made = qnn.QuantLinear(
                layer.in_features, layer.out_features, bias=has_bias, weight_quant=quant
            )
        else:
            convolution = cast(nn.Conv2d, layer)
            make = qnn.QuantConv1d if isinstance(layer, nn.Conv1d) else qnn.QuantConv2d
            made = make(
                convolution.in_channels, convolution.out_channels, convolution.kernel_size,
                stride=convolution.stride, padding=convolution.padding, bias=has_bias,
                weight_quant=quant,
            )  # fmt: skip
        made.weight = layer.weight
        made.bias = layer.bias
        return cast(nn.Module, made)

    def activation() -> nn.Module:
        if after == "2-bit":
            # Brevitas' 300 steps of statistics would be the whole of a short run.
            made = qnn.QuantReLU(bit_width=2, collect_stats_steps=max(1, min(300, steps // 10)))
        elif after == "ternary":
            made = qnn.QuantIdentity(act_quant=SignedTernaryActPerTensorConst)
        elif after == "real":
            made = nn.ReLU()
        else:
            made = qnn.QuantIdentity(act_quant=SignedBinaryActPerTensorConst)
        return cast(nn.Module, made)

    return weight, activation


def _replace(
    model: nn.Module,
    layers: Sequence[nn.Module],
    weight: Callable[[nn.Module], nn.Module],
    activation: Callable[[], nn.Module],
) -> None:
    for name, child in model.named_children():
        if any(child is layer for layer in layers):
            setattr(model, name, weight(child))
        elif isinstance(child, nn.ReLU):
            setattr(model, name, activation())
        else:
            _replace(child, layers, weight, activation)


def entries(bits: str) -> list[Entry]:
    """The peers that apply to cells of these bits.

    Raises:
        ModuleNotFoundError: a peer is not installed in this environment.
    """
    found = []
    parq = spaces.within(suggest_parq, bits)
    for name, package, prepare, suggest in (
        ("PARQ (torchao)", "torchao", prepare_parq, parq),
        ("Brevitas", "brevitas", prepare_brevitas, functools.partial(suggest_brevitas, bits=bits)),
    ):
        train = functools.partial(plain.train, cast(Any, prepare))
        version = f"{package} {metadata.version(package)}"
        found.append(Entry(name, PEER, cast(Train, train), suggest, version, version))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    execute(parser(__doc__).parse_args(arguments), lambda task: entries(task.bits))


if __name__ == "__main__":
    main()
