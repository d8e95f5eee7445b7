"""What an example input shows of a model: which modules it reaches, and what is computed past them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from learnsched.activation_functions import ACTIVATION_FUNCTIONS, rectifies
from learnsched.example import Example, hooked, run_example, tensors
from learnsched.modules import ACTIVATIONS, BATCH_NORMS, QUANTIZED_TYPES, REAL, labelled, stays_real

RECURRENT = (nn.RNNBase, nn.RNNCellBase)

# What forms products with weights, as layers do.
_PRODUCTS = frozenset((
    F.linear, F.bilinear, F.conv1d, F.conv2d, F.conv3d,
    F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
    torch.matmul, torch.mm, torch.bmm, torch.mv, torch.addmm, torch.addmv, torch.baddbmm,
    torch.addbmm, torch.einsum, torch.tensordot, torch.inner,
    Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, Tensor.mm, Tensor.bmm, Tensor.mv,
    Tensor.addmm, Tensor.addmv, Tensor.baddbmm, Tensor.addbmm, Tensor.inner,
))  # fmt: skip
# After which numbers are of another size than a batch norm has made them. (Sums, as of a residual
# branch and what it is added to, are taken to be of about the same, and what activations make, too.)
_RESCALING = _PRODUCTS | {
    torch.mul, torch.multiply, Tensor.mul, Tensor.mul_, Tensor.multiply, Tensor.__mul__,
    Tensor.__rmul__, Tensor.__imul__, torch.div, torch.divide, torch.true_divide, Tensor.div,
    Tensor.div_, Tensor.divide, Tensor.true_divide, Tensor.__truediv__, Tensor.__rtruediv__,
    Tensor.__itruediv__, torch.addcmul, torch.addcdiv, F.scaled_dot_product_attention,
}  # fmt: skip

# Whose results are all of their operands, side by side.
_JOINS = frozenset((
    torch.cat, torch.concat, torch.concatenate, torch.stack, torch.hstack, torch.vstack, torch.dstack,
    torch.column_stack,
))  # fmt: skip

T = TypeVar("T")
# What tensors come from, by the tensor's id: modules, or layers, each with the number of its call.
_Sources = dict[int, tuple[T, weakref.ref[Tensor]]]
_Layers = tuple[tuple[int, nn.Module], ...]


@dataclass(frozen=True)
class Execution:
    """The modules of interest of a model.

    Attributes:
        order: names and modules, by first execution; those that are not reached come last.
        executed: how many are reached; all if there was no example input.
        calls: names of those that are reached, by execution, each as often as it is called.
        functions: names of activation functions that the model calls itself, such as ``relu``.
        clamps: names of other functions with which it rectifies, such as ``clamp``.
        borrowed: names of layers that are reached and whose weights the model computes with itself,
            too.
        unused: names of in-place activations that the model calls without using what they return.
        overwritten: names of in-place activations whose input the model uses again, as they left it.
        outputs: names of activations whose result the model puts out.
        heads: names of layers whose result it puts out as it is.
        ends: names of layers whose result reaches the output through no further layer, as through an
            activation, a softmax or a change of shape; of a sum, the last.
        normalized: of activations that are given what a batch norm has made at each of their calls, by
            name, the batch norm; what comes between the two keeps its size. Without an example, where a
            batch norm is registered just ahead.
        products: names of parameters of no layer with which the model forms products.
    """

    order: list[tuple[str, nn.Module]]
    executed: int
    calls: tuple[str, ...] = ()
    functions: tuple[str, ...] = ()
    clamps: tuple[str, ...] = ()
    borrowed: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    overwritten: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    normalized: Mapping[str, nn.Module] = field(default_factory=dict)
    products: tuple[str, ...] = ()


def execution(model: nn.Module, example_input: Example | None) -> Execution:
    """Run the example input through the model, which stays as it is.

    Args:
        model: any module.
        example_input: what it takes; None takes the order of registration.
    """
    names = {
        module: name
        for name, module in model.named_modules()
        # Only a parent can put something in the place of an activation.
        if type(module) in QUANTIZED_TYPES
        or (name and type(module) in ACTIVATIONS)
        or isinstance(module, (*BATCH_NORMS, *RECURRENT))
        or stays_real(module)
    }
    if example_input is None:
        order = [(name, module) for module, name in names.items()]
        pairs = zip(order, order[1:], strict=False)
        norms = {name: norm for (_, norm), (name, _) in pairs if isinstance(norm, BATCH_NORMS)}
        return Execution(order, len(names), normalized=norms)
    weights = {
        weight: name
        for module, name in names.items()
        if type(module) in QUANTIZED_TYPES
        and isinstance(weight := getattr(module, "weight", None), nn.Parameter)
    }
    watch = _Watch(names, weights, _of_no_layer(model))
    with hooked(names, watch.enter, watch.leave), watch:
        result = run_example(model, example_input)
        watch.use(result)
    last = dict.fromkeys(watch.makers(result))
    calls = tuple(names[module] for module in watch.calls)
    executed = dict.fromkeys(watch.calls)
    return Execution(
        order=[(names[module], module) for module in {**executed, **dict.fromkeys(names)}],
        executed=len(executed),
        calls=calls,
        functions=tuple(watch.functions),
        clamps=tuple(watch.clamps),
        borrowed=tuple(name for name in watch.borrowed if name in calls),
        unused=tuple(dict.fromkeys(name for name, _ in watch.returned.values())),
        overwritten=tuple(watch.overwritten),
        outputs=tuple(names[module] for module in last if type(module) in ACTIVATIONS),
        heads=tuple(names[module] for module in last if type(module) in QUANTIZED_TYPES),
        ends=tuple(names[layer] for layer in watch.ends(result)),
        normalized={name: norm for name, norm in watch.norms.items() if norm is not None},
        products=tuple(watch.products),
    )


def _of_no_layer(model: nn.Module) -> dict[nn.Parameter, str]:
    """Matrices and kernels outside of torch's layers, with their names and the kinds of their owners."""
    layers = (*QUANTIZED_TYPES, *REAL, nn.MultiheadAttention)
    return {
        parameter: labelled(name, module, own)
        for name, module in model.named_modules()
        if not isinstance(module, layers)
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.dim() >= 2
    }


