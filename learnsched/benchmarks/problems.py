"""Problems that meta-training never saw: other losses, outputs and networks than a classifier's.

Each has data that need no download, a network of batch norms and ReLUs, a loss, and a score in which
more is better.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from learnsched.data import load
from learnsched.meta.transformer import Transformer

# Samples to train, validate and test on.
SIZES = (2000, 500, 500)


class Split(NamedTuple):
    """Inputs and targets of any shape and type, sample by sample."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Problem:
    """What a network is asked for.

    Attributes:
        metric: what the score is, for tables.
        data: inputs and targets of the training, validation and test samples.
        network: makes a network with random weights.
        loss: from outputs and targets to what is minimized.
        score: from outputs and targets to a number of at most 1; more is better.
    """

    metric: str
    data: Callable[[], tuple[Split, Split, Split]]
    network: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], float]


def _first_of(name: str) -> tuple[Split, Split, Split]:
    """The first samples of each split of a data set."""
    data = load(name)
    splits = zip((data.train, data.validation, data.test), SIZES, strict=True)
    first, second, third = (Split(split.x[:count], split.y[:count]) for split, count in splits)
    return first, second, third


def _split(x: Tensor, y: Tensor) -> tuple[Split, Split, Split]:
    first, second, third = map(Split, x.split(SIZES), y.split(SIZES))
    return first, second, third


# Scores.


def explained_variance(output: Tensor, target: Tensor) -> float:
    """R²: 1 less the squared error over the targets' variance.

    Example:
        >>> explained_variance(torch.tensor([0.0, 2.0]), torch.tensor([0.0, 4.0]))
        0.5
    """
    error = (output - target).square().mean() / (target - target.mean()).square().mean()
    return 1 - float(error)


def right(output: Tensor, target: Tensor) -> float:
    """Share of targets that the largest of the outputs, in dimension 1, is for.

    Example:
        >>> right(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([1, 1]))
        0.5
    """
    return float((output.argmax(1) == target).float().mean())


def intersection_over_union(output: Tensor, target: Tensor) -> float:
    """Pixels that output and target give to a class over those that either does; mean over classes.

    Example:
        >>> intersection_over_union(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([1, 1]))
        0.25
    """
    chosen = output.argmax(1)
    ratios = [
        float(((chosen == k) & (target == k)).sum() / ((chosen == k) | (target == k)).sum())
        for k in torch.stack([target, chosen]).unique()
    ]
    return sum(ratios) / len(ratios)


# A number from ten: Friedman's function, of which five of the inputs say nothing.


def _friedman() -> tuple[Split, Split, Split]:
    from sklearn.datasets import make_friedman1

    x, y = (
        torch.from_numpy(array).float()
        for array in make_friedman1(sum(SIZES), 10, noise=1.0, random_state=0)
    )
    return _split((x - 0.5) * 12**0.5, ((y - y.mean()) / y.std()).unsqueeze(1))


def _regressor() -> nn.Module:
    hidden = [
        part
        for width in (10, 64, 64)
        for part in (nn.Linear(width, 64), nn.BatchNorm1d(64), nn.ReLU())
    ]
    return nn.Sequential(*hidden, nn.Linear(64, 1))


# Clean images from noisy ones.


def _noisy_images() -> tuple[Split, Split, Split]:
    clean = torch.cat([split.x for split in _first_of("fashion_mnist")])
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    return _split(clean + noise, clean)


def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def _autoencoder() -> nn.Module:
    return nn.Sequential(
        _block(1, 16, 2), _block(16, 32, 2), _block(32, 32),
        nn.Upsample(scale_factor=2), _block(32, 16),
        nn.Upsample(scale_factor=2), nn.Conv2d(16, 1, 3, padding=1),
    )  # fmt: skip


# Which digit, if any, a pixel of a scene belongs to.


