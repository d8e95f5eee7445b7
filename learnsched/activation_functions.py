"""Which functions of torch are activation functions, and the modules that compute the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# With the modules that compute the same; None where a module would need more than the call tells.
ACTIVATION_FUNCTIONS: Mapping[Callable[..., Any], type[nn.Module] | None] = {
    F.relu: nn.ReLU, F.relu_: nn.ReLU, torch.relu: nn.ReLU, torch.relu_: nn.ReLU,
    Tensor.relu: nn.ReLU, Tensor.relu_: nn.ReLU, F.relu6: nn.ReLU6,
    F.hardtanh: nn.Hardtanh, F.hardtanh_: nn.Hardtanh,
    F.leaky_relu: nn.LeakyReLU, F.leaky_relu_: nn.LeakyReLU,
    F.prelu: None, Tensor.prelu: None, F.rrelu: None, torch.rrelu: None, torch.rrelu_: None,
    F.elu: nn.ELU, F.elu_: nn.ELU, F.celu: nn.CELU, torch.celu: nn.CELU, torch.celu_: nn.CELU,
    F.selu: nn.SELU, torch.selu: nn.SELU, torch.selu_: nn.SELU, F.gelu: nn.GELU,
    F.silu: nn.SiLU, F.mish: nn.Mish, F.hardswish: nn.Hardswish, F.softplus: nn.Softplus,
}  # fmt: skip

# That are ReLUs where the number is 0, and much else where it is not.
_CLAMPS = (
    torch.clamp, torch.clamp_, torch.clamp_min, torch.clamp_min_, torch.clip, torch.clip_,
    Tensor.clamp, Tensor.clamp_, Tensor.clamp_min, Tensor.clamp_min_, Tensor.clip, Tensor.clip_,
)  # fmt: skip
_MAXIMA = (torch.maximum, Tensor.maximum)
_THRESHOLDS = (F.threshold, torch.threshold)


def rectifies(func: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    """Whether a call computes a ReLU under another name."""
    if func in _CLAMPS:
        low = kwargs.get("min", args[1] if len(args) > 1 else None)
        return isinstance(low, int | float) and low == 0
    if func in _MAXIMA:
        other = kwargs.get("other", args[-1])
        return isinstance(other, Tensor) and not bool(other.any())
    return func in _THRESHOLDS and not any((*args[1:3], *kwargs.values()))
