"""The annealed quantizer: a staircase replaced by its expectation under noise, twice differentiable.

Forward noise shapes the value, backward noise shapes the gradient; the two are independent (ANA,
Spallanzani et al. 2019 and 2022). Each noise level can itself be learned.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch.autograd.function import once_differentiable

from learnsched import kernels, operators, staircase
from learnsched.choices import check_choice
from learnsched.levels import LevelSet, check_level_set
from learnsched.noise import NoiseShape, noise_shape
from learnsched.staircase import NARROWEST, Level
from learnsched.torch_state import can_look, inside_transform, recorded_for_onnx

MODES = ("expectation", "mode", "random")


def annealed_quantize(
    x: Tensor,
    levels: LevelSet,
    *,
    forward_std: Level,
    backward_std: Level,
    noise: str = "normal",
    forward_mean: Level = 0.0,
    backward_mean: Level = 0.0,
    mode: str = "expectation",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Quantize ``x`` softly: the value under forward noise, the gradient under backward noise.

    With staircase σ, level gaps Δ_k, thresholds t_k, cumulative distribution F and density f:

    - value: ``E[σ(x + ν)] = q_0 + Σ Δ_k F((x + forward_mean - t_k) / forward_std)``;
    - gradient to ``x``: ``Σ Δ_k f((x + backward_mean - t_k) / backward_std) / backward_std``;
    - gradient to ``forward_std`` and ``forward_mean``: the derivative of the value;
    - gradient to ``backward_std`` and ``backward_mean``: none at first order; at second order the
      derivative of the gradient.

    Args:
        x: any shape, floating point, in the units of ``levels.values`` (tensor over scale).
        levels: the level set.
        forward_std: standard deviation of the forward noise, at least 0, in units of ``x``, a number
            or a tensor that broadcasts to ``x``. 0, like anything up to 1e-12, is the hard
            staircase, to the bit.
        backward_std: the same of the backward noise; 0 gives the zero gradient of a staircase.
        noise: ``uniform``, ``triangular``, ``normal`` or ``logistic``.
        forward_mean: shift of the forward noise.
        backward_mean: shift of the backward noise.
        mode: ``expectation``; ``mode``, the most probable level; ``random``, a sample.
        generator: random numbers of ``mode="random"``.

    Returns:
        tensor of ``x``'s shape and dtype, inside ``[q_0, q_K]``.

    Raises:
        TypeError: ``x`` is not floating point or ``levels`` is not a :class:`LevelSet`.
        ValueError: a std is negative or not finite, or ``noise`` or ``mode`` is unknown. Tensors on a
            GPU, inside ``torch.compile`` or inside a transform are not looked into.

    Source:
        Spallanzani et al. 2019 (arXiv:1905.10452); Spallanzani et al. 2022 (arXiv:2203.11323).

    Example:
        >>> from learnsched import ternary
        >>> x = torch.tensor([-0.7, 0.5], requires_grad=True)
        >>> y = annealed_quantize(x, ternary(), forward_std=0.0, backward_std=1.0, noise="uniform")
        >>> y.tolist()
        [-1.0, 1.0]
        >>> y.sum().backward()
        >>> [round(g, 4) for g in x.grad.tolist()]
        [0.5774, 0.5774]
    """
    _check_types(x, levels)
    check_choice("mode", mode, MODES)
    shape = noise_shape(noise)
    _check_std(forward_std, "forward_std")
    _check_std(backward_std, "backward_std")
    _check_mean(forward_mean, "forward_mean")
    _check_mean(backward_mean, "backward_mean")
    return quantize_unchecked(
        x, levels, forward_std, forward_mean, backward_std, backward_mean, shape, mode, generator
    )


