"""A small transformer as one of the families of networks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

HEADS = 4
# Linear layers of a block: one ahead of attention, one behind it, two that feed forward.
LAYERS = 4


class TransformerBlock(nn.Module):
    """Attention, then two layers with a ReLU between, each behind a layer norm and around a sum.

    Args:
        width: of each token, a multiple of :data:`HEADS`.

    Example:
        >>> tuple(TransformerBlock(8)(torch.zeros(2, 5, 8)).shape)
        (2, 5, 8)
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.feed = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.ReLU(),
            nn.Linear(2 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as ``x``, ``(..., tokens, width)``."""
        parts = self.mix(self.norm(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(-3, -2) for part in parts)
        shares = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        x = x + self.out((shares @ v).transpose(-3, -2).flatten(-2))
        result: Tensor = x + self.feed(x)
        return result


class Transformer(nn.Module):
    """Tokens that are pieces of the input, blocks, and a linear layer on the mean over tokens.

    Args:
        size: numbers of an input.
        token: numbers of a token, which divide the size.
        width: of each token inside, a multiple of :data:`HEADS`.
        blocks: how many.
        classes: of the data.

    Raises:
        ValueError: tokens do not make up the input, or heads the width.

    Example:
        >>> tuple(Transformer(40, 4, 8, 1, 10)(torch.zeros(2, 40)).shape)
        (2, 10)
    """

    def __init__(self, size: int, token: int, width: int, blocks: int, classes: int) -> None:
        super().__init__()
        for whole, part, what in (
            (size, token, "input in tokens"),
            (width, HEADS, "width in heads"),
        ):
            if whole % part:
                raise ValueError(
                    f"{whole} is no multiple of {part}, as to part the {what} it must be"
                )
        self.token = token
        self.first = nn.Linear(token, width)
        self.place = nn.Parameter(0.02 * torch.randn(size // token, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width) for _ in range(blocks)))
        self.norm, self.last = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of shape ``(batch, classes)``."""
        x = self.first(x.flatten(1).unflatten(1, (-1, self.token))) + self.place
        result: Tensor = self.last(self.norm(self.blocks(x)).mean(1))
        return result
