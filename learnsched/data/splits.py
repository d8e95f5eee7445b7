"""Splits of a data set: what they hold, how they are chosen and how they are standardised."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Split:
    """Inputs and their labels.

    Args:
        x: inputs, shape ``(samples, ...)``.
        y: labels, int64, shape ``(samples,)``.

    Raises:
        ValueError: the labels are not int64, not one-dimensional, or not as many as the inputs.

    Example:
        >>> len(Split(torch.zeros(3, 40), torch.tensor([0, 1, 2])))
        3
    """

    x: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        if self.y.dtype != torch.int64 or self.y.dim() != 1:
            raise ValueError(
                f"labels must be int64 of shape (samples,), got {self.y.dtype} of shape "
                f"{tuple(self.y.shape)}; convert class numbers with y.long().flatten()"
            )
        if self.x.dim() < 2 or len(self.x) != len(self.y):
            raise ValueError(
                f"{len(self.y)} labels need inputs of shape ({len(self.y)}, ...), "
                f"got {tuple(self.x.shape)}"
            )

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True, eq=False)
class DataSet:
    """Data for training, for validation (selection, tuning, the outer loop) and for the report.

    Args:
        name: how the data are called in reports.
        train: what networks are trained on.
        validation: what schedules, policies and learning rates are chosen on.
        test: what only the report reads.
        classes: number of classes.

    Raises:
        ValueError: a split is empty, splits differ in input shape, or a label is out of range.

    Example:
        >>> split = Split(torch.zeros(2, 40), torch.tensor([0, 1]))
        >>> DataSet("mine", train=split, validation=split, test=split, classes=2).name
        'mine'
    """

    name: str
    train: Split
    validation: Split
    test: Split
    classes: int

    def __post_init__(self) -> None:
        for part, split in self._splits():
            if not len(split):
                raise ValueError(f"the {part} split of {self.name} is empty")
            if split.x.shape[1:] != self.train.x.shape[1:]:
                raise ValueError(
                    f"inputs of {self.name} have shape {self.shape} in the train split, "
                    f"but {tuple(split.x.shape[1:])} in the {part} split"
                )
            least, most = int(split.y.min()), int(split.y.max())
            if least < 0 or most >= self.classes:
                raise ValueError(
                    f"labels of {self.name} must lie in [0, {self.classes}), "
                    f"got {least} to {most} in the {part} split"
                )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.train.x.shape[1:])

    @property
    def sha256(self) -> str:
        """Hash of all values, types and shapes, for records: 64 hexadecimal digits.

        It is computed at each call, about half a second for Fashion-MNIST. It is not
        :func:`learnsched.digest.digest`: records that are there hold this one.
        """
        digest = hashlib.sha256()
        for part, split in self._splits():
            for tensor in (split.x, split.y):
                digest.update(f"{part} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                digest.update(tensor.contiguous().cpu().numpy().data)
        return digest.hexdigest()

    def _splits(self) -> tuple[tuple[str, Split], ...]:
        return ("train", self.train), ("validation", self.validation), ("test", self.test)


def stratified(y: Tensor, sizes: Sequence[int], seed: int) -> tuple[Tensor, ...]:
    """Disjoint random choices, in each of which the classes have their shares of the whole.

    Args:
        y: labels, shape ``(samples,)``.
        sizes: how many samples each choice takes, together at most all.
        seed: of the random order; the caller's generators are left alone.

    Returns:
        indices into ``y``, int64, one tensor a size. Each prefix of a choice is stratified too.

    Raises:
        ValueError: a size is negative, or together they exceed the samples.

    Example:
        >>> y = torch.tensor([0, 0, 0, 0, 1, 1])
        >>> [y[i].bincount().tolist() for i in stratified(y, (3, 3), seed=0)]
        [[2, 1], [2, 1]]
    """
    if min(sizes, default=0) < 0 or sum(sizes) > len(y):
        raise ValueError(
            f"cannot choose {tuple(sizes)} of {len(y)} samples; sizes must be at least 0 and "
            f"{len(y)} at most together"
        )
    shuffled = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    # Each sample's place within its class, as a share of the class: sorted by it, the classes
    # interleave evenly, so that any run of consecutive samples is stratified.
    place = torch.empty(len(y), dtype=torch.float64)
    for label in set(y.tolist()):
        members = shuffled[y[shuffled] == label]
        place[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    order = shuffled[place[shuffled].argsort(stable=True)]
    return torch.split_with_sizes(order[: sum(sizes)], list(sizes))


def reduced(data: DataSet, train: int, validation: int, test: int) -> DataSet:
    """A smaller data set: stratified choices of each split, the same at each call.

    Args:
        data: to choose from; its values are not changed.
        train: samples of the train split; all of them if there are not as many, as for the others.
        validation: samples of the validation split.
        test: samples of the test split.

    Raises:
        ValueError: a size is below 1.

    Example:
        >>> from learnsched.data import load
        >>> small = reduced(load("digits"), 100, 50, 1000)
        >>> len(small.train), len(small.validation), len(small.test)
        (100, 50, 500)
    """
    if min(train, validation, test) < 1:
        raise ValueError(f"sizes must be at least 1, got {train}, {validation} and {test}")
    parts = []
    for split, size in ((data.train, train), (data.validation, validation), (data.test, test)):
        if size < len(split):
            [chosen] = stratified(split.y, (size,), seed=size)
            split = Split(split.x[chosen], split.y[chosen])
        parts.append(split)
    return DataSet(data.name, parts[0], parts[1], parts[2], data.classes)


def parted(known: Split, parts: int, seed: int) -> tuple[Split, Split]:
    """A stratified part of a split, one of so many, rounded down, and the rest.

    Example:
        >>> whole = Split(torch.zeros(25, 2), torch.arange(25) % 5)
        >>> [len(split) for split in parted(whole, 10, seed=0)]
        [2, 23]
    """
    size = len(known) // parts
    part, rest = stratified(known.y, (size, len(known) - size), seed)
    return Split(known.x[part], known.y[part]), Split(known.x[rest], known.y[rest])


def standardised(name: str, train: Split, validation: Split, test: Split, classes: int) -> DataSet:
    """The data set with mean 0 and standard deviation 1 in each channel of the train split.

    Args:
        name: of the data set.
        train: raw split of any real dtype, shape ``(samples, features)``, which is one channel, or
            ``(samples, channels, ...)``.
        validation: raw split, treated with the train split's statistics.
        test: raw split, treated with the train split's statistics.
        classes: number of classes.

    Returns:
        float32 inputs of the same shapes.

    Raises:
        ValueError: a channel of the train split is constant or not finite.

    Example:
        >>> raw = Split(torch.tensor([[0, 2], [4, 6]], dtype=torch.uint8), torch.tensor([0, 1]))
        >>> data = standardised("mine", raw, raw, raw, classes=2)
        >>> round(float(data.train.x.mean()), 6), round(float(data.train.x.std(correction=0)), 6)
        (0.0, 1.0)
    """
    channels = train.x.shape[1] if train.x.dim() > 2 else 1
    rows = train.x.reshape(len(train), channels, -1).float()
    # Sums of pixels and of their squares are whole numbers, exact in float64 in any order of
    # summation: of images the values do not depend on threads or machine.
    count = rows[:, 0].numel()
    mean = rows.sum((0, 2), dtype=torch.float64) / count
    std = (rows.square().sum((0, 2), dtype=torch.float64) / count - mean.square()).clamp(0).sqrt()
    if not bool((std > 0).logical_and(std.isfinite()).all()):
        raise ValueError(
            f"every channel of {name} must vary in the train split and be finite, "
            f"got standard deviations {std.tolist()}"
        )
    broadcast = (channels, *[1] * (train.x.dim() - 2)) if train.x.dim() > 2 else (1,)
    mean, std = (s.float().reshape(broadcast) for s in (mean, std))
    done = [Split(s.x.float().sub(mean).div_(std), s.y) for s in (train, validation, test)]
    return DataSet(name, done[0], done[1], done[2], classes)
