"""A hash of tensors by name, to tell networks and artefacts apart."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes of tensors, in the order of their names.

    Args:
        tensors: on any device, also such as need a gradient.

    Example:
        >>> digest({"a": torch.zeros(2)}) == digest({"a": torch.zeros(1, 2)})
        False
    """
    whole = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        whole.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()
