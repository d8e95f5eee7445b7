"""Under what torch runs: transforms, compilers, recorders, and whether values can be read there."""

from __future__ import annotations

import torch
from torch import Tensor


def inside_transform(x: Tensor) -> bool:
    """Whether ``x`` stands for something else inside ``vmap`` or ``grad`` of :mod:`torch.func`."""
    # A compiled graph has been through its transforms already, and cannot trace the question.
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(x))


def recorded_for_onnx() -> bool:
    """Whether ``torch.onnx.export(..., dynamo=False)`` records the operations.

    It sees operations of torch, not what else fills a tensor.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is None:
        return False
    return torch.onnx.is_in_onnx_export()


def can_look(x: Tensor) -> bool:
    """Whether values can be read without waiting for a device or breaking a compiled graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not inside_transform(x)
