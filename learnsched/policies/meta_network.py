"""The recurrent network behind a learned policy."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from learnsched.policies.features import FEEDBACK, STATIC

# Weight and activation noise, forward and backward each, and the fraction.
OUTPUTS = 5


class MetaNetwork(nn.Module):
    """A GRU cell shared by all layers, with a mean and a maximum over layers as common input.

    Args:
        hidden: units of the cell, per layer.
        embedding: units of the embedded inputs.

    Shape:
        features ``(..., layers, features)`` and hidden state ``(..., layers, hidden)`` in; raw
        outputs ``(..., layers, 5)``, zero at initialisation, and the new hidden state out.

    Example:
        >>> network = MetaNetwork(hidden=6, embedding=4)
        >>> network.hidden, network.embedding
        (6, 4)
    """

    def __init__(self, hidden: int = 24, embedding: int = 16) -> None:
        super().__init__()
        self.hidden, self.embedding = hidden, embedding
        self.embed = nn.Linear(STATIC + FEEDBACK + OUTPUTS, embedding)
        self.cell = nn.GRUCell(3 * embedding, hidden)
        self.out = nn.Linear(hidden, OUTPUTS)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, features: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.tanh(self.embed(features))
        common = torch.cat([x.mean(-2, keepdim=True), x.amax(-2, keepdim=True)], dim=-1)
        x = torch.cat([x, common.expand(*x.shape[:-1], -1)], dim=-1)
        shape = state.shape
        state = self.cell(x.flatten(0, -2), state.flatten(0, -2)).view(shape)
        return self.out(state), state
