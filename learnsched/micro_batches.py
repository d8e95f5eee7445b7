"""``quantize_once``: one quantized weight for the micro-batches of an optimizer step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from learnsched.modules import QUANTIZED_LAYERS
from learnsched.weight_quantizer import WeightQuantizer

_LEAVE = "leave the context before the optimizer's step"


class _Shared:
    """One quantized weight for several micro-batches, and the sum of its gradients."""

    def __init__(self) -> None:
        self._result: Tensor | None = None
        self._leaf: Tensor | None = None
        self._made_of: tuple[int, bool] | None = None

    def __call__(self, quantizer: WeightQuantizer, weight: Tensor) -> Tensor:
        now = weight._version, torch.is_grad_enabled()
        if self._leaf is None or self._made_of is None or (now[1] and not self._made_of[1]):
            self._result = quantizer.quantized(weight)
            self._leaf = self._result.detach().requires_grad_(self._result.requires_grad)
            self._made_of = now
        elif self._made_of[0] != now[0]:
            raise RuntimeError(
                f"the weight of {quantizer.layer_name or 'a layer'} changed inside quantize_once; "
                f"{_LEAVE}"
            )
        return self._leaf

    def pull_back(self) -> None:
        if self._result is not None and self._leaf is not None and self._leaf.grad is not None:
            torch.autograd.backward(self._result, self._leaf.grad)


@contextmanager
def quantize_once(model: nn.Module) -> Iterator[None]:
    """Quantize each weight once for all the micro-batches of an optimizer step.

    Inside, every forward pass uses the same quantized weights; their gradients add up there, and reach
    the parameters when the context ends. Call ``backward`` inside, the optimizer's ``step`` after it.
    Within another such context this one changes nothing. The graph of a compiled model breaks at every
    layer, and activation checkpointing needs ``use_reentrant=True``. Under ``DistributedDataParallel``,
    run all micro-batches but the last inside its ``no_sync()``, as with any accumulated gradients.

    Args:
        model: converted by ``quantize_``.

    Raises:
        RuntimeError: a weight changes inside, or an optimizer of weights or of what their quantizers
            learn takes a step.
        ValueError: the model has no quantized weights.

    Example:
        >>> from learnsched import quantize_, ternary
        >>> net = quantize_(nn.Sequential(nn.Linear(8, 4)), ternary())
        >>> with quantize_once(net):
        ...     for x in torch.randn(3, 5, 8):
        ...         net(x).square().mean().backward()
        >>> net[0].weight.grad.shape
        torch.Size([4, 8])
    """
    every = [m for m in model.modules() if isinstance(m, WeightQuantizer)]
    if not every:
        raise ValueError("the model has no quantized weights; call learnsched.quantize_ first")
    # An outer context goes on with what it has.
    quantizers = [quantizer for quantizer in every if quantizer.shared is None]
    shared = [_Shared() for _ in quantizers]
    for quantizer, own in zip(quantizers, shared, strict=True):
        # What a weight was made of changes from step to step, which a compiled graph must not.
        quantizer.shared = torch.compiler.disable(own)
    late: set[Tensor] = {p for quantizer in quantizers for p in quantizer.parameters()}
    late |= {module.weight for module in model.modules() if isinstance(module, QUANTIZED_LAYERS)}

    def refuse(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        # Their gradients come at the end: the step would leave them where they are, silently.
        if any(p in late for group in optimizer.param_groups for p in group["params"]):
            raise RuntimeError(f"an optimizer took a step inside quantize_once; {_LEAVE}")

    hook = register_optimizer_step_pre_hook(refuse)
    try:
        yield
        for own in shared:
            own.pull_back()
    finally:
        hook.remove()
        for quantizer in quantizers:
            quantizer.shared = None
