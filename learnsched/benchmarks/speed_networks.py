"""Networks of the speed benchmark, in floating point, quantized, and by the peers that are installed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import learnsched as ls

# Computes something once; what it returns is thrown away.
Action = Callable[[], object]
Operation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Layers:
    """What a network is built of."""

    linear: Callable[..., nn.Module] = nn.Linear
    convolution: Callable[..., nn.Module] = nn.Conv2d
    activation: Callable[[], nn.Module] = nn.ReLU


class _Block(nn.Module):
    """Two convolutions around which the input passes."""

    def __init__(self, layers: Layers, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            layers.convolution(inputs, width, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            layers.activation(),
            layers.convolution(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.around: nn.Module = nn.Identity()
        if stride != 1 or inputs != width:
            around = layers.convolution(inputs, width, 1, stride=stride, bias=False)
            self.around = nn.Sequential(around, nn.BatchNorm2d(width))
        self.activation = layers.activation()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.activation(self.body(x) + self.around(x))
        return result


@dataclass(frozen=True)
class Network:
    """A network and the shape of its input.

    Attributes:
        name: how it is called in tables.
        make: builds it.
        shape: batch first.
    """

    name: str
    make: Callable[[Layers], nn.Module]
    shape: tuple[int, ...]


def mlp(width: int = 256, depth: int = 3, batch: int = 64) -> Network:
    """Hidden layers of one width, each with batch norm."""

    def make(layers: Layers) -> nn.Module:
        parts: list[nn.Module] = [nn.Flatten()]
        for inputs in (784, *[width] * (depth - 1)):
            linear = layers.linear(inputs, width, bias=False)
            parts += [linear, nn.BatchNorm1d(width), layers.activation()]
        return nn.Sequential(*parts, nn.Linear(width, 10))

    name = f"MLP, {depth} hidden layers of {width}, batch {batch}"
    return Network(name, make, (batch, 1, 28, 28))


def cnn(widths: tuple[int, ...] = (32, 32, 64, 64, 128, 128), batch: int = 32) -> Network:
    """3×3 convolutions with batch norm; the image is halved where the width first grows."""

    def make(layers: Layers) -> nn.Module:
        parts: list[nn.Module] = []
        channels = 3
        for index, width in enumerate(widths):
            stride = 2 if index and width != widths[index - 1] else 1
            parts += [
                layers.convolution(channels, width, 3, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(width),
                layers.activation(),
            ]
            channels = width
        head = nn.Linear(channels, 10)
        return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)

    return Network(
        f"CNN, {len(widths)} convolutions, 32×32, batch {batch}", make, (batch, 3, 32, 32)
    )


def resnet(batch: int = 32) -> Network:
    """A stem and three residual blocks, 16, 32 and 64 wide."""

    def make(layers: Layers) -> nn.Module:
        return nn.Sequential(
            layers.convolution(3, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            layers.activation(),
            _Block(layers, 16, 16, 1),
            _Block(layers, 16, 32, 2),
            _Block(layers, 32, 64, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, 10),
        )

    return Network(f"ResNet-like, 3 blocks, 32×32, batch {batch}", make, (batch, 3, 32, 32))


def training_steps(network: Network, seed: int, device: torch.device) -> dict[str, Action]:
    """A training step of the network in floating point, hard, annealed, and of each peer found."""
    steps = {"float": training_step(_made(network, Layers(), seed, device), network, device)}
    for kind, std in (("hard", 0.0), ("annealed", 0.3)):
        model = quantized(network, seed, device)
        for name, buffer in model.named_buffers():
            if name.endswith("forward_std"):
                buffer.fill_(std)
        steps[kind] = training_step(model, network, device)
    if (layers := _brevitas_layers()) is not None:
        steps["Brevitas"] = training_step(_made(network, layers, seed, device), network, device)
    model = _made(network, Layers(), seed, device)
    if (optimizer := _parq_optimizer(model)) is not None:
        name = "torchao PARQ, weights only"
        steps[name] = training_step(model, network, device, optimizer)
    return steps


def quantized(network: Network, seed: int, device: torch.device) -> nn.Module:
    """The network with ternary weights and 2-bit activations."""
    x = torch.randn(network.shape, device=device)
    model = _made(network, Layers(), seed, device)
    return ls.quantize_(model, ls.ternary(), ls.unsigned(2), example_input=x)


def peer_operations(elements: int) -> dict[str, Operation]:
    """2-bit quantizers of the peers that are installed, on as many elements."""
    found: dict[str, Operation] = {}
    try:
        import brevitas.nn as qnn
    except ImportError:
        pass
    else:
        module = qnn.QuantReLU(bit_width=2, max_val=3.0)
        found["Brevitas QuantReLU, 2 bits"] = lambda x: module(x)
    try:
        from torchao.quantization import qat
    except ImportError:
        pass
    else:
        two_bits = torch.int2  # type: ignore[attr-defined]
        config = qat.IntxFakeQuantizeConfig(two_bits, "per_channel", is_symmetric=True)
        fake = qat.IntxFakeQuantizer(config)
        rows = 1000 if elements % 1000 == 0 else 1
        found["torchao IntxFakeQuantizer, 2 bits"] = lambda x: fake(x.view(rows, -1)).view(-1)
    return found


def _made(network: Network, layers: Layers, seed: int, device: torch.device) -> nn.Module:
    torch.manual_seed(seed)
    return network.make(layers).to(device)


def training_step(
    model: nn.Module,
    network: Network,
    device: torch.device,
    optimizer: torch.optim.Optimizer | None = None,
) -> Action:
    """A step on one random batch, of plain SGD unless there is an optimizer."""
    x = torch.randn(network.shape, device=device)
    y = torch.randint(10, network.shape[:1], device=device)
    chosen = optimizer or torch.optim.SGD(model.parameters(), lr=0.01)

    def step() -> None:
        chosen.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        chosen.step()

    return step


def _brevitas_layers() -> Layers | None:
    try:
        import brevitas.nn as qnn
    except ImportError:
        return None

    def linear(*args: Any, **options: Any) -> nn.Module:
        module: nn.Module = qnn.QuantLinear(*args, weight_bit_width=2, **options)
        return module

    def convolution(*args: Any, **options: Any) -> nn.Module:
        module: nn.Module = qnn.QuantConv2d(*args, weight_bit_width=2, **options)
        return module

    def activation() -> nn.Module:
        module: nn.Module = qnn.QuantReLU(bit_width=2)
        return module

    return Layers(linear, convolution, activation)


def _parq_optimizer(model: nn.Module) -> torch.optim.Optimizer | None:
    try:
        from torchao.prototype import parq
    except ImportError:
        return None
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups: list[dict[str, Any]] = [{"params": others}, {"params": weights, "quant_bits": 2}]
    base = torch.optim.SGD(groups, lr=0.01)
    annealing = parq.ProxPARQ(anneal_start=0, anneal_end=1_000_000)
    optimizer: torch.optim.Optimizer = parq.QuantOptimizer(base, parq.UnifQuantizer(), annealing)
    return optimizer
