# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The kernels of ``staircase.c`` for GPUs, in Triton: one pass over memory for each direction.

A tensor is a table of rows × columns, each row with a scale, std and mean of its own, or one for all.
A program works on a part of one row. Sums over a row are added up in a fixed order.
Only :mod:`learnsched.kernels` imports this module, when it meets a tensor on a GPU.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from learnsched import staircase
from learnsched.levels import LevelSet
from learnsched.noise import NOISE_CODES, NOISES

_UNIFORM, _TRIANGULAR, _NORMAL = (
    tl.constexpr(NOISE_CODES[name]) for name in ("uniform", "triangular", "normal")
)
_VALUE, _SLOPE, _STD_SLOPE, _SLOPE_ADJOINT, _STD_SLOPE_ADJOINT = (tl.constexpr(i) for i in range(5))

_NARROWEST = tl.constexpr(staircase.NARROWEST)
_UNIFORM_WIDTH = tl.constexpr(NOISES["uniform"].half_width)
_TRIANGULAR_WIDTH = tl.constexpr(NOISES["triangular"].half_width)
_LOGISTIC_RATE = tl.constexpr(math.pi / math.sqrt(3))
_ROOT_HALF = tl.constexpr(math.sqrt(0.5))
_NORMAL_PEAK = tl.constexpr(1 / math.sqrt(2 * math.pi))

# Beyond, in units of the std, less than the last digit is left, of values and of derivatives.
_REACH = {
    "uniform": (NOISES["uniform"].half_width, NOISES["uniform"].half_width),
    "triangular": (NOISES["triangular"].half_width, NOISES["triangular"].half_width),
    "normal": (5.4, 6.2),
    "logistic": (9.2, 11.0),
}
# Up to this many thresholds the loop over them is unrolled.
_FEW = 4
_LARGEST_BLOCK = 1024


@triton.jit
def _clamp(x, low, high):
    """NaN stays NaN."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def _centred_cdf(z, NOISE: tl.constexpr):
    """F(z) - 1/2, which has no error near 0."""
    if NOISE == _UNIFORM:
        result = _clamp(z * (0.5 / _UNIFORM_WIDTH), -0.5, 0.5)
    elif NOISE == _TRIANGULAR:
        u = _clamp(z * (1 / _TRIANGULAR_WIDTH), -1.0, 1.0)
        result = u - 0.5 * u * tl.abs(u)
    elif NOISE == _NORMAL:
        result = 0.5 * tl.math.erf(z * _ROOT_HALF)
    else:
        result = 1 / (1 + tl.exp(_clamp(z, -36.0, 36.0) * -_LOGISTIC_RATE)) - 0.5
    return result


@triton.jit
def _density(z, NOISE: tl.constexpr):
    """The z that is used, where noise that has died out is cut off, the density, its derivative."""
    a = tl.abs(z)
    if NOISE == _UNIFORM:
        f = tl.where(a <= _UNIFORM_WIDTH, 0.5 / _UNIFORM_WIDTH, 0.0) + 0 * z
        df = 0 * z
    elif NOISE == _TRIANGULAR:
        rest = 1 - a * (1 / _TRIANGULAR_WIDTH)
        f = tl.where(rest < 0, 0.0, rest) * (1 / _TRIANGULAR_WIDTH)
        sign = tl.where(z > 0, -1.0, tl.where(z < 0, 1.0, 0.0))
        df = tl.where(a < _TRIANGULAR_WIDTH, sign / (_TRIANGULAR_WIDTH * _TRIANGULAR_WIDTH), 0.0)
    elif NOISE == _NORMAL:
        z = _clamp(z, -11.5, 11.5)
        f = _NORMAL_PEAK * tl.exp(-0.5 * z * z)
        df = -z * f
    else:
        z = _clamp(z, -36.0, 36.0)
        p = 1 / (1 + tl.exp(z * -_LOGISTIC_RATE))
        f = p * (1 - p) * _LOGISTIC_RATE
        df = f * (1 - 2 * p) * _LOGISTIC_RATE
    return z, f, df


@triton.jit
def _add(u, threshold, gap, inverse, a, b, c, KIND: tl.constexpr, NOISE: tl.constexpr):
    """Adds a threshold's part to up to three sums, see ``staircase.c``."""
    z = (u - threshold) * inverse
    if KIND == _VALUE:
        a += gap * _centred_cdf(z, NOISE)
    else:
        z, f, df = _density(z, NOISE)
        if KIND == _SLOPE or KIND == _SLOPE_ADJOINT:  # noqa: SIM109 (Triton has no `in`)
            a += gap * f
            b += gap * df
            c += gap * (z * df)
        else:
            mixed = f + z * df
            a += gap * (z * f)
            b += gap * mixed
            c += gap * (z * (f + mixed))
    return a, b, c


