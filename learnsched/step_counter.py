"""How many optimizer steps an epoch takes: counted in the first one."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn


class StepCounter:
    """Counts steps of optimizers; until one is known, a model's forward passes in training mode.

    Of several optimizers the one that steps most often is what counts.

    Attributes:
        counting: whether what happens now is counted.

    Example:
        >>> net, counter = nn.Linear(2, 1), StepCounter()
        >>> counter.count_passes(net)
        >>> _ = net(torch.zeros(3, 2)), net(torch.zeros(3, 2))
        >>> counter.stop()
        >>> _ = net(torch.zeros(3, 2))
        >>> counter.total
        2
    """

    def __init__(self) -> None:
        self.counting = True
        self._before = 0  # the run was resumed
        self._counts: list[Tensor] = []
        self._passes: Any = None

    @property
    def total(self) -> int:
        """What has been counted."""
        return self._before + max(map(int, self._counts), default=0)

    @property
    def of_optimizers(self) -> bool:
        """Whether steps are what is counted."""
        return self._passes is None and bool(self._counts)

    def count_passes(self, model: nn.Module) -> None:
        """Count the model's forward passes in training mode."""
        self._passes = model.register_forward_pre_hook(
            functools.partial(_count_pass, self._new_count())
        )

    def count_steps(self, optimizer: torch.optim.Optimizer) -> None:
        """Count the optimizer's steps, and no passes any more."""
        if self._passes is not None:
            self._passes.remove()
            self._passes = None
            self._counts.clear()
        optimizer.register_step_post_hook(functools.partial(self._count_step, self._new_count()))

    def stop(self) -> None:
        """Count no more."""
        self.counting = False
        if self._passes is not None:
            self._passes.remove()

    def resume(self, counted: int, *, counting: bool) -> None:
        """Go on from a number that was counted before."""
        self._before = counted
        for count in self._counts:
            count.zero_()
        if counting:
            self.counting = True
        else:
            self.stop()

    def _new_count(self) -> Tensor:
        # A tensor, since a number in a hook would have torch.compile compile anew for each value.
        count = torch.zeros((), dtype=torch.int64, device="cpu")
        self._counts.append(count)
        return count

    def _count_step(self, count: Tensor, optimizer: Any, args: Any, kwargs: Any) -> None:
        count.add_(int(self.counting))


def _count_pass(count: Tensor, model: nn.Module, inputs: Any) -> None:
    """Knows the number alone, since copies of the model have this hook, too."""
    # A gradient of torch.func may not change what it did not make.
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        count.add_(int(model.training))
