"""The families of small networks that meta-training and evaluation train."""

from __future__ import annotations

from torch import nn


def mlp(inputs: int, width: int, depth: int, classes: int) -> nn.Module:
    """``depth`` linear layers, batch norm and ReLU between them."""
    layers: list[nn.Module] = [nn.Flatten()]
    size = inputs
    for _ in range(depth - 1):
        layers += [nn.Linear(size, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
        size = width
    return nn.Sequential(*layers, nn.Linear(size, classes))


def cnn1d(length: int, width: int, depth: int, classes: int) -> nn.Module:
    """``depth - 1`` convolutions, the first two with stride 2, and a linear layer."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, length))]
    channels = 1
    for index in range(depth - 1):
        stride = 2 if index < 2 else 1
        kernel = 5 if index == 0 else 3
        layers += [
            nn.Conv1d(channels, width, kernel, stride, kernel // 2, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(),
        ]
        channels = width
        length = (length + stride - 1) // stride
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * length, classes))


def cnn2d(side: int, width: int, depth: int, classes: int) -> nn.Module:
    """``depth - 1`` convolutions, the first two with stride 2, pooling and a linear layer."""
    layers: list[nn.Module] = []
    channels = 1
    for index in range(depth - 1):
        layers += [
            nn.Conv2d(channels, width, 3, 2 if index < 2 else 1, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        channels = width
    remaining = side
    for index in range(depth - 1):
        remaining = (remaining + 1) // 2 if index < 2 else remaining
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * remaining**2, classes))
