"""The operations under the annealed quantizer: compiled where they can be, else composed.

With a scale s the quantizer is ``s E(x / s)``; the scale is a constant here. float32 on a CPU goes to
the compiled kernels of :mod:`learnsched.native`, float32 and half precision on a GPU to those of
:mod:`learnsched.triton_kernels` where Triton is installed, everything else to
:mod:`learnsched.composed`. Half precision is computed in float32. Nothing here knows of autograd.

Inside ``torch.compile`` the compiled kernels appear as the operators ``torch.ops.learnsched.*``, which
:mod:`learnsched.operators` defines by the functions of this module; what is composed is traced through,
so that inductor fuses it (into Triton kernels on a GPU).
"""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor

from learnsched import native, native_call
from learnsched.composed import Composed
from learnsched.levels import LevelSet
from learnsched.noise import NoiseShape
from learnsched.staircase import Level
from learnsched.torch_state import inside_transform, recorded_for_onnx

if TYPE_CHECKING:
    from learnsched import triton_kernels

Scale = Tensor | None
Adjoints = tuple[Tensor, Tensor, Tensor]

# Below this many elements a second thread costs more than it saves.
_PARALLEL = 32_768
_HALF = (torch.float16, torch.bfloat16)
_PLAIN = (Tensor, torch.nn.Parameter)


def show_config() -> str:
    """How the operations are computed on this machine, for reports; compiles them if need be.

    Example:
        >>> show_config().split(" ")[:2]
        ['learnsched', 'kernels:']
    """
    made = native.build()
    kind = "eager" if made.library is None else "compiled"
    on_gpu = "Triton" if _has_triton() else "eager"
    return (
        f"learnsched kernels: {kind} ({made.reason}), on a GPU: {on_gpu}\n"
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}"
    )


class Kernel(Protocol):
    """The operations for one level set, noise and scale, however they are computed."""

    def value(self, x: Tensor) -> Tensor:
        """See :func:`value`."""

    def slope(self, x: Tensor, grad: Tensor) -> Tensor:
        """See :func:`slope`."""

    def std_slope(self, x: Tensor, grad: Tensor) -> Tensor:
        """See :func:`std_slope`."""

    def slope_adjoint(self, x: Tensor, grad: Tensor, outer: Tensor) -> Adjoints:
        """See :func:`slope_adjoint`."""

    def std_slope_adjoint(self, x: Tensor, grad: Tensor, outer: Tensor) -> Adjoints:
        """See :func:`std_slope_adjoint`."""


def value(
    x: Tensor, levels: LevelSet, std: Level, mean: Level, noise: NoiseShape, scale: Scale
) -> Tensor:
    """``scale E(x / scale)``, in x's dtype."""
    return _kernel(x, levels, std, mean, noise, scale).value(x)


def slope(
    grad: Tensor,
    x: Tensor,
    levels: LevelSet,
    std: Level,
    mean: Level,
    noise: NoiseShape,
    scale: Scale,
) -> Tensor:
    """``grad`` times the derivative of :func:`value` in x."""
    return _kernel(x, levels, std, mean, noise, scale, grad).slope(x, grad)


def std_slope(
    grad: Tensor,
    x: Tensor,
    levels: LevelSet,
    std: Tensor,
    mean: Level,
    noise: NoiseShape,
    scale: Scale,
) -> Tensor:
    """``grad`` times the derivative of :func:`value` in the std, summed to the std's shape."""
    return _kernel(x, levels, std, mean, noise, scale, grad).std_slope(x, grad)


def slope_adjoint(
    outer: Tensor,
    grad: Tensor,
    x: Tensor,
    levels: LevelSet,
    std: Level,
    mean: Level,
    noise: NoiseShape,
    scale: Scale,
) -> Adjoints:
    """Adjoints of ``grad``, ``x`` and ``std`` from that of :func:`slope`'s result.

    That of the std has its shape; for a number it is a tensor without dimensions.
    """
    kernel = _kernel(x, levels, std, mean, noise, scale, outer, grad)
    return kernel.slope_adjoint(x, grad, outer)


def std_slope_adjoint(
    outer: Tensor,
    grad: Tensor,
    x: Tensor,
    levels: LevelSet,
    std: Tensor,
    mean: Level,
    noise: NoiseShape,
    scale: Scale,
) -> Adjoints:
    """Adjoints of ``grad``, ``x`` and ``std`` from that of :func:`std_slope`'s result."""
    kernel = _kernel(x, levels, std, mean, noise, scale, outer, grad)
    return kernel.std_slope_adjoint(x, grad, outer)


def _kernel(
    x: Tensor,
    levels: LevelSet,
    std: Level,
    mean: Level,
    noise: NoiseShape,
    scale: Scale,
    *gradients: Tensor,
) -> Kernel:
    """What computes on these tensors."""
    compiled = _compiled(x, levels, std, mean, noise, scale, *gradients)
    if compiled is not None:
        return compiled
    kind = _InSinglePrecision if x.dtype in _HALF else Composed
    return kind(levels, std, mean, noise, scale)


