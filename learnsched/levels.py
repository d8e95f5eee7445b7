"""Level sets: the values a quantized tensor may take, and the hard staircase onto them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from learnsched.choices import whole_number
from learnsched.torch_state import inside_transform, recorded_for_onnx

# Up to this many thresholds a chain of comparisons is faster than a binary search.
_COMPARISONS = 16
# Bounds the rounding error of x / scale * scale, relative to the largest level.
_ROUNDING = 2.0**-18


@dataclass(frozen=True)
class LevelSet:
    """An increasing set of levels ``q_0 < … < q_K`` and the thresholds between them.

    Both are given in units of the tensor's scale: a quantized tensor is ``scale * level``.
    ``x >= thresholds[k]`` takes level ``k + 1`` or higher.

    Args:
        values: the ``K + 1`` levels, strictly increasing and finite, at least two.
        thresholds: the ``K`` thresholds, strictly increasing; midpoints of the levels if omitted.
        name: how the set is called in reports and artefacts; one that begins with ``power_of_two`` has
            scales that are powers of two for its customary rule.

    Attributes:
        gaps: the ``K`` differences ``q_k - q_{k-1}``, all positive.
        step: the smallest of them, the unit of noise levels in settings.

    Raises:
        ValueError: levels or thresholds are too few, not finite, not increasing, or do not match.

    Example:
        >>> LevelSet((-1.0, 0.0, 1.0)).thresholds
        (-0.5, 0.5)
    """

    values: tuple[float, ...]
    thresholds: tuple[float, ...] = field(default=())
    name: str = "custom"
    # Plain attributes, not cached properties, whose lock torch.compile cannot trace.
    gaps: tuple[float, ...] = field(init=False, repr=False, compare=False)
    step: float = field(init=False, repr=False, compare=False)
    _sums_exactly: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        values = _increasing(self.values, "values")
        if len(values) < 2:
            raise ValueError(
                f"a level set needs at least two levels, got {values}; for example (-1.0, 0.0, 1.0)"
            )
        midpoints = tuple((a + b) / 2 for a, b in zip(values, values[1:], strict=False))
        thresholds = _increasing(self.thresholds, "thresholds") or midpoints
        if len(thresholds) != len(values) - 1:
            raise ValueError(
                f"{len(values)} levels need {len(values) - 1} thresholds, got {len(thresholds)}; "
                "leave thresholds out to take the midpoints"
            )
        object.__setattr__(self, "values", values)
        gaps = tuple(b - a for a, b in zip(values, values[1:], strict=False))
        object.__setattr__(self, "thresholds", thresholds)
        object.__setattr__(self, "gaps", gaps)
        object.__setattr__(self, "step", min(gaps))
        object.__setattr__(self, "_sums_exactly", _sums_exactly(values))

    @property
    def is_idempotent(self) -> bool:
        """Whether a quantized tensor stays as it is when quantized again, whatever its scale rounds to.

        Example:
            >>> LevelSet((0.0, 1.0)).is_idempotent, LevelSet((0.0, 1.0), (1.0,)).is_idempotent
            (True, False)
        """
        margin = _ROUNDING * max(map(abs, self.values))
        below = zip(self.values, self.thresholds, strict=False)
        above = zip(self.thresholds, self.values[1:], strict=True)
        return all(a + margin < b for pairs in (below, above) for a, b in pairs)

    @property
    def is_evenly_spaced(self) -> bool:
        """Whether all neighbouring levels are as far apart.

        Example:
            >>> power_of_two(3).is_evenly_spaced, power_of_two(4).is_evenly_spaced
            (True, False)
        """
        return max(self.gaps) <= self.step * (1 + _ROUNDING)

    @property
    def bits(self) -> int:
        """Bits that hold a code of this set."""
        return max(1, math.ceil(math.log2(len(self.values))))

    def codes(self, x: Tensor) -> Tensor:
        """Index of the level that each entry of ``x`` (in units of the scale) falls to.

        Args:
            x: any shape.

        Returns:
            int64 tensor of the same shape, in ``[0, K]``.
        """
        # bfloat16 cannot tell 254.5 from 254
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if len(self.thresholds) > _COMPARISONS:
            found = torch.bucketize(x.contiguous(), x.new_tensor(self.thresholds), right=True)
            return torch.where(x.isnan(), 0, found)
        codes = torch.zeros_like(x, dtype=torch.int64)
        for threshold in self.thresholds:
            codes = codes + (x >= threshold)
        return codes

    def quantize(self, x: Tensor) -> Tensor:
        """The hard staircase: the level that each entry of ``x`` falls to, to the bit.

        Args:
            x: any shape, in units of the scale. NaN, which is above no threshold, takes the lowest.

        Returns:
            tensor of the same shape and dtype.

        Raises:
            TypeError: ``x`` is not of floating-point numbers, which levels may not be rounded to.
        """
        if not x.is_floating_point():
            raise TypeError(f"floating-point numbers are quantized, got {x.dtype}; give x.float()")
        if len(self.thresholds) > _COMPARISONS:
            return x.new_tensor(self.values)[self.codes(x)]
        if x.dtype in (torch.float16, torch.bfloat16):
            return self.quantize(x.float()).to(x.dtype)
        if not self._sums_exactly:
            result = torch.full_like(x, self.values[0])
            for threshold, value in zip(self.thresholds, self.values[1:], strict=True):
                # full_like keeps x's dtype: a bare float would widen half precision under vmap
                result = torch.where(x >= threshold, torch.full_like(x, value), result)
            return result
        result = _at_least(x, self.thresholds[0])
        if self.gaps[0] != 1:
            result.mul_(self.gaps[0])
        for threshold, gap in zip(self.thresholds[1:], self.gaps[1:], strict=True):
            result.add_(_at_least(x, threshold), alpha=gap)
        return result.add_(self.values[0]) if self.values[0] else result


def ternary() -> LevelSet:
    """The levels -1, 0, 1 with thresholds at ±½ (TWN, Li et al. 2016).

    Example:
        >>> ternary().quantize(torch.tensor([-0.7, 0.2, 0.5])).tolist()
        [-1.0, 0.0, 1.0]
    """
    return LevelSet((-1.0, 0.0, 1.0), name="ternary")


def binary() -> LevelSet:
    """The levels -1, 1 with the threshold at 0 (BinaryConnect, Courbariaux et al. 2015).

    Example:
        >>> binary().quantize(torch.tensor([-0.7, 0.0])).tolist()
        [-1.0, 1.0]
    """
    return LevelSet((-1.0, 1.0), name="binary")


def unsigned(bits: int) -> LevelSet:
    """The levels 0, 1, …, 2^bits - 1: what follows a ReLU.

    Args:
        bits: 1 to 8.

    Raises:
        ValueError: ``bits`` is out of range.

    Example:
        >>> unsigned(2).values
        (0.0, 1.0, 2.0, 3.0)
    """
    bits = whole_number("bits of unsigned", bits, 1, 8)
    return LevelSet(tuple(float(q) for q in range(2**bits)), name=f"unsigned{bits}")


def signed(bits: int, narrow: bool = True) -> LevelSet:
    """The integers around 0 that fit ``bits`` bits in two's complement.

    Args:
        bits: 2 to 8.
        narrow: leave the lowest code out, so that the set is symmetric.

    Raises:
        ValueError: ``bits`` is out of range.

    Example:
        >>> signed(2).values, signed(2, narrow=False).values
        ((-1.0, 0.0, 1.0), (-2.0, -1.0, 0.0, 1.0))
    """
    bits = whole_number("bits of signed", bits, 2, 8)
    top = 2 ** (bits - 1) - 1
    bottom = -top if narrow else -top - 1
    name = f"signed{bits}" + ("" if narrow else "full")
    return LevelSet(tuple(float(q) for q in range(bottom, top + 1)), name=name)


def power_of_two(bits: int, max_abs: float = 1.0) -> LevelSet:
    """INQ's levels 0, ±2^n2, …, ±2^n1 (Zhou et al. 2017, equations 1 to 4).

    ``n1 = floor(log2(4 max_abs / 3))`` and ``n2 = n1 + 1 - 2^(bits - 1) / 2``; a magnitude between
    neighbours α < β takes β from ``(α + β) / 2`` on.

    Args:
        bits: 2 to 5; one bit is spent on zero, as in the paper.
        max_abs: largest magnitude of the tensor, in units of its scale, positive.

    Raises:
        ValueError: ``bits`` is out of range or ``max_abs`` is not a positive number.

    Example:
        >>> power_of_two(3, max_abs=0.8).values
        (-1.0, -0.5, 0.0, 0.5, 1.0)
    """
    bits = whole_number("bits of power_of_two", bits, 2, 5)
    if not (math.isfinite(max_abs) and max_abs > 0):
        raise ValueError(
            f"power_of_two needs a positive, finite max_abs, got {max_abs}; "
            "pass the largest magnitude of the weights in units of their scale"
        )
    # floor(log2(4 max_abs / 3)) without the logarithm, which rounds up just below a power of two
    mantissa, exponent = math.frexp(max_abs)
    n1 = exponent if mantissa >= 0.75 else exponent - 1
    n2 = n1 + 1 - 2 ** (bits - 1) // 2
    magnitudes = [2.0**n for n in range(n2, n1 + 1)]
    values = (*(-m for m in reversed(magnitudes)), 0.0, *magnitudes)
    return LevelSet(values, name=f"power_of_two{bits}")


def check_level_set(levels: Any) -> None:
    """Refuse what is no level set, such as a number of bits.

    Raises:
        TypeError: it is of another type.
    """
    if not isinstance(levels, LevelSet):
        raise TypeError(
            f"levels must be a LevelSet such as ternary() or unsigned(2), got {type(levels).__name__}"
        )


def _at_least(x: Tensor, threshold: float) -> Tensor:
    """1 where ``x >= threshold`` and 0 elsewhere, in x's dtype."""
    if torch.compiler.is_compiling() or inside_transform(x) or recorded_for_onnx():
        return (x >= threshold).to(x.dtype)
    # Without a tensor of booleans in between: ten times as fast as where().
    return x.clone().ge_(threshold)


def _increasing(numbers: Sequence[float], what: str) -> tuple[float, ...]:
    result = tuple(float(n) for n in numbers)
    if not all(math.isfinite(n) for n in result):
        raise ValueError(f"{what} of a level set must be finite, got {result}")
    if any(b <= a for a, b in zip(result, result[1:], strict=False)):
        raise ValueError(f"{what} of a level set must increase strictly, got {result}; sort them")
    return result


def _sums_exactly(values: tuple[float, ...]) -> bool:
    """Whether adding gaps to the lowest level meets every level to the bit in every dtype."""
    most = max(values[-1] - values[0], *[abs(value) for value in values])
    denominator = 1
    while denominator <= 2**14 and any(value * denominator % 1 for value in values):
        denominator *= 2
    # bfloat16 has 8 bits, and float16 nothing below 2^-24
    return most * denominator <= 256 and denominator <= 2**14 and most <= 2**15
