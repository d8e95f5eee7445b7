"""The optimizers of the inner loop, as specifications; ``higher`` makes them differentiable."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

# Adam divides by the root of the second moment, whose derivative is infinite at 0: start above.
_SECOND_MOMENT = 1e-14


class InnerOptimizer(Protocol):
    """What the inner loop needs of an optimizer.

    Attributes:
        moments: names, in the optimizer's state, of the tensors that it keeps for each parameter.
        decoupled_decay: share of a parameter, times the learning rate, that a step takes away.
    """

    @property
    def moments(self) -> tuple[str, ...]: ...

    @property
    def decoupled_decay(self) -> float: ...

    def start(self, parameter: Tensor) -> tuple[Tensor, ...]:
        """The moments of a parameter before the first step."""
        ...

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer that ``higher`` patches, of learning rate 0, one group a parameter.

        So each parameter can have a learning rate of its own shape.
        """
        ...


@dataclass(frozen=True)
class Adam:
    """Adam; with ``decoupled_decay``, AdamW, which ``higher`` itself refuses.

    Args:
        eps: larger than torch's default, as it bounds the derivative of an update.
        weight_decay: added to the gradient.
        decoupled_decay: taken from the parameters.

    Example:
        >>> Adam().moments
        ('exp_avg', 'exp_avg_sq')
    """

    eps: float = 1e-6
    weight_decay: float = 0.0
    decoupled_decay: float = 0.0
    moments = ("exp_avg", "exp_avg_sq")

    def start(self, parameter: Tensor) -> tuple[Tensor, ...]:
        """A first moment of 0 and a second one above."""
        return torch.zeros_like(parameter), torch.full_like(parameter, _SECOND_MOMENT)

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """``torch.optim.Adam``."""
        groups = [{"params": [p]} for p in parameters]
        return torch.optim.Adam(groups, lr=0.0, eps=self.eps, weight_decay=self.weight_decay)


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent, with momentum if it is not 0.

    Args:
        momentum: in [0, 1).
        weight_decay: added to the gradient.

    Example:
        >>> SGD().moments, SGD(momentum=0.9).moments
        ((), ('momentum_buffer',))
    """

    momentum: float = 0.0
    weight_decay: float = 0.0
    decoupled_decay = 0.0

    @property
    def moments(self) -> tuple[str, ...]:
        """The momentum buffer, if there is momentum."""
        return ("momentum_buffer",) if self.momentum else ()

    def start(self, parameter: Tensor) -> tuple[Tensor, ...]:
        """A buffer of 0, after which the first step is torch's."""
        return tuple(torch.zeros_like(parameter) for _ in self.moments)

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """``torch.optim.SGD``."""
        groups = [{"params": [p]} for p in parameters]
        return torch.optim.SGD(
            groups, lr=0.0, momentum=self.momentum, weight_decay=self.weight_decay
        )


# By the name that a task gives, from Adam's ε.
OPTIMIZERS: dict[str, Callable[[float], InnerOptimizer]] = {
    "adam": lambda eps: Adam(eps),
    "adamw": lambda eps: Adam(eps, decoupled_decay=0.01),
    "sgd": lambda eps: SGD(),
    "momentum": lambda eps: SGD(momentum=0.9),
}
