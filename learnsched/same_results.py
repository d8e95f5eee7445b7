"""Whether a changed model computes what it did before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from learnsched.example import Example, call, in_evaluation, tensors
from learnsched.function_traces import first_line

Way = Callable[[], AbstractContextManager[Any]]


def results(
    model: nn.Module,
    example_input: Example,
    watch: AbstractContextManager[None] | None = None,
    way: Way = nullcontext,
) -> list[Tensor]:
    """Outputs and gradients: a trace forgets, among others, where a method went without gradients."""
    # Gradients too, since checkpoints compute activations again for them.
    with in_evaluation(model), torch.enable_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        with watch or nullcontext(), way():
            outputs = list(tensors(call(model, example_input)))
        gradients = _gradients(model, outputs)
    none = torch.empty(0)
    return [
        *(out.detach().clone() for out in outputs),
        *(none if gradient is None else gradient for gradient in gradients),
    ]


def _gradients(model: nn.Module, outputs: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Gradients of the parameters, which keep their own."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    losses = [out.abs().square().sum() for out in outputs if out.requires_grad]
    if not losses or not parameters:
        return ()
    try:
        return torch.autograd.grad(losses, parameters, allow_unused=True)
    except RuntimeError as error:
        raise ValueError(
            "the model's gradients, which must be the same afterwards, cannot be taken "
            f"({first_line(error)}); give torch.utils.checkpoint use_reentrant=False"
        ) from error


def all_same(before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    """Whether two lists of results are alike, NaN counting as NaN."""
    return len(before) == len(after) and all(map(_same, before, after))


def _same(one: Tensor, other: Tensor) -> bool:
    alike = one.shape == other.shape and one.dtype == other.dtype
    return alike and torch.equal(one.nan_to_num(), other.nan_to_num())