def _scenes() -> tuple[Split, Split, Split]:
    """Noisy canvases of 24 × 24 pixels with four digits each, which no other split has."""
    data = load("digits")
    generator = torch.Generator().manual_seed(0)
    images, labels = [], []
    for split, count in zip((data.train, data.validation, data.test), SIZES, strict=True):
        image, label = torch.zeros(count, 1, 24, 24), torch.full((count, 24, 24), 10)
        brightness = split.x - split.x.amin()
        ink = brightness > 0.5 * brightness.amax()
        for corner in ((0, 0), (0, 12), (12, 0), (12, 12)):
            chosen = torch.randint(len(split), (count,), generator=generator)
            shift = torch.randint(5, (count, 2), generator=generator)
            for n, (digit, (down, across)) in enumerate(zip(chosen, shift.tolist(), strict=True)):
                rows = slice(corner[0] + down, corner[0] + down + 8)
                columns = slice(corner[1] + across, corner[1] + across + 8)
                image[n, 0, rows, columns] = brightness[digit, 0]
                label[n, rows, columns][ink[digit, 0]] = split.y[digit]
        images.append(image)
        labels.append(label)
    image = torch.cat(images)
    image = image + torch.randn(image.shape, generator=generator)
    return _split((image - image.mean()) / image.std(), torch.cat(labels))


class UNet(nn.Module):
    """An encoder and a decoder of two scales, joined at both; a class for every pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse, self.middle = _block(1, 16), _block(16, 32, 2), _block(32, 32)
        self.up, self.joint = nn.Upsample(scale_factor=2), _block(48, 16)
        self.head = nn.Conv2d(16, 11, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of shape (images, classes, height, width)."""
        fine = self.fine(x)
        coarse = self.middle(self.coarse(fine))
        scores: Tensor = self.head(self.joint(torch.cat([fine, self.up(coarse)], 1)))
        return scores


# The next character of a text.

_CHARACTERS = " abcdefghijklmnopqrstuvwxyz.,()'"
_LENGTH = 48


def _text() -> tuple[Split, Split, Split]:
    """Windows of the Python manual, as the interpreter's own help has it; splits do not overlap."""
    from pydoc_data.topics import topics

    paragraphs = "\n\n".join(topics[name] for name in sorted(topics)).lower().split("\n\n")
    # Topics quote one another: of what is said twice, once is enough.
    text = re.sub("[^a-z.,()']+", " ", " ".join(dict.fromkeys(paragraphs)))
    codes = torch.tensor([_CHARACTERS.index(character) for character in text])
    tenth = len(codes) // 10
    generator = torch.Generator().manual_seed(0)
    windows = []
    for part, count in zip(codes.split([len(codes) - 2 * tenth, tenth, tenth]), SIZES, strict=True):
        starts = torch.randint(len(part) - _LENGTH, (count,), generator=generator)
        windows.append(part[starts[:, None] + torch.arange(_LENGTH + 1)])
    whole = torch.cat(windows)
    return _split(whole[:, :-1], whole[:, 1:])


class CausalConvolution(nn.Module):
    """Dilated convolutions over characters, none of which sees what comes after it."""

    def __init__(self) -> None:
        super().__init__()
        width = 48
        self.embed = nn.Embedding(len(_CHARACTERS), width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.ConstantPad1d((2 * dilation, 0), 0.0),
                nn.Conv1d(width, width, 3, dilation=dilation, bias=False),
                nn.BatchNorm1d(width),
                nn.ReLU(),
            )
            for dilation in (1, 2, 4, 8)
        )
        self.head = nn.Conv1d(width, len(_CHARACTERS), 1)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of shape (texts, characters, length)."""
        x = self.embed(x).transpose(1, 2)
        for number, block in enumerate(self.blocks):
            x = x + block(x) if number else block(x)
        scores: Tensor = self.head(x)
        return scores


PROBLEMS: Mapping[str, Problem] = {
    "regression, MLP": Problem("R²", _friedman, _regressor, F.mse_loss, explained_variance),
    "denoising, autoencoder": Problem(
        "R²", _noisy_images, _autoencoder, F.mse_loss, explained_variance
    ),
    "segmentation, U-Net": Problem(
        "mean IoU", _scenes, UNet, F.cross_entropy, intersection_over_union
    ),
    "signals, transformer": Problem(
        "accuracy",
        functools.partial(_first_of, "mnist1d"),
        functools.partial(Transformer, size=40, token=4, width=32, blocks=3, classes=10),
        F.cross_entropy,
        right,
    ),
    "text, causal convolutions": Problem(
        "accuracy", _text, CausalConvolution, F.cross_entropy, right
    ),
}
