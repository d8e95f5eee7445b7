"""Layers that compute with a quantized weight, and which modules of a model are quantized."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from learnsched.weight_quantizer import WeightQuantizer


class _OwnsQuantizer(nn.Module):
    """Frees what INQ has frozen when other weights take its place."""

    weight_quantizer: WeightQuantizer
    _loads_quantizer = False

    def __setattr__(self, name: str, value: Any) -> None:
        # As fusing with a batch norm does.
        weight = self._parameters.get(name) if name == "weight" else None
        replaced = weight is not None and weight is not value
        if weight is not None and isinstance(value, Tensor) and value.shape != weight.shape:
            raise ValueError(
                f"the weight of {self.weight_quantizer.layer_name} has shape {tuple(weight.shape)}, and "
                f"one of {tuple(value.shape)} cannot take its place; prune whole channels ahead of "
                "quantize_, or put a new layer in this one's place and quantize the model again"
            )
        super().__setattr__(name, value)
        if replaced and "weight_quantizer" in self._modules and not self._loads_quantizer:
            self._release("a new parameter took the place of frozen weights")

    def reset_parameters(self) -> None:
        """New random weights, all of them free."""
        super().reset_parameters()  # type: ignore[misc]
        if "weight_quantizer" in self._modules:
            self._release("frozen weights were drawn anew")

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        whole = any(name.startswith(f"{prefix}weight_quantizer.") for name in state_dict)
        errors = args[-1]
        before = len(errors)
        # With assign=True the weight is replaced, and what is frozen of it, if anything, comes after.
        self._loads_quantizer = True
        try:
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        finally:
            del self._loads_quantizer
        if f"{prefix}weight" in state_dict and not whole and len(errors) == before:
            self._release("a float checkpoint was loaded into a model with frozen weights")

    def _release(self, reason: str) -> None:
        if bool(self.weight_quantizer.membership.any()):
            warnings.warn(
                f"{reason}: they are free now and take its values; train on, or call "
                "learnsched.finalize_(model)",
                stacklevel=3,
            )
        self.weight_quantizer.release_()


class QuantizedLinear(_OwnsQuantizer, nn.Linear):
    """A linear layer that computes with its quantized weight."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight_quantizer(self.weight), self.bias)


class QuantizedConv1d(_OwnsQuantizer, nn.Conv1d):
    """A 1-d convolution that computes with its quantized weight."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight_quantizer(self.weight), self.bias)


class QuantizedConv2d(_OwnsQuantizer, nn.Conv2d):
    """A 2-d convolution that computes with its quantized weight."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight_quantizer(self.weight), self.bias)


class QuantizedConv3d(_OwnsQuantizer, nn.Conv3d):
    """A 3-d convolution that computes with its quantized weight."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight_quantizer(self.weight), self.bias)


class QuantizedConvTranspose1d(_OwnsQuantizer, nn.ConvTranspose1d):
    """A 1-d transposed convolution that computes with its quantized weight."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return _conv_transpose(self, F.conv_transpose1d, input, output_size)


class QuantizedConvTranspose2d(_OwnsQuantizer, nn.ConvTranspose2d):
    """A 2-d transposed convolution that computes with its quantized weight."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return _conv_transpose(self, F.conv_transpose2d, input, output_size)


class QuantizedConvTranspose3d(_OwnsQuantizer, nn.ConvTranspose3d):
    """A 3-d transposed convolution that computes with its quantized weight."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return _conv_transpose(self, F.conv_transpose3d, input, output_size)


QuantizedLayer = (
    QuantizedLinear
    | QuantizedConv1d
    | QuantizedConv2d
    | QuantizedConv3d
    | QuantizedConvTranspose1d
    | QuantizedConvTranspose2d
    | QuantizedConvTranspose3d
)

QUANTIZED_TYPES: dict[type[nn.Module], type[QuantizedLayer]] = {
    nn.Linear: QuantizedLinear,
    nn.Conv1d: QuantizedConv1d,
    nn.Conv2d: QuantizedConv2d,
    nn.Conv3d: QuantizedConv3d,
    nn.ConvTranspose1d: QuantizedConvTranspose1d,
    nn.ConvTranspose2d: QuantizedConvTranspose2d,
    nn.ConvTranspose3d: QuantizedConvTranspose3d,
}

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
QUANTIZED_LAYERS = tuple(QUANTIZED_TYPES.values())


class CopiedDecoderLayer(nn.TransformerDecoderLayer):
    """Torch's, whose copies and pickles keep an activation that is a module, as a quantizer is.

    Torch's own put ``F.relu`` in its place.
    """

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)


# A staircase contains the clipping of these; the others are computed ahead of it.
CLIPPING = (nn.ReLU, nn.ReLU6, nn.Hardtanh)
_SMOOTH = (
    nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Hardswish, nn.Softplus,
)  # fmt: skip
ACTIVATIONS = CLIPPING + _SMOOTH
# all that quantize_ can turn into something else
KNOWN = (*QUANTIZED_TYPES, *ACTIVATIONS)
# Layers with weights that a product is formed with, and that stay as they are.
REAL = (nn.Bilinear,)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def check_module(model: object) -> None:
    """Refuse what is no module.

    Raises:
        TypeError: ``model`` is none.

    Example:
        >>> check_module(nn.Linear)
        Traceback (most recent call last):
        ...
        TypeError: model must be an nn.Module, got <class 'torch.nn.modules.linear.Linear'>
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {model!r}")


def stays_real(module: nn.Module) -> bool:
    """Whether it is a layer with weights of no quantized kind: another layer, or a subclass of one.

    Example:
        >>> [stays_real(m) for m in (nn.Linear(2, 2), nn.Bilinear(2, 2, 2), nn.ReLU())]
        [False, True, False]
    """
    layers = (*QUANTIZED_TYPES, *REAL)
    return isinstance(module, layers) and type(module) not in QUANTIZED_TYPES


def matrices(module: nn.Module) -> list[str]:
    """Names of a module's own parameters that products are formed with, as it seems from their shapes.

    Where the first dimension is 1, it is a batch's, as in class tokens and positions.

    Example:
        >>> matrices(nn.Linear(3, 2)), matrices(nn.LayerNorm(3))
        (['weight'], [])
    """
    return [
        name
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() >= 2
        and parameter.shape[0] > 1
        and any(size > 1 for size in parameter.shape[1:])
    ]


def labelled(name: str, module: nn.Module, parameter: str) -> str:
    """A parameter as messages name it: where it is, and the kind of module that has it.

    Example:
        >>> labelled("head", nn.Linear(3, 2), "weight"), labelled("", nn.Linear(3, 2), "weight")
        ('head.weight (Linear)', 'weight (Linear)')
    """
    return f"{f'{name}.{parameter}'.lstrip('.')} ({type(module).__name__})"


def channel_dim(module: nn.Module) -> int:
    """The dimension of a weight that its output channels lie along."""
    return int(isinstance(module, TRANSPOSED))


def fan_in(module: QuantizedLayer) -> int:
    """Weights that add up to one output; of a transposed convolution with stride 1."""
    if isinstance(module, TRANSPOSED):
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
