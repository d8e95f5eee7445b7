"""What an example input shows of a model: which modules it reaches, and what is computed past them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from learnsched.modules import ACTIVATIONS, BATCH_NORMS, QUANTIZED_TYPES, stays_real

RECURRENT = (nn.RNNBase, nn.RNNCellBase)

# And the modules that compute the same; None where a module would need more than the call tells.
ACTIVATION_FUNCTIONS: Mapping[Callable[..., Any], type[nn.Module] | None] = {
    F.relu: nn.ReLU, F.relu_: nn.ReLU, torch.relu: nn.ReLU, torch.relu_: nn.ReLU,
    Tensor.relu: nn.ReLU, Tensor.relu_: nn.ReLU, F.relu6: nn.ReLU6,
    F.hardtanh: nn.Hardtanh, F.hardtanh_: nn.Hardtanh,
    F.leaky_relu: nn.LeakyReLU, F.leaky_relu_: nn.LeakyReLU,
    F.prelu: None, Tensor.prelu: None, F.rrelu: None, torch.rrelu: None, torch.rrelu_: None,
    F.elu: nn.ELU, F.elu_: nn.ELU, F.celu: nn.CELU, torch.celu: nn.CELU, torch.celu_: nn.CELU,
    F.selu: nn.SELU, torch.selu: nn.SELU, torch.selu_: nn.SELU, F.gelu: nn.GELU,
    F.silu: nn.SiLU, F.mish: nn.Mish, F.hardswish: nn.Hardswish, F.softplus: nn.Softplus,
}  # fmt: skip

# That are ReLUs where the number is 0, and much else where it is not.
_CLAMPS = (
    torch.clamp, torch.clamp_, torch.clamp_min, torch.clamp_min_, torch.clip, torch.clip_,
    Tensor.clamp, Tensor.clamp_, Tensor.clamp_min, Tensor.clamp_min_, Tensor.clip, Tensor.clip_,
)  # fmt: skip
_MAXIMA = (torch.maximum, Tensor.maximum)
_THRESHOLDS = (F.threshold, torch.threshold)


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


# One input, a tuple of inputs, or inputs by name.
Example = Tensor | tuple[Any, ...] | Mapping[str, Any]


def execution(model: nn.Module, example_input: Example | None) -> Execution:
    """Run the example input through the model, which stays as it is.

    Args:
        model: any module.
        example_input: what it takes; None takes the order of registration.
    """
    wanted = {
        module: name
        for name, module in model.named_modules()
        # Only a parent can put something in the place of an activation.
        if type(module) in QUANTIZED_TYPES
        or (name and type(module) in ACTIVATIONS)
        or isinstance(module, (*BATCH_NORMS, *RECURRENT))
        or stays_real(module)
    }
    if example_input is None:
        return Execution([(name, module) for module, name in wanted.items()], len(wanted))
    weights = {
        weight: name
        for module, name in wanted.items()
        if type(module) in QUANTIZED_TYPES
        and isinstance(weight := getattr(module, "weight", None), nn.Parameter)
    }
    seen = _Calls(weights)
    calls: list[nn.Module] = []
    made: dict[int, tuple[str, weakref.ref[Tensor]]] = {}  # by activations
    in_place: dict[nn.Module, str] = {
        m: n for m, n in wanted.items() if getattr(m, "inplace", False)
    }

    def enter(module: nn.Module, *_: Any) -> None:
        calls.append(module)
        seen.inside += _is_torchs(module)

    def leave(module: nn.Module, _: Any, output: Any) -> Any:
        seen.inside -= _is_torchs(module)
        if type(module) not in ACTIVATIONS:
            return None
        if module not in in_place:
            made[id(output)] = wanted[module], weakref.ref(output)
            return None
        # What is returned is the input itself; only as another object can its uses be told apart.
        returned = output.view_as(output)
        made[id(returned)] = wanted[module], weakref.ref(returned)
        seen.returned[id(returned)] = (in_place[module], returned)
        if id(output) not in seen.rectified:  # which a second ReLU does not change
            seen.inputs[id(output)] = (in_place[module], output)
        seen.rectified[id(returned)] = returned
        return returned

    with hooked(wanted, enter, leave), seen:
        result = run_example(model, example_input)
        seen.use(result)
    outputs = (made[id(t)] for t in tensors(result) if id(t) in made and made[id(t)][1]() is t)
    names = tuple(wanted[module] for module in calls)
    executed = dict.fromkeys(calls)
    return Execution(
        order=[(wanted[module], module) for module in {**executed, **dict.fromkeys(wanted)}],
        executed=len(executed),
        calls=names,
        functions=tuple(dict.fromkeys(seen.functions)),
        clamps=tuple(dict.fromkeys(seen.clamps)),
        borrowed=tuple(name for name in seen.borrowed if name in names),
        unused=tuple(dict.fromkeys(name for name, _ in seen.returned.values())),
        overwritten=tuple(seen.overwritten),
        outputs=tuple(dict.fromkeys(name for name, _ in outputs)),
    )


def _is_torchs(module: nn.Module) -> bool:
    """Whether what its forward calls is no call of the user's, as in a subclass of a batch norm."""
    return type(module).__module__.startswith("torch.")


