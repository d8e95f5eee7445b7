"""Layers that compute with a quantized weight, and which modules of a model are quantized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from learnsched.quantizers import WeightQuantizer


class QuantizedLinear(nn.Linear):
    """A linear layer that computes with its quantized weight."""

    weight_quantizer: WeightQuantizer

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight_quantizer(self.weight), self.bias)


class QuantizedConv1d(nn.Conv1d):
    """A 1-d convolution that computes with its quantized weight."""

    weight_quantizer: WeightQuantizer

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight_quantizer(self.weight), self.bias)


class QuantizedConv2d(nn.Conv2d):
    """A 2-d convolution that computes with its quantized weight."""

    weight_quantizer: WeightQuantizer

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight_quantizer(self.weight), self.bias)


class QuantizedConvTranspose1d(nn.ConvTranspose1d):
    """A 1-d transposed convolution that computes with its quantized weight."""

    weight_quantizer: WeightQuantizer

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return _conv_transpose(self, F.conv_transpose1d, input, output_size)


class QuantizedConvTranspose2d(nn.ConvTranspose2d):
    """A 2-d transposed convolution that computes with its quantized weight."""

    weight_quantizer: WeightQuantizer

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return _conv_transpose(self, F.conv_transpose2d, input, output_size)


QuantizedLayer = (
    QuantizedLinear
    | QuantizedConv1d
    | QuantizedConv2d
    | QuantizedConvTranspose1d
    | QuantizedConvTranspose2d
)

QUANTIZED_TYPES: dict[type[nn.Module], type[QuantizedLayer]] = {
    nn.Linear: QuantizedLinear,
    nn.Conv1d: QuantizedConv1d,
    nn.Conv2d: QuantizedConv2d,
    nn.ConvTranspose1d: QuantizedConvTranspose1d,
    nn.ConvTranspose2d: QuantizedConvTranspose2d,
}

QUANTIZED_LAYERS = tuple(QUANTIZED_TYPES.values())

# A staircase contains the clipping of these; the others are computed ahead of it.
CLIPPING = (nn.ReLU, nn.ReLU6, nn.Hardtanh)
_SMOOTH = (nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish)
ACTIVATIONS = CLIPPING + _SMOOTH
# all that quantize_ can turn into something else
KNOWN = (*QUANTIZED_TYPES, *ACTIVATIONS)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def channel_dim(module: nn.Module) -> int:
    """The dimension of a weight that its output channels lie along."""
    return int(isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d))


def fan_in(module: QuantizedLayer) -> int:
    """Weights that add up to one output; of a transposed convolution with stride 1."""
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d):
        return module.weight[:, 0].numel() // module.groups
    return module.weight[0].numel()


def _conv_transpose(
    module: Any, convolve: Callable[..., Tensor], input: Tensor, output_size: list[int] | None
) -> Tensor:
    padding = module._output_padding(
        input,
        output_size,
        module.stride,
        module.padding,
        module.kernel_size,
        len(module.kernel_size),
        module.dilation,
    )
    return convolve(
        input,
        module.weight_quantizer(module.weight),
        module.bias,
        module.stride,
        module.padding,
        padding,
        module.groups,
        module.dilation,
    )
