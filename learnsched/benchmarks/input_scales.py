"""XNOR-Net's scales of binary inputs: one a place of the output, from what the signs leave out.

They depend on the data, so that a network with them is no integer network: only the comparison has
them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from learnsched.activation_quantizer import ActivationQuantizer
from learnsched.modules import QUANTIZED_LAYERS, QuantizedConv1d, QuantizedConv2d, QuantizedLinear

# What leaves the magnitudes of an input where a layer after it finds them.
_RESHAPES = (nn.Flatten, nn.Unflatten, nn.Identity)


class InputScaled(nn.Module):
    """A binary activation and the layer that reads it, whose outputs are multiplied by input scales.

    The scale ``K`` of an output is the mean magnitude of the inputs that it is computed from: averaged
    over channels, then over the kernel's window, zeros of the padding included. For a linear layer it
    is that of the whole input.

    Args:
        activation: what makes the signs.
        layer: a linear layer or a convolution.

    Source:
        Rastegari et al. 2016 (XNOR-Net, arXiv:1603.05279), section 3.2, equations 8 to 11.

    Example:
        >>> layer = InputScaled(nn.Identity(), nn.Linear(4, 2))
        >>> layer.magnitude(torch.tensor([[1.0, -3.0, 0.0, 0.0]])).tolist()
        [[1.0]]
    """

    def __init__(self, activation: nn.Module, layer: nn.Linear | nn.Conv1d | nn.Conv2d) -> None:
        super().__init__()
        self.activation = activation
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output on the signs of ``x``, without its bias times ``K``, and the bias."""
        outputs, scale = self.layer(self.activation(x)), self.magnitude(x)
        if self.layer.bias is None:
            return scale * outputs
        bias = self.layer.bias.view(-1, *[1] * (outputs.dim() - 2))
        return scale * (outputs - bias) + bias

    def magnitude(self, x: Tensor) -> Tensor:
        """The scales ``K``, shape ``(batch, 1, ...)``."""
        layer = self.layer
        if isinstance(layer, nn.Linear):
            return x.abs().mean(-1, keepdim=True)
        mean = x.abs().mean(1, keepdim=True)
        share = 1 / layer.weight[0, 0].numel()
        window = torch.full((1, 1, *layer.kernel_size), share, dtype=x.dtype, device=x.device)
        convolve = F.conv1d if isinstance(layer, nn.Conv1d) else F.conv2d
        result: Tensor = convolve(
            mean,
            window,
            None,
            layer.stride,
            layer.padding,
            layer.dilation,  # type: ignore[arg-type]
        )
        return result


def scale_inputs_(model: nn.Module) -> None:
    """Put input scales on every layer that reads a quantized activation, in place.

    Args:
        model: an ``nn.Sequential`` converted by ``quantize_``, whose activations are each read by the
            next layer.

    Raises:
        ValueError: the model is no such chain.

    Example:
        >>> from learnsched import binary, quantize_
        >>> net = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
        >>> scale_inputs_(quantize_(net, binary(), binary()))
        >>> [type(layer).__name__ for layer in net]
        ['QuantizedLinear', 'BatchNorm1d', 'Identity', 'InputScaled']
    """
    if not isinstance(model, nn.Sequential):
        raise ValueError(
            "input scales are for a chain of layers, an nn.Sequential, where the next layer reads an "
            f"activation; got a {type(model).__name__}"
        )
    pending: int | None = None
    for index, module in enumerate(list(model)):
        if isinstance(module, ActivationQuantizer):
            pending = index
        elif isinstance(module, QUANTIZED_LAYERS) and pending is not None:
            if not isinstance(module, QuantizedLinear | QuantizedConv1d | QuantizedConv2d):
                raise ValueError(
                    f"layer {index} is a {type(module).__name__}, which has no input scales"
                )
            activation = model[pending]
            model[pending] = nn.Identity()
            model[index] = InputScaled(activation, module)
            pending = None
        elif pending is not None and not isinstance(module, _RESHAPES):
            raise ValueError(
                f"layer {index}, a {type(module).__name__}, stands between an activation and the layer "
                "that reads it; only changes of shape may"
            )
