"""The operations of a traced network that export knows, whether called as modules or functions."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from learnsched.activation_quantizer import ActivationQuantizer
from learnsched.export.errors import ExportError
from learnsched.export.graph import Window
from learnsched.export.quantized_input import QuantizedInput
from learnsched.modules import QUANTIZED_LAYERS, TRANSPOSED

QUANTIZERS = (ActivationQuantizer, QuantizedInput)
PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d)
FOLDED_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d)
MEAN_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)
_ADAPTIVE = (*MAX_POOLS[2:], *MEAN_POOLS[2:])
PADS = (nn.ConstantPad1d, nn.ConstantPad2d)  # of which ZeroPad1d and ZeroPad2d are
UPSAMPLINGS = (nn.Upsample,)
PASSING = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)  # fmt: skip
RESHAPES = (nn.Flatten, nn.Unflatten)
# Rising everywhere: what a threshold after them decides, a threshold ahead of them can.
RISING = (
    nn.ReLU,
    nn.ReLU6,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.RReLU,
    nn.ELU,
    nn.CELU,
    nn.SELU,
    nn.Softplus,
    nn.PReLU,
)

_ADD = (operator.add, operator.iadd, torch.add, "add", "add_")
_RELU = (F.relu, torch.relu, torch.relu_, "relu", "relu_")
_RESHAPE = (
    torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze,
    "flatten", "reshape", "view", "squeeze", "unsqueeze", "unflatten", "contiguous",
)  # fmt: skip
_DROPOUT = (
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    F.feature_alpha_dropout,
)
_MEAN = (torch.mean, "mean")
_CONCATENATE = (torch.cat, torch.concat, torch.concatenate)
_MAX = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_MEAN_1D = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
_MEAN_2D = (*_MEAN_1D, "divisor_override")
# With the names of their arguments, all of which may be given by position.
_POOLS: Mapping[Callable[..., Any], tuple[type[nn.Module], tuple[str, ...]]] = {
    F.max_pool1d: (nn.MaxPool1d, _MAX),
    F.max_pool2d: (nn.MaxPool2d, _MAX),
    F.avg_pool1d: (nn.AvgPool1d, _MEAN_1D),
    F.avg_pool2d: (nn.AvgPool2d, _MEAN_2D),
    F.adaptive_avg_pool1d: (nn.AdaptiveAvgPool1d, ("output_size",)),
    F.adaptive_avg_pool2d: (nn.AdaptiveAvgPool2d, ("output_size",)),
    F.adaptive_max_pool1d: (nn.AdaptiveMaxPool1d, ("output_size", "return_indices")),
    F.adaptive_max_pool2d: (nn.AdaptiveMaxPool2d, ("output_size", "return_indices")),
}
_STATISTICS = "Use BatchNorm, which needs no statistics of its input when the network runs"
_LARGEST = "At the end of the network, leave it out: the largest output stays the largest"
_FACTOR = (
    "Constants belong outside of the model or in a BatchNorm; a product of two activations has no "
    "thresholds"
)
_PARTS = "In place of a slice of channels, compute the parts with layers of their own"
_ATTENTION = "Its products are of two activations: export the layers around it apart"
# The way out where it is not what every refusal says.
_ADVICE: Mapping[str, str] = {
    "LayerNorm": _STATISTICS, "GroupNorm": _STATISTICS,
    "InstanceNorm1d": _STATISTICS, "InstanceNorm2d": _STATISTICS,
    "Softmax": _LARGEST, "LogSoftmax": _LARGEST, "softmax": _LARGEST, "log_softmax": _LARGEST,
    "add": _FACTOR, "sub": _FACTOR, "mul": _FACTOR, "truediv": _FACTOR, "div": _FACTOR,
    "getitem": _PARTS, "chunk": _PARTS, "split": _PARTS,
    "MultiheadAttention": _ATTENTION, "ProjectedAttention": _ATTENTION,
    "matmul": _ATTENTION, "bmm": _ATTENTION,
    "scaled_dot_product_attention": _ATTENTION,
}  # fmt: skip


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = isinstance(m, (*QUANTIZED_LAYERS, *QUANTIZERS, nn.MultiheadAttention))
        return own or super().is_leaf_module(m, module_qualified_name)


def symbolic_trace(model: nn.Module) -> fx.GraphModule:
    """The calls of a model's forward, in order.

    Raises:
        ExportError: the forward depends on values, or the model is not one that torch.fx can trace.
    """
    tracer = _Tracer()
    try:
        return fx.GraphModule(model, tracer.trace(model))
    except Exception as error:
        raise ExportError(
            f"the forward of {type(model).__name__} cannot be traced ({error}); export needs one whose "
            "calls do not depend on the values of tensors"
        ) from error


class Operation:
    """One call of a traced network: its module, a stand-in for a function, and what kind it is.

    Attributes:
        kind: input, output, ignored, passing, reshape, product, quantizer, max_pool, mean_pool,
            concatenation, padding, upsampling, batch_norm, addition or activation.
        name: for messages and as the name of nodes: the module's, or that of the call.
        module: the module, a module that does the same as the function, or None.
    """

    def __init__(self, node: fx.Node, modules: Mapping[str, nn.Module]) -> None:
        self.node = node
        self.name = str(node.target) if node.op == "call_module" else node.name
        self.module: nn.Module | None = None
        if node.op == "call_module":
            self.module = modules[str(node.target)]
        self.kind = self._kind()

    def _kind(self) -> str:
        node = self.node
        if node.op == "placeholder":
            return "input"
        if node.op == "output":
            return "output"
        if node.op == "call_module":
            return self._module_kind()
        if node.op in ("call_function", "call_method"):
            return self._function_kind()
        return "ignored" if not node.users else self._refuse(f"the tensor {node.target}")

    def _module_kind(self) -> str:
        module = self.module
        kinds: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
            (QUANTIZERS, "quantizer"), (PRODUCTS, "product"), (FOLDED_NORMS, "batch_norm"),
            (MAX_POOLS, "max_pool"), (MEAN_POOLS, "mean_pool"), (PASSING, "passing"),
            (RESHAPES, "reshape"), (RISING, "activation"), (PADS, "padding"),
            (UPSAMPLINGS, "upsampling"),
        )  # fmt: skip
        for types, kind in kinds:
            if isinstance(module, types):
                return kind
        return self._refuse(type(module).__name__)

    def _function_kind(self) -> str:
        target, node = self.node.target, self.node
        if target in _ADD and self._plain_add():
            return "addition"
        if target in _RELU:
            self.module = nn.ReLU()
            return "activation"
        if target in _RESHAPE:
            return "reshape"
        if target in _DROPOUT and not node.kwargs.get("training", True):
            return "passing"
        numbers = (getattr, operator.getitem, operator.mul, operator.floordiv)
        if target in ("size", "dim") or (target in numbers and not _is_tensor(node)):
            return "ignored"  # numbers that a view takes
        if target in _CONCATENATE:
            return "concatenation"
        if target is F.pad:
            return "padding"
        if target is F.interpolate:
            return "upsampling"
        if target in _POOLS:
            kind, names = _POOLS[target]  # type: ignore[index]
            arguments = {**dict(zip(("input", *names), node.args, strict=False)), **node.kwargs}
            del arguments["input"]
            self.module = kind(**arguments)
            return "max_pool" if isinstance(self.module, MAX_POOLS) else "mean_pool"
        if target in _MEAN and self._over_space():
            rank = len(shape_of(node.all_input_nodes[0])) - 1
            self.module = nn.AdaptiveAvgPool1d(1) if rank == 1 else nn.AdaptiveAvgPool2d(1)
            return "mean_pool"
        return self._refuse(f"the call of {getattr(target, '__name__', target)}")

    def _plain_add(self) -> bool:
        node = self.node
        return (
            len(node.args) == 2
            and not node.kwargs
            and len(node.all_input_nodes) in (1, 2)
            and all(isinstance(a, fx.Node) for a in node.args)
        )

    def _over_space(self) -> bool:
        """Whether a mean is taken over all spatial dimensions, whatever becomes of them."""
        rank = len(shape_of(self.node.all_input_nodes[0])) + 1
        rest = [*self.node.args[1:2], self.node.kwargs.get("dim")]
        dims: Any = next((r for r in rest if r is not None), ())
        dims = dims if isinstance(dims, tuple | list) else (dims,)
        return rank in (3, 4) and {d % rank for d in dims} == set(range(2, rank))

    def joined(self) -> list[fx.Node]:
        """The calls whose outputs a concatenation takes, in order.

        Raises:
            ExportError: they are not joined along the channels.
        """
        rank = len(shape_of(self.node)) + 1
        tensors, dim = self._arguments(("tensors", "dim"), (None, 0))
        dim = self.node.kwargs.get("axis", dim)
        if not isinstance(dim, int) or dim % rank != 1:
            raise ExportError(
                f"{self.name} concatenates along dimension {dim}; only channels, dimension 1, can be"
            )
        return list(tensors)

    def padding(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Zeros before and after each spatial dimension.

        Raises:
            ExportError: what it adds is not zeros around the spatial dimensions.
        """
        rank = len(shape_of(self.node)) - 1
        if self.module is not None:
            module: Any = self.module
            pads, mode, value = module.padding, "constant", module.value
        else:
            pads, mode, value = self._arguments(("pad", "mode", "value"), (None, "constant", 0), 1)
        pads = [*pads, *[0] * (2 * rank - len(pads))]
        whole = all(isinstance(p, int) and p >= 0 for p in pads)
        if mode != "constant" or value or len(pads) > 2 * rank or not whole:
            raise ExportError(
                f"{self.name} pads with mode {mode!r}, value {value} and sizes {tuple(pads)}; only "
                "zeros around the spatial dimensions can be exported"
            )
        return tuple(pads[-2::-2]), tuple(pads[::-2])

    def repetitions(self) -> tuple[int, ...]:
        """How often an upsampling repeats each element along each spatial dimension.

        Raises:
            ExportError: it is not to the nearest neighbour, or not by whole factors.
        """
        if self.module is not None:
            mode = str(self.module.mode)
        else:
            names = ("size", "scale_factor", "mode")
            mode = str(self._arguments(names, (None, None, "nearest"), 1)[2])
        before, after = shape_of(self.node.all_input_nodes[0])[1:], shape_of(self.node)[1:]
        if mode != "nearest" or any(b % a for a, b in zip(before, after, strict=True)):
            raise ExportError(
                f"{self.name} upsamples {before} to {after} with mode {mode!r}; only whole factors with "
                "mode 'nearest' can be exported"
            )
        return tuple(b // a for a, b in zip(before, after, strict=True))

    def _arguments(
        self, names: tuple[str, ...], defaults: tuple[Any, ...], skip: int = 0
    ) -> tuple[Any, ...]:
        """The arguments of a function by name, after ``skip`` that come first."""
        given = dict(zip(names, self.node.args[skip:], strict=False)) | self.node.kwargs
        return tuple(given.get(n, d) for n, d in zip(names, defaults, strict=True))

    def _refuse(self, what: str) -> str:
        advice = "Replace it, or leave it out of the exported part of the model"
        advice = _ADVICE.get(what.removeprefix("the call of "), advice)
        stack = list((self.node.meta.get("nn_module_stack") or {}).values())
        inside = f" in {stack[-1][0]}" if self.node.op != "call_module" and stack else ""
        raise ExportError(
            f"{self.name}{inside}: {what} has no integer counterpart here; networks of Linear, Conv1d, "
            "Conv2d, ConvTranspose, BatchNorm, quantized activations, additions, concatenations, max "
            f"and mean pools, zero padding, nearest upsampling and reshapes can be exported. {advice}"
        )


def _is_tensor(node: fx.Node) -> bool:
    return hasattr(node.meta.get("tensor_meta"), "shape")


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Shape of a node's output without the batch dimension."""
    meta: Any = node.meta.get("tensor_meta")
    if not hasattr(meta, "shape"):
        raise ExportError(f"{node.name} puts out something other than one tensor")
    return tuple(meta.shape[1:])


def convolution_window(name: str, module: nn.Module) -> Window | None:
    """Stride, padding, dilation and groups of a convolution; None for a matrix product.

    Raises:
        ExportError: the padding is not of zeros, or not the same on both sides.
    """
    if isinstance(module, TRANSPOSED):
        return Window(
            stride=tuple(module.stride),
            padding=tuple(module.padding),  # type: ignore[arg-type]
            dilation=tuple(module.dilation),
            groups=module.groups,
            transposed=True,
        )
    if not isinstance(module, nn.Conv1d | nn.Conv2d):
        return None
    padding = module.padding
    if padding == "valid":
        padding = (0,) * len(module.kernel_size)
    elif padding == "same":
        total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        if any(t % 2 for t in total):
            raise ExportError(
                f"{name}: padding='same' of an even kernel is lopsided; use padding=0 after a ZeroPad2d"
            )
        padding = tuple(t // 2 for t in total)
    if module.padding_mode != "zeros":
        raise ExportError(
            f"{name}: padding_mode={module.padding_mode!r} cannot be exported; use 'zeros'"
        )
    return Window(
        stride=tuple(module.stride),
        padding=tuple(padding),  # type: ignore[arg-type]
        dilation=tuple(module.dilation),
        groups=module.groups,
    )


def pool_window(
    name: str, module: nn.Module | None, shape: tuple[int, ...]
) -> tuple[tuple[int, ...], Window]:
    """Kernel and window of a pool over an input of ``shape``.

    Raises:
        ExportError: the pool has windows of different sizes.
    """
    rank = len(shape) - 1
    advice = "choose sizes that divide evenly, without ceil_mode"
    settings: Any = module
    for option in ("return_indices", "divisor_override"):
        if getattr(settings, option, None):
            raise ExportError(f"{name}: {option} cannot be exported; leave it out")
    if isinstance(module, _ADAPTIVE):
        size = _tuple(module.output_size, rank)
        sizes = [n if s is None else s for s, n in zip(size, shape[1:], strict=True)]
        if any(n % s for s, n in zip(sizes, shape[1:], strict=True)):
            raise ExportError(f"{name}: {shape[1:]} does not divide into {tuple(sizes)}; {advice}")
        kernel = tuple(n // s for s, n in zip(sizes, shape[1:], strict=True))
        return kernel, Window(stride=kernel, padding=(0,) * rank, dilation=(1,) * rank)
    kernel = _tuple(settings.kernel_size, rank)
    stride = _tuple(settings.kernel_size if settings.stride is None else settings.stride, rank)
    padding = _tuple(settings.padding, rank)
    uneven = not getattr(settings, "count_include_pad", True) and any(padding)
    if settings.ceil_mode or uneven:
        raise ExportError(f"{name}: its windows are not all of one size; {advice}")
    dilation = _tuple(getattr(settings, "dilation", 1), rank)
    return kernel, Window(stride=stride, padding=padding, dilation=dilation)


def _tuple(value: Any, rank: int) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,) * rank
