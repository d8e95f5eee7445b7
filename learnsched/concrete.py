"""Samples of the levels that are differentiable: relaxed quantization's concrete distribution."""

from __future__ import annotations

import torch
from torch import Tensor

from learnsched import staircase
from learnsched.annealed import quantize_unchecked
from learnsched.levels import LevelSet
from learnsched.noise import NoiseShape
from learnsched.staircase import NARROWEST, Level

# The smallest probability whose logarithm is taken.
_LEAST = 1e-20


def concrete_quantize(
    x: Tensor,
    levels: LevelSet,
    forward_std: Level,
    forward_mean: Level,
    backward_std: Level,
    backward_mean: Level,
    noise: NoiseShape,
    temperature: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A concrete sample of the levels: their mean, weighed by a softmax of perturbed log-probabilities.

    With the probability ``p_k`` of each level under the forward noise, Gumbel noise ``g_k`` and
    temperature ``λ`` the value is ``Σ q_k softmax((log p + g) / λ)_k``, and every gradient is that of
    this value. The lower the temperature, the more it is a sample of the levels themselves. Where the
    forward std is 0, it is the hard staircase with the gradient of the backward noise.

    Args:
        x: any shape, in units of the levels.
        levels: the level set.
        forward_std: of the noise, at least 0, a number or a tensor that broadcasts to ``x``.
        forward_mean: shift of the noise.
        backward_std: of the backward noise, which counts where the forward std is 0.
        backward_mean: its shift.
        noise: shape of the noise.
        temperature: λ, positive.
        generator: random numbers.

    Returns:
        tensor of ``x``'s shape and dtype, inside ``[q_0, q_K]``.

    Source:
        Louizos et al. 2019 (RQ, arXiv:1810.01875), equations 6 to 8.

    Example:
        >>> from learnsched import ternary
        >>> from learnsched.noise import noise_shape
        >>> x = torch.tensor([-0.9, 0.1])
        >>> concrete_quantize(x, ternary(), 0.0, 0.0, 0.5, 0.0, noise_shape("logistic"), 1.0).tolist()
        [-1.0, 0.0]
    """
    hard = quantize_unchecked(x, levels, 0.0, forward_mean, backward_std, backward_mean, noise)
    narrow = torch.as_tensor(forward_std, dtype=x.dtype, device=x.device)
    soft = narrow > NARROWEST
    # What is not chosen must have a finite gradient all the same.
    std = torch.where(soft, narrow, 1.0)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    parts = staircase.probabilities(wide, levels, std, forward_mean, noise)
    logits = torch.stack(parts, dim=-1).clamp(min=_LEAST).log()
    uniform = torch.rand(
        logits.shape, dtype=logits.dtype, device=logits.device, generator=generator
    )
    gumbel = -(-uniform.clamp(min=_LEAST).log()).clamp(min=_LEAST).log()
    shares = torch.softmax((logits + gumbel) / temperature, dim=-1)
    values = torch.tensor(levels.values, dtype=shares.dtype, device=shares.device)
    return torch.where(soft, (shares * values).sum(-1).to(x.dtype), hard)