def reached(
    model: nn.Module, example_input: Example, modules: Iterable[nn.Module]
) -> set[nn.Module]:
    """Which of the modules the example input reaches; the model stays as it is."""
    found: set[nn.Module] = set()
    with hooked(modules, lambda module, *_: found.add(module)):
        run_example(model, example_input)
    return found


@contextmanager
def hooked(
    modules: Iterable[nn.Module],
    enter: Callable[[nn.Module, Any, Any], None],
    leave: Callable[[nn.Module, Any, Any], Any] | None = None,
) -> Iterator[None]:
    """Hooks ahead of (with arguments by name) and behind the modules' forward, within the block."""
    modules = list(modules)
    handles = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in modules]
    if leave is not None:
        handles += [module.register_forward_hook(leave) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_example(model: nn.Module, example_input: Example) -> Any:
    """What the model makes of the example input, in evaluation and without a graph."""
    with in_evaluation(model), torch.no_grad():
        return call(model, example_input)


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Within the block the model is in evaluation, and is not compiled."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        # Compiled, the model would hand its weights to a graph, outside of its modules.
        with (
            torch.random.fork_rng(devices=[]),  # what it draws is not missed in training
            torch.compiler.set_stance("force_eager"),
        ):
            yield
    finally:
        for module in training:
            module.training = True


def varied(example_input: Example) -> Example | None:
    """The example with random numbers where its tensors are constant; None where none of them is.

    Of zeros alone all networks make the same, so that nothing can be told from what they make.
    """
    constant = False

    def vary(value: Any) -> Any:
        nonlocal constant
        of_numbers = isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 1
        if not of_numbers or not bool((value == value.flatten()[0]).all()):
            return value
        constant = True
        generator = torch.Generator("cpu").manual_seed(0)
        drawn = torch.randn(value.shape, generator=generator, device="cpu")
        return value + drawn.to(value)

    if isinstance(example_input, Mapping):
        found: Example = {name: vary(value) for name, value in example_input.items()}
    elif isinstance(example_input, tuple):
        found = tuple(map(vary, example_input))
    else:
        found = vary(example_input)
    return found if constant else None


def call(model: nn.Module, example_input: Example) -> Any:
    """What the model makes of the example input."""
    if isinstance(example_input, Mapping):
        return model(**example_input)
    return model(*example_input if isinstance(example_input, tuple) else (example_input,))


class _Calls(TorchFunctionMode):
    """Notes what is computed outside of the modules of interest, and what comes of their results."""

    def __init__(self, weights: Mapping[nn.Parameter, str]) -> None:
        super().__init__()
        self.inside = 0
        self.functions: list[str] = []
        self.clamps: list[str] = []
        self.borrowed: dict[str, None] = {}
        self.returned: dict[int, tuple[str, Tensor]] = {}  # by in-place activations, unused so far
        self.inputs: dict[int, tuple[str, Tensor]] = {}  # of in-place activations
        self.rectified: dict[int, Tensor] = {}  # what they returned
        self.overwritten: dict[str, None] = {}
        self._weights = weights

    def use(self, value: Any) -> None:
        """Note that what is returned by in-place activations is used, alone or in a collection."""
        for tensor in tensors(value):
            self.returned.pop(id(tensor), None)

    def use_again(self, value: Any) -> None:
        """Note that inputs of in-place activations are used after these, alone or in a collection."""
        for tensor in tensors(value):
            if id(tensor) in self.inputs:
                self.overwritten[self.inputs[id(tensor)][0]] = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.use((args, kwargs or {}))
        if isinstance(result, Tensor | tuple | list):  # not a shape or a dtype
            self.use_again((args, kwargs or {}))
        if not self.inside:
            if func in ACTIVATION_FUNCTIONS:
                self.functions.append(func.__name__)
            elif _rectifies(func, *args, **(kwargs or {})):
                self.clamps.append(func.__name__.strip("_"))
            if isinstance(result, Tensor):  # not a shape or a dtype
                used = (a for a in (*args, *(kwargs or {}).values()) if isinstance(a, nn.Parameter))
                self.borrowed |= {self._weights[w]: None for w in used if w in self._weights}
        return result


def _rectifies(func: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    """Whether a call computes a ReLU under another name."""
    if func in _CLAMPS:
        low = kwargs.get("min", args[1] if len(args) > 1 else None)
        return isinstance(low, int | float) and low == 0
    if func in _MAXIMA:
        other = kwargs.get("other", args[-1])
        return isinstance(other, Tensor) and not bool(other.any())
    return func in _THRESHOLDS and not any((*args[1:3], *kwargs.values()))


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of a value: alone, in nested collections, in attributes of plain objects."""
    seen: set[int] = set()
    pending = [value]
    while pending:
        value = pending.pop()
        if isinstance(value, Tensor):
            yield value
        elif id(value) not in seen:
            seen.add(id(value))
            pending += reversed(_parts(value))


def _parts(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, type | nn.Module | Callable):  # type: ignore[arg-type]
        return []
    if is_dataclass(value):
        return [getattr(value, field.name) for field in fields(value)]
    return list(getattr(value, "__dict__", {}).values())