class _InSinglePrecision:
    """What computes on float32, for half precision."""

    def __init__(
        self, levels: LevelSet, std: Level, mean: Level, noise: NoiseShape, scale: Scale
    ) -> None:
        self._rest: Any = levels, std, mean, noise, scale

    def value(self, x: Tensor) -> Tensor:
        return value(x.float(), *self._rest).to(x.dtype)

    def slope(self, x: Tensor, grad: Tensor) -> Tensor:
        wide = slope(grad.float(), x.float(), *self._rest)
        return wide.to(x.dtype)

    def std_slope(self, x: Tensor, grad: Tensor) -> Tensor:
        return std_slope(grad.float(), x.float(), *self._rest)

    def slope_adjoint(self, x: Tensor, grad: Tensor, outer: Tensor) -> Adjoints:
        wide = (outer.float(), grad.float(), x.float())
        of_grad, of_x, of_std = slope_adjoint(*wide, *self._rest)
        return of_grad.to(x.dtype), of_x.to(x.dtype), of_std

    def std_slope_adjoint(self, x: Tensor, grad: Tensor, outer: Tensor) -> Adjoints:
        wide = (outer, grad.float(), x.float())
        of_grad, of_x, of_std = std_slope_adjoint(*wide, *self._rest)
        return of_grad.to(x.dtype), of_x.to(x.dtype), of_std


class _Operators:
    """The same as operators of torch, for what traces and does not run."""

    def __init__(
        self, levels: LevelSet, std: Level, mean: Level, noise: NoiseShape, scale: Scale
    ) -> None:
        self._levels = levels
        self._noise = noise.name
        self._std, self._mean, self._scale = std, mean, scale

    def _arguments(self, x: Tensor) -> tuple[object, ...]:
        std, mean = (
            level if isinstance(level, Tensor) else x.new_tensor(level)
            for level in (self._std, self._mean)
        )
        levels = self._levels
        return x, std, mean, self._scale, levels.values, levels.thresholds, self._noise

    def value(self, x: Tensor) -> Tensor:
        return torch.ops.learnsched.value(*self._arguments(x))

    def slope(self, x: Tensor, grad: Tensor) -> Tensor:
        return torch.ops.learnsched.slope(grad, *self._arguments(x))

    def std_slope(self, x: Tensor, grad: Tensor) -> Tensor:
        return torch.ops.learnsched.std_slope(grad, *self._arguments(x))

    def slope_adjoint(self, x: Tensor, grad: Tensor, outer: Tensor) -> Adjoints:
        return torch.ops.learnsched.slope_adjoint(outer, grad, *self._arguments(x))

    def std_slope_adjoint(self, x: Tensor, grad: Tensor, outer: Tensor) -> Adjoints:
        return torch.ops.learnsched.std_slope_adjoint(outer, grad, *self._arguments(x))


def _compiled(
    x: Tensor,
    levels: LevelSet,
    std: Level,
    mean: Level,
    noise: NoiseShape,
    scale: Scale,
    *gradients: Tensor,
) -> Kernel | None:
    """The compiled kernel for these tensors; None if there is none."""
    on_cpu = x.is_cpu
    if x.dtype is not torch.float32 and (on_cpu or x.dtype not in _HALF):
        return None
    if not (on_cpu or x.is_cuda):
        return None
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        if not on_cpu or torch.compiler.is_exporting() or not _available():
            return None
        return _Operators(levels, std, mean, noise, scale)
    if type(x) not in _PLAIN or inside_transform(x) or recorded_for_onnx():
        return None
    for gradient in gradients:  # torch.autograd.grad(..., is_grads_batched=True)
        if torch._C._functorch.is_legacy_batchedtensor(gradient) or inside_transform(gradient):
            return None
    library = native.build().library if on_cpu else None
    size = x.numel()
    if not size or x.layout is not torch.strided:
        return None
    if library is None and (on_cpu or not _has_triton()):
        return None
    transformed = torch._C._are_functorch_transforms_active()
    rows = 1
    kept: list[Tensor | None] = []
    pointers: list[int | None] = []
    strides: list[int] = []
    for level in (scale, std, mean):
        if level is None:
            kept.append(None)
            pointers.append(None)
            strides.append(0)
            continue
        tensor = level if isinstance(level, Tensor) else _number(float(level), x.device)
        if tensor.device != x.device or (transformed and inside_transform(tensor)):
            return None
        if tensor.dtype is not torch.float32:
            tensor = tensor.float()
        count = tensor.numel()
        if count != 1:
            shape = tensor.shape
            if len(shape) != x.dim() or shape[0] != count or x.shape[0] != count:
                return None
            rows = count
            tensor = tensor.contiguous()
        kept.append(tensor)
        pointers.append(tensor.data_ptr())
        strides.append(int(count != 1))
    numbers = cast("tuple[Tensor | None, Tensor, Tensor]", tuple(kept))
    if library is None:
        return _on_gpu(levels, noise.name, rows, numbers)
    threads = torch.get_num_threads() if size >= _PARALLEL else 1
    table = native_call.Table(rows, size // rows, threads, *pointers, *strides)
    return native_call.Call(library, levels, noise.name, table, numbers)


def _on_gpu(
    levels: LevelSet, noise: str, rows: int, numbers: tuple[Tensor | None, Tensor, Tensor]
) -> triton_kernels.Call:
    from learnsched import triton_kernels

    return triton_kernels.Call(levels, noise, rows, *numbers)


@functools.cache
def _has_triton() -> bool:
    """Whether operations on a GPU are compiled; the environment variable forbids it as on a CPU."""
    found = importlib.util.find_spec("triton") is not None
    return found and os.environ.get("LEARNSCHED_KERNELS") != "eager"


@functools.lru_cache(maxsize=4096)
def _number(level: float, device: torch.device) -> Tensor:
    return torch.full((), level, device=device)  # filled there: nothing waits for the device


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _available() -> bool:
    return native.build().library is not None
