"""Scale rules: the positive factor between a tensor and its level set."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from learnsched import kernels
from learnsched.choices import check_choice, whole_number
from learnsched.levels import LevelSet
from learnsched.noise import noise_shape

Per = Literal["tensor", "channel"]

_SMALLEST = 1e-12


@runtime_checkable
class ScaleRule(Protocol):
    """What chooses the scale of a tensor.

    Example:
        >>> def half_range(x, levels):
        ...     return x.abs().max() / levels.values[-1] / 2
        >>> from learnsched import quantize_, ternary
        >>> layer = quantize_(torch.nn.Linear(4, 2), ternary(), weight_scale=half_range)
        >>> (layer.weight_quantizer.scale(layer.weight) / layer.weight.abs().max()).item()
        0.5
    """

    def __call__(self, x: Tensor, levels: LevelSet) -> Tensor:
        """The scale of ``x``, positive, in a shape that broadcasts to it."""
        ...


@dataclass(frozen=True)
class _Grouped:
    per: Per = "channel"

    def __post_init__(self) -> None:
        check_choice("grouping", self.per, ("tensor", "channel"))


@dataclass(frozen=True)
class AbsoluteMean(_Grouped):
    """The mean of absolute values, per tensor or per channel (first dimension).

    Shapes and errors are those of every rule here that knows ``per``: a tensor of shape
    ``(channels, ...)`` has scales of shape ``(channels, 1, ...)`` per channel, and of ``(1, 1, ...)``
    per tensor.

    Args:
        per: ``"channel"`` or ``"tensor"``.

    Raises:
        ValueError: ``per`` is neither.

    Source:
        BWN and XNOR-Net, Rastegari et al. 2016 (arXiv:1603.05279), equation 6.

    Example:
        >>> from learnsched import ternary
        >>> AbsoluteMean()(torch.tensor([[1.0, -3.0], [0.5, 0.5]]), ternary()).flatten().tolist()
        [2.0, 0.5]
    """

    def __call__(self, x: Tensor, levels: LevelSet) -> Tensor:
        return x.abs().mean(dim=_reduced(x, self.per), keepdim=True).clamp(min=_smallest(x))


@dataclass(frozen=True)
class Maximum(_Grouped):
    """The largest magnitude falls on the outermost level; see :class:`AbsoluteMean` for ``per``.

    Example:
        >>> from learnsched import signed
        >>> Maximum("tensor")(torch.tensor([1.5, -0.2]), signed(3)).item()
        0.5
    """

    def __call__(self, x: Tensor, levels: LevelSet) -> Tensor:
        top = max(abs(q) for q in levels.values)
        most = x.abs().amax(dim=_reduced(x, self.per), keepdim=True)
        return most.clamp(min=_smallest(x)) / top


@dataclass(frozen=True)
class PowerOfTwo(_Grouped):
    """The power of two that puts the outermost level at INQ's ``2^n1``.

    ``n1 = floor(log2(4 max|x| / 3))``; for level sets whose outermost level is a power of two
    (Zhou et al. 2017, arXiv:1702.03044, equation 2). The result carries no gradient. See
    :class:`AbsoluteMean` for ``per``.

    Example:
        >>> from learnsched import power_of_two
        >>> PowerOfTwo()(torch.tensor([3.2, -0.1]), power_of_two(5)).item()
        4.0
    """

    per: Per = "tensor"

    def __call__(self, x: Tensor, levels: LevelSet) -> Tensor:
        top = max(abs(q) for q in levels.values)
        most = x.detach().abs().amax(dim=_reduced(x, self.per), keepdim=True)
        # The logarithm itself would round up just below a power of two.
        mantissa, exponent = torch.frexp(most.clamp(min=_smallest(x)))
        return torch.exp2(exponent.to(x.dtype) - (mantissa < 0.75).to(x.dtype)) / top


@dataclass(frozen=True)
class LeastSquares(_Grouped):
    """The scale that minimises the squared error of hard quantization, per tensor or channel.

    Candidates on a logarithmic grid, each moved by one step of alternating least squares, then half
    as many around the best of them: a search of three quantizations a candidate. As the rule of a weight
    it runs in every forward pass until the weight is frozen; where that is too slow take
    :class:`Maximum` or :class:`AbsoluteMean`. The result carries no gradient.

    Args:
        per: see :class:`AbsoluteMean`.
        candidates: points of the grid, at least 2.

    Raises:
        ValueError: ``per`` is unknown, or there are too few candidates.

    Example:
        >>> from learnsched import ternary
        >>> x = 0.3 * torch.tensor([-1.0, 0.0, 1.0, 1.0])
        >>> round(LeastSquares("tensor")(x, ternary()).item(), 4)
        0.3
    """

    candidates: int = 24

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("candidates", self.candidates, least=2)

    @torch.no_grad()
    def __call__(self, x: Tensor, levels: LevelSet) -> Tensor:
        dtype = x.dtype
        # Squares overflow in half precision.
        x = x.detach().to(torch.promote_types(dtype, torch.float32))
        dims = _reduced(x, self.per)
        widest = Maximum(self.per)(x, levels)
        best = widest
        least = torch.full_like(best, math.inf)
        spacing = 1.8 / (self.candidates - 1)
        coarse = torch.logspace(-1.5, 0.3, self.candidates, device="cpu")
        fine = torch.logspace(-spacing, spacing, self.candidates // 2 + 1, device="cpu")
        for grid in (coarse, fine):
            centre = widest if grid is coarse else best
            for factor in grid.tolist():
                scale, error = _refit(x, centre * factor, levels, dims)
                best = torch.where(error < least, scale, best)
                least = torch.minimum(least, error)
        best = best.to(dtype)
        return best.clamp(min=_smallest(best))


@dataclass(frozen=True)
class Fixed:
    """One given scale for the whole tensor.

    Raises:
        ValueError: the value is not positive and finite.

    Example:
        >>> from learnsched import ternary
        >>> Fixed(0.5)(torch.zeros(3), ternary()).item()
        0.5
    """

    value: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.value) and self.value > 0):
            raise ValueError(f"a fixed scale must be positive and finite, got {self.value}")

    def __call__(self, x: Tensor, levels: LevelSet) -> Tensor:
        return x.new_full((), self.value)


@dataclass(frozen=True)
class FanIn:
    """``1 / sqrt(inputs of an output channel)``: of the shape alone, as large as initial weights are.

    BinaryConnect's scale but for a constant; its weights are ±1 before batch norm makes up for it.

    Example:
        >>> from learnsched import binary
        >>> FanIn()(torch.zeros(2, 4), binary()).item()
        0.5
    """

    def __call__(self, x: Tensor, levels: LevelSet) -> Tensor:
        inputs = max(1, math.prod(x.shape[1:]))
        return x.new_full((1,) * x.dim(), 1 / math.sqrt(inputs))


def default_weight_rule(levels: LevelSet) -> ScaleRule:
    """The customary rule of a level set: power of two, absolute mean, or least squares.

    Example:
        >>> from learnsched import signed, ternary
        >>> default_weight_rule(ternary()), default_weight_rule(signed(4))
        (AbsoluteMean(per='channel'), LeastSquares(per='channel', candidates=12))
    """
    if levels.name.startswith("power_of_two"):
        return PowerOfTwo()
    if len(levels.values) <= 3:
        return AbsoluteMean()
    # Within some 2 % of the error that 24 leave, at half the cost.
    return LeastSquares(candidates=12)


def unit_normal_scale(levels: LevelSet) -> float:
    """Least squares scale for what a batch norm puts out, a standard normal variable.

    Level sets without negative levels are fitted to its positive part, as after a ReLU.

    Example:
        >>> from learnsched import unsigned
        >>> round(unit_normal_scale(unsigned(2)), 2)
        0.65
    """
    grid = torch.special.ndtri((torch.arange(8192, dtype=torch.float64, device="cpu") + 0.5) / 8192)
    x = grid.clamp(min=0) if levels.values[0] >= 0 else grid
    return float(LeastSquares("tensor", candidates=200)(x, levels))


def _refit(
    x: Tensor, scale: Tensor, levels: LevelSet, dims: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """One step of alternating least squares, and the error of the scale it arrives at."""
    q = _hard(x / scale, levels)
    fitted = (x * q).sum(dims, keepdim=True) / (q * q).sum(dims, keepdim=True).clamp(min=_SMALLEST)
    scale = torch.where(fitted > 0, fitted, scale)
    error = (x - scale * _hard(x / scale, levels)).square().sum(dims, keepdim=True)
    return scale, error


def _hard(x: Tensor, levels: LevelSet) -> Tensor:
    """``levels.quantize(x)``, to the bit, compiled: a search calls it often."""
    return kernels.value(x, levels, 0.0, 0.0, noise_shape("normal"), None)


def _smallest(x: Tensor) -> float:
    # A channel of zeros would have scale 0 and divide 0 by 0; float16 has no 1e-12.
    return max(_SMALLEST, torch.finfo(x.dtype).tiny)


def _reduced(x: Tensor, per: Per) -> tuple[int, ...]:
    return tuple(range(x.dim())) if per == "tensor" or x.dim() < 2 else tuple(range(1, x.dim()))