@triton.jit
def _kernel(
    x_ptr, grad_ptr, outer_ptr, out_ptr, of_x_ptr, partial_ptr,
    levels_ptr, scale_ptr, std_ptr, mean_ptr,
    columns, blocks, scale_stride, std_stride, mean_stride,
    KIND: tl.constexpr, NOISE: tl.constexpr, COUNT: tl.constexpr, STEP: tl.constexpr,
    GAP: tl.constexpr, REACH: tl.constexpr, WHOLE: tl.constexpr, FEW: tl.constexpr,
    SCALED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``levels_ptr``: K thresholds, K gaps, K + 1 values. ``STEP`` is 0 if they are not even."""
    program = tl.program_id(0)
    row = program // blocks
    column = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    at = row.to(tl.int64) * columns + column
    thresholds, gaps, values = levels_ptr, levels_ptr + COUNT, levels_ptr + 2 * COUNT
    std = tl.load(std_ptr + row * std_stride)
    soft = std > _NARROWEST
    inverse = tl.where(soft, tl.math.div_rn(1.0, tl.where(soft, std, 1.0)), 0.0)
    u = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0
    if SCALED:
        scale = tl.load(scale_ptr + row * scale_stride)
        u = tl.math.div_rn(u, tl.zeros_like(u) + scale)
    u += tl.load(mean_ptr + row * mean_stride)

    a = tl.zeros([BLOCK], tl.float32)
    b = tl.zeros([BLOCK], tl.float32)
    c = tl.zeros([BLOCK], tl.float32)
    low, high = tl.load(values), tl.load(values + COUNT)
    if soft:
        if FEW:
            for k in tl.static_range(COUNT):
                threshold, gap = tl.load(thresholds + k), tl.load(gaps + k)
                a, b, c = _add(u, threshold, gap, inverse, a, b, c, KIND, NOISE)
                if KIND == _VALUE:
                    a += 0.5 * gap
        elif STEP == 0:
            for k in range(COUNT):
                threshold, gap = tl.load(thresholds + k), tl.load(gaps + k)
                a, b, c = _add(u, threshold, gap, inverse, a, b, c, KIND, NOISE)
                if KIND == _VALUE:
                    a += 0.5 * gap
        else:
            # Only thresholds within reach, after moving u by whole steps to where the first do.
            most = tl.minimum(2 * REACH * std / STEP + 1, 1.0 * COUNT)
            near = most.to(tl.int32)
            first = tl.load(thresholds)
            below = (u - first) * (1 / STEP) + 1 - 0.5 * near
            below = tl.floor(tl.minimum(tl.maximum(below, 0.0), 1.0 * (COUNT - near)))
            v = u - below * STEP
            for k in range(near):
                a, b, c = _add(v, first + k * STEP, GAP, inverse, a, b, c, KIND, NOISE)
            if KIND == _VALUE:
                a += GAP * (below + 0.5 * near)
        if KIND == _VALUE:
            a = _clamp(a + low, low, high)
    elif KIND == _VALUE:
        if WHOLE and not FEW:
            v = _clamp(tl.where(u != u, low, u), low, high)
            whole = tl.floor(v)
            a = tl.where(v - whole >= 0.5, whole + 1, whole)
        else:
            a += low
            for k in range(COUNT):
                a = tl.where(u >= tl.load(thresholds + k), tl.load(values + k + 1), a)

    if KIND == _VALUE:
        tl.store(out_ptr + at, a * scale, mask=inside)
    else:
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if KIND == _SLOPE:
            tl.store(out_ptr + at, a * inverse * grad, mask=inside)
        elif KIND == _STD_SLOPE:
            tl.store(partial_ptr + program, -tl.sum(a * grad, 0) * inverse * scale)
        elif KIND == _SLOPE_ADJOINT:
            outer = tl.load(outer_ptr + at, mask=inside, other=0.0).to(tl.float32)
            both = outer * grad * inverse * inverse
            tl.store(out_ptr + at, outer * a * inverse, mask=inside)
            tl.store(of_x_ptr + at, both * b / scale, mask=inside)
            tl.store(partial_ptr + program, -tl.sum(both * (a + c), 0))
        else:
            outer = tl.load(outer_ptr + row * std_stride).to(tl.float32)
            both = outer * grad * inverse * inverse
            tl.store(out_ptr + at, -outer * a * inverse * scale, mask=inside)
            tl.store(of_x_ptr + at, -both * b, mask=inside)
            tl.store(partial_ptr + program, tl.sum(both * c, 0) * scale)


class Call:
    """One call of the kernels.

    Args:
        levels: the level set.
        noise: name of the noise's shape.
        rows: of the table that the tensors are.
        scale: one number a row or one for all, float32, contiguous; None for none.
        std: the same.
        mean: the same.
    """

    __slots__ = ("_levels", "_noise", "_numbers", "_rows")

    def __init__(
        self,
        levels: LevelSet,
        noise: str,
        rows: int,
        scale: Tensor | None,
        std: Tensor,
        mean: Tensor,
    ) -> None:
        self._levels, self._noise, self._rows = levels, noise, rows
        self._numbers = (scale, std, mean)

    def value(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        self._launch(_VALUE, x, None, None, out, None, None)
        return out

    def slope(self, x: Tensor, grad: Tensor) -> Tensor:
        x, grad = x.contiguous(), _like(grad, x)
        out = torch.empty_like(x)
        self._launch(_SLOPE, x, grad, None, out, None, None)
        return out

    def std_slope(self, x: Tensor, grad: Tensor) -> Tensor:
        x, grad = x.contiguous(), _like(grad, x)
        partial = self._partial(x)
        self._launch(_STD_SLOPE, x, grad, None, None, None, partial)
        return self._summed(partial)

    def slope_adjoint(
        self, x: Tensor, grad: Tensor, outer: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, grad, outer = x.contiguous(), _like(grad, x), _like(outer, x)
        return self._adjoint(_SLOPE_ADJOINT, x, grad, outer)

    def std_slope_adjoint(
        self, x: Tensor, grad: Tensor, outer: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, grad, outer = x.contiguous(), _like(grad, x), outer.contiguous()
        return self._adjoint(_STD_SLOPE_ADJOINT, x, grad, outer)

    def _adjoint(
        self, kind: tl.constexpr, x: Tensor, grad: Tensor, outer: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        of_grad, of_x, partial = torch.empty_like(x), torch.empty_like(x), self._partial(x)
        self._launch(kind, x, grad, outer, of_grad, of_x, partial)
        return of_grad, of_x, self._summed(partial)

    def _launch(self, kind: tl.constexpr, x: Tensor, *tensors: Tensor | None) -> None:
        if x.is_cuda and x.device.index != torch.cuda.current_device():
            with torch.cuda.device(x.device):
                return self._launch(kind, x, *tensors)
        columns, block, blocks = self._parts(x)
        scale, std, mean = self._numbers
        _kernel[(self._rows * blocks,)](
            x,
            *tensors,
            _numbers(self._levels, x.device),
            scale,
            std,
            mean,
            columns,
            blocks,
            *(int(n is not None and n.numel() != 1) for n in self._numbers),
            KIND=kind,
            **_constants(self._levels, self._noise, kind.value != _VALUE.value),
            SCALED=scale is not None,
            BLOCK=block,
        )

    def _parts(self, x: Tensor) -> tuple[int, int, int]:
        """Columns, how many of them a program takes, and programs of a row."""
        columns = x.numel() // self._rows
        block = min(_LARGEST_BLOCK, max(16, triton.next_power_of_2(columns)))
        return columns, block, -(-columns // block)

    def _partial(self, x: Tensor) -> Tensor:
        programs = self._rows * self._parts(x)[2]
        return torch.empty(programs, device=x.device, dtype=torch.float32)

    def _summed(self, partial: Tensor) -> Tensor:
        """To the shape of the std."""
        std = self._numbers[1]
        table = partial.view(self._rows if std.numel() != 1 else 1, -1)
        return table.sum(1, dtype=torch.float64).float().view(std.shape)


def _like(grad: Tensor, x: Tensor) -> Tensor:
    return grad.expand_as(x).contiguous()


@functools.lru_cache(maxsize=256)
def _numbers(levels: LevelSet, device: torch.device) -> Tensor:
    """Thresholds, gaps and values, one after the other."""
    return torch.tensor([*levels.thresholds, *levels.gaps, *levels.values], device=device)


@functools.lru_cache(maxsize=1024)
def _constants(levels: LevelSet, noise: str, of_derivatives: bool) -> dict[str, Any]:
    """What of a level set and a noise the kernel is compiled for."""
    count = len(levels.thresholds)
    step, whole = staircase.spacing(levels)
    return {
        "NOISE": NOISE_CODES[noise],
        "COUNT": count,
        "STEP": step,
        "GAP": levels.gaps[0],
        "REACH": _REACH[noise][of_derivatives],
        "WHOLE": whole,
        "FEW": count <= _FEW,
    }