def quantize_unchecked(
    x: Tensor,
    levels: LevelSet,
    forward_std: Level,
    forward_mean: Level,
    backward_std: Level,
    backward_mean: Level,
    noise: NoiseShape,
    mode: str = "expectation",
    generator: torch.Generator | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """:func:`annealed_quantize` without its checks, for modules whose settings were checked.

    With a scale, a constant, ``x`` is in its own units and the result is ``scale E(x / scale)``.
    """
    arguments = (
        x, forward_std, forward_mean, backward_std, backward_mean, scale, levels, noise, mode, generator
    )  # fmt: skip
    if inside_transform(x):
        return _mapped(_AnnealedQuantize, arguments)
    if recorded_for_onnx():
        # It would take the Function for a call of Python, which no file can hold.
        return _AnnealedQuantize.forward(*arguments)
    return _apply(_AnnealedQuantize, arguments)


def level_probabilities(
    x: Tensor, levels: LevelSet, std: Level, mean: Level = 0.0, noise: str = "normal"
) -> Tensor:
    """Probability of each level under the noise.

    Args:
        x: shape ``(...)``, in units of the levels.
        levels: a set of ``K + 1`` levels.
        std: standard deviation of the noise, at least 0.
        mean: shift of the noise.
        noise: shape of the noise.

    Returns:
        tensor of shape ``(..., K + 1)``, non-negative; sums to 1 along the last dimension.

    Raises:
        TypeError: ``x`` is not floating point or ``levels`` is not a :class:`LevelSet`.
        ValueError: the std is negative or not finite, or the noise is unknown.

    Example:
        >>> from learnsched import ternary
        >>> level_probabilities(torch.tensor([0.0, 0.5]), ternary(), std=0.1)[1].tolist()
        [0.0, 0.5, 0.5]
    """
    _check_types(x, levels)
    _check_std(std, "std")
    _check_mean(mean, "mean")
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    parts = staircase.probabilities(wide, levels, std, mean, noise_shape(noise))
    return torch.stack(parts, dim=-1).to(x.dtype)


class _Elementwise(torch.autograd.Function):
    """Elementwise in its first tensors; a vmap only puts the mapped dimension first."""

    # how many tensors have the shape of the result
    full = 1

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        return _apply(cls, operators.aligned(info.batch_size, in_dims, args, cls.full)), 0


def _apply(function: Any, args: tuple[Any, ...]) -> Tensor:
    """``function.apply`` without its search for default arguments, longer than a small layer takes."""
    if torch.compiler.is_compiling():
        if _inside_gradient():
            # Traced there, a Function would lose its backward without a word: leave it to eager.
            torch._dynamo.graph_break()
        result: Tensor = function.apply(*args)
    elif torch._C._are_functorch_transforms_active():
        result = function.apply(*args)
    else:
        result = super(torch.autograd.Function, function).apply(*args)
    return result


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _inside_gradient() -> bool:
    """Whether a gradient of torch.func is being traced."""
    interpreters = torch._C._functorch.get_interpreter_stack() or []
    kinds = torch._C._functorch.TransformType
    return any(i.key() in (kinds.Grad, kinds.Jvp) for i in interpreters)


def _mapped(function: Any, args: tuple[Any, ...]) -> Tensor:
    """``function.apply`` inside a transform of torch.func.

    A plain vmap is unwrapped here: torch's general way takes longer than a small layer computes.
    """
    interpreter = torch._C._functorch.peek_interpreter_stack()
    if interpreter is None or interpreter.key() != torch._C._functorch.TransformType.Vmap:
        return function.apply(*args)
    level = interpreter.level()
    unwrapped, dims = [], []
    for arg in args:
        dim = None
        if isinstance(arg, Tensor):
            arg, dim = torch._C._functorch._unwrap_batched(arg, level)
        unwrapped.append(arg)
        dims.append(dim)
    if dims[0] is None:
        return function.apply(*args)
    batch = unwrapped[0].shape[dims[0]]
    with temporarily_pop_interpreter_stack():
        result = _apply(function, operators.aligned(batch, tuple(dims), tuple(unwrapped), 1))
    return torch._C._functorch._add_batch_dim(result, 0, level)


class _AnnealedQuantize(_Elementwise):
    """Value under forward noise; its backward is built of functions that can be derived again."""

    @staticmethod
    def forward(
        x: Tensor,
        forward_std: Level,
        forward_mean: Level,
        backward_std: Level,
        backward_mean: Level,
        scale: Tensor | None,
        levels: LevelSet,
        noise: NoiseShape,
        mode: str,
        generator: torch.Generator | None,
    ) -> Tensor:
        if mode == "expectation":
            return kernels.value(x, levels, forward_std, forward_mean, noise, scale)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        u = wide if scale is None else wide / scale
        if mode == "random":
            narrow = torch.as_tensor(forward_std, device=x.device)
            std = torch.where(narrow > NARROWEST, narrow, 0.0)
            value = levels.quantize(u + forward_mean + std * noise.sample(u, generator))
        else:
            value = staircase.most_probable(u, levels, forward_std, forward_mean, noise)
        return (value if scale is None else value * scale).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, *numbers, ctx.levels, ctx.noise, ctx.mode, _ = inputs
        _save(ctx, x, *numbers)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, f_std, f_mean, b_std, b_mean, scale = _saved(ctx)
        fixed = scale, ctx.levels, ctx.noise
        grad_x = grad_std = grad_mean = None
        if _asked_for(ctx, 0):
            grad_x = _apply(_TimesSlope, (grad, x, b_std, b_mean, *fixed))
        # A most probable or a sampled level is piecewise constant in the forward noise.
        if ctx.mode == "expectation" and _asked_for(ctx, 1):
            grad_std = _apply(_StdSlope, (grad, x, f_std, f_mean, *fixed))
        if ctx.mode == "expectation" and _asked_for(ctx, 2):
            product = _apply(_TimesSlope, (grad, x, f_std, f_mean, *fixed))
            product = product if scale is None else product * scale
            grad_mean = product.sum_to_size(f_mean.shape)
        return grad_x, grad_std, grad_mean, None, None, None, None, None, None, None


class _Derivative(_Elementwise):
    """Of ``(grad, x, std, mean, scale, levels, noise)``."""

    full = 2

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *numbers, ctx.levels, ctx.noise = inputs
        _save(ctx, *numbers)


class _TimesSlope(_Derivative):
    """``grad`` times the derivative of the expectation in x."""

    @staticmethod
    def forward(
        grad: Tensor,
        x: Tensor,
        std: Level,
        mean: Level,
        scale: Tensor | None,
        levels: LevelSet,
        noise: NoiseShape,
    ) -> Tensor:
        return kernels.slope(grad, x, levels, std, mean, noise, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _adjoints(ctx, outer, kernels.slope_adjoint)


class _StdSlope(_Derivative):
    """``grad`` times the derivative of the expectation in the std, summed to the std's shape."""

    @staticmethod
    def forward(
        grad: Tensor,
        x: Tensor,
        std: Tensor,
        mean: Level,
        scale: Tensor | None,
        levels: LevelSet,
        noise: NoiseShape,
    ) -> Tensor:
        return kernels.std_slope(grad, x, levels, std, mean, noise, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _adjoints(ctx, outer, kernels.std_slope_adjoint)

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        grad, x, std, *rest = args
        shape = std.shape if in_dims[2] is None else std.movedim(in_dims[2], 0).shape[1:]
        if in_dims[2] is None:  # each member of the batch has a sum of its own
            std = std.expand(info.batch_size, *std.shape)
            in_dims = (*in_dims[:2], 0, *in_dims[3:])
        aligned = operators.aligned(info.batch_size, in_dims, (grad, x, std, *rest), 2)
        return _apply(cls, aligned).reshape(info.batch_size, *shape), 0


def _adjoints(
    ctx: Any, outer: Tensor, kernel: Callable[..., tuple[Tensor, Tensor, Tensor]]
) -> tuple[Tensor | None, ...]:
    """Gradients to grad, x, std, mean and the rest; the mean moves a staircase as x does."""
    grad, x, std, mean, scale = _saved(ctx)
    needs_grad, needs_x, needs_std, needs_mean, *_ = ctx.needs_input_grad
    of_grad, of_x, of_std = kernel(outer, grad, x, ctx.levels, std, mean, ctx.noise, scale)
    of_mean = None
    if needs_mean:
        of_u = of_x if scale is None else of_x * scale
        of_mean = of_u.sum_to_size(mean.shape)
    return (
        of_grad if needs_grad else None,
        of_x if needs_x else None,
        of_std if needs_std else None,
        of_mean,
        None,
        None,
        None,
    )


def _asked_for(ctx: Any, index: int) -> bool:
    """Whether the backward pass under way leads to this input.

    An inner training step inside a graph of settings asks for the weights' gradients alone, though the
    noise levels need gradients too: half of the work.
    """
    if not ctx.needs_input_grad[index]:
        return False
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    node = ctx.next_functions[index][0]
    # The engine does not answer for leaves.
    return hasattr(node, "variable") or bool(torch._C._will_engine_execute_node(node))


def _save(ctx: Any, *values: Any) -> None:
    """Keep tensors for backward the way autograd wants it, and numbers beside them."""
    ctx.numbers = [None if isinstance(v, Tensor) else v for v in values]
    ctx.save_for_backward(*(v if isinstance(v, Tensor) else None for v in values))


def _saved(ctx: Any) -> list[Any]:
    pairs = zip(ctx.numbers, ctx.saved_tensors, strict=True)
    return [number if tensor is None else tensor for number, tensor in pairs]


def _check_types(x: Any, levels: Any) -> None:
    check_level_set(levels)
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a floating point tensor, got {kind}; convert it with x.float()")


def _check_std(std: Level, name: str) -> None:
    if isinstance(std, Tensor):
        if not can_look(std):
            return
        wrong = not bool(((std >= 0) & (std < math.inf)).all())
    else:
        wrong = not (math.isfinite(std) and std >= 0)
    if wrong:
        raise ValueError(f"{name} must be at least 0 and finite, got {std}; 0 quantizes hard")


def _check_mean(mean: Level, name: str) -> None:
    if isinstance(mean, Tensor):
        finite = not can_look(mean) or bool(mean.isfinite().all())
    else:
        finite = math.isfinite(mean)
    if not finite:
        raise ValueError(f"{name} must be finite, got {mean}; 0 leaves the noise where it is")