class _Watch(TorchFunctionMode):
    """Notes which modules are called, what is computed past them, and what comes of their results.

    Args:
        names: of the modules of interest.
        weights: names of the layers whose weights the keys are.
        others: names of matrices and kernels that no layer forms products with.
    """

    def __init__(
        self,
        names: Mapping[nn.Module, str],
        weights: Mapping[nn.Parameter, str],
        others: Mapping[nn.Parameter, str],
    ) -> None:
        super().__init__()
        self.calls: list[nn.Module] = []
        self.functions: dict[str, None] = {}
        self.clamps: dict[str, None] = {}
        self.borrowed: dict[str, None] = {}
        self.returned: dict[int, tuple[str, Tensor]] = {}  # by in-place activations, unused so far
        self.overwritten: dict[str, None] = {}
        self.products: dict[str, None] = {}
        self.norms: dict[str, nn.Module | None] = {}  # ahead of activations
        self._names, self._weights, self._others = names, weights, others
        self._inside = 0
        self._made: _Sources[nn.Module] = {}  # by modules of interest
        self._sized: _Sources[nn.Module] = {}  # by batch norms
        self._layers: _Sources[_Layers] = {}  # by layers, several at a time
        self._hidden: set[nn.Module] = set()  # layers that others follow
        self._inputs: dict[int, tuple[str, Tensor]] = {}  # of in-place activations
        self._rectified: dict[int, Tensor] = {}  # what they returned

    def enter(self, module: nn.Module, *given: Any) -> None:
        """Ahead of a module's forward."""
        self.calls.append(module)
        self._inside += _is_torchs(module)
        if isinstance(module, RECURRENT) or stays_real(module):  # layers, of other kinds
            self._hide(tensors(given))
        if type(module) in ACTIVATIONS:
            norm = next((_source(self._sized, tensor) for tensor in tensors(given)), None)
            name = self._names[module]
            # With a call that no batch norm precedes there is none.
            self.norms[name] = norm if self.norms.get(name, norm) is not None else None

    def leave(self, module: nn.Module, _: Any, output: Any) -> Any:
        """Behind a module's forward; what its caller gets in place of the output, if not None."""
        self._inside -= _is_torchs(module)
        if not isinstance(output, Tensor):
            return None
        if isinstance(module, BATCH_NORMS):
            _note(self._sized, output, module)
        if type(module) in QUANTIZED_TYPES:
            _note(self._layers, output, ((len(self.calls), module),))
        if not getattr(module, "inplace", False):
            _note(self._made, output, module)
            return None
        # What is returned is the input itself; only as another object can its uses be told apart.
        name, returned = self._names[module], output.view_as(output)
        _note(self._made, returned, module)
        self.returned[id(returned)] = name, returned
        if id(output) not in self._rectified:  # which a second ReLU does not change
            self._inputs[id(output)] = name, output
        self._rectified[id(returned)] = returned
        return returned

    def makers(self, value: Any) -> Iterator[nn.Module]:
        """The modules that have made tensors of a value."""
        return filter(None, (_source(self._made, tensor) for tensor in tensors(value)))

    def ends(self, value: Any) -> list[nn.Module]:
        """The layers that tensors of a value come from, and that no further layer follows."""
        found = {module for t in tensors(value) for _, module in self._layers_of(t)}
        return [m for m in dict.fromkeys(self.calls) if m in found - self._hidden]

    def _layers_of(self, tensor: Tensor) -> _Layers:
        return _source(self._layers, tensor) or ()

    def use(self, value: Any) -> None:
        """Note that what is returned by in-place activations is used, alone or in a collection."""
        for tensor in tensors(value):
            self.returned.pop(id(tensor), None)

    def _use_again(self, tensor: Tensor) -> None:
        """Note that the input of an in-place activation is used after that."""
        if id(tensor) in self._inputs:
            self.overwritten[self._inputs[id(tensor)][0]] = None

    def _follow(self, func: Callable[..., Any], operands: Sequence[Tensor], result: Any) -> None:
        """Note the batch norm, if one, that results have their size from: of a sum, the largest."""
        norms = filter(None, (_source(self._sized, tensor) for tensor in operands))
        norm = None if func in _RESCALING else max(norms, key=size_of, default=None)
        _note(self._sized, result, norm)

    def _hide(self, operands: Iterable[Tensor]) -> None:
        """Note that a further layer follows those that the operands come from."""
        self._hidden |= {module for t in operands for _, module in self._layers_of(t)}

    def _follow_layers(
        self, func: Callable[..., Any], operands: Sequence[Tensor], result: Any
    ) -> None:
        """Note the layers that results come from, and those that this function hides from the output."""
        if func in _PRODUCTS:
            self._hide(operands)
            operands = ()
        sources = [layers for tensor in operands if (layers := self._layers_of(tensor))]
        joined = tuple(layer for layers in sources for layer in layers)
        # Of a branch and what it is added to, the branch: the rest are layers ahead of it.
        latest = max(sources, default=(), key=lambda layers: max(number for number, _ in layers))
        _note(self._layers, result, (joined if func in _JOINS else latest) or None)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        operands: list[Any] = [*tensors((args, kwargs))]
        self.use(operands)
        if isinstance(result, Tensor | tuple | list):  # not a shape or a dtype
            for tensor in operands:
                self._use_again(tensor)
            self._follow(func, operands, result)
            self._follow_layers(func, operands, result)
        if func in _PRODUCTS:
            # Of a part of a parameter, as of one expert's, it is the whole.
            whole = (t if t._base is None else t._base for t in operands)
            self.products |= {self._others[t]: None for t in whole if t in self._others}
        if not self._inside:
            if func in ACTIVATION_FUNCTIONS:
                self.functions[func.__name__] = None
            elif rectifies(func, *args, **kwargs):
                self.clamps[func.__name__.strip("_")] = None
            if isinstance(result, Tensor):
                self.borrowed |= {self._weights[t]: None for t in operands if t in self._weights}
        return result


def size_of(norm: Any) -> float:
    """Root mean square of what a batch norm puts out, by its weights."""
    scale, shift = norm.weight, norm.bias
    if scale is None:
        return 1.0
    squares = scale.detach().double().square()
    if shift is not None:
        squares = squares + shift.detach().double().square()
    return float(squares.mean().sqrt())


def _note(sources: _Sources[T], value: Any, source: T | None) -> None:
    """Note what the tensors of a value come from, in place of what is noted with them."""
    for tensor in tensors(value):
        sources.pop(id(tensor), None)
        if source is not None:
            sources[id(tensor)] = source, weakref.ref(tensor)


def _source(sources: _Sources[T], tensor: Tensor) -> T | None:
    """What a tensor is noted with, which may have taken the place of another in memory."""
    source, made = sources.get(id(tensor), (None, None))
    return source if made is not None and made() is tensor else None


def _is_torchs(module: nn.Module) -> bool:
    """Whether what its forward calls is no call of the user's, as in a subclass of a batch norm."""
    return type(module).__module__.startswith("torch.")
