"""Running a model over batches, before and after training: what is checked, used and put back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

# Runs a model on a batch.
Forward = Callable[[nn.Module, Any], object]
# Tensors, each with a copy of its values.
Kept = list[tuple[Tensor, Tensor]]


def keep(tensors: Iterable[Tensor]) -> Kept:
    """Tensors and copies of their values, for :func:`put_back`."""
    return [(tensor, tensor.detach().clone()) for tensor in tensors]


def put_back(kept: Kept) -> None:
    """Give tensors the values that were kept of them, in place."""
    for tensor, value in kept:
        tensor.copy_(value)


@contextmanager
def put_back_on_failure(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Whatever fails inside, the tensors have the values from before."""
    kept = keep(tensors)
    try:
        yield
    except BaseException:
        put_back(kept)
        raise


def run_with_batch_statistics(
    model: nn.Module, norms: Iterable[nn.Module], batches: Iterable[Any], run: Forward
) -> None:
    """Run the batches; these batch norms use theirs, all else, dropout too, stays as in evaluation.

    Compiled models run as they are written: their graphs would be made anew for this, and may not be
    able to look at values.
    """
    flags = {module: module.training for module in model.modules()}
    model.eval()
    for norm in norms:
        norm.train()
    try:
        for batch in batches:
            try:
                with torch.compiler.set_stance("force_eager"):
                    run(model, batch)
            except ValueError as error:
                if "more than 1 value per channel" in str(error):
                    raise ValueError(
                        "a batch is too small for statistics of batch norm, as the last one of a loader "
                        f"may be: use drop_last=True ({error})"
                    ) from error
                raise
    finally:
        for module, flag in flags.items():
            module.training = flag


def checked(batches: Iterable[Any], model: nn.Module, run: Forward) -> Iterator[Any]:
    """The batches; that there is a first one, and an input in it, is checked at once."""
    if isinstance(batches, Tensor):
        raise TypeError("pass a list of batches, [x], or a data loader; got one tensor")
    if isinstance(batches, Dataset) and not isinstance(batches, IterableDataset):
        raise TypeError(
            f"pass a data loader, DataLoader(dataset, batch_size), got the {type(batches).__name__} "
            "itself, whose entries are single examples"
        )
    try:
        iterator = iter(batches)
    except TypeError:
        raise TypeError(f"pass a list of batches or a data loader, got {batches!r}") from None
    try:
        first = next(iterator)
    except StopIteration:
        raise ValueError(
            "there are no batches; pass a data loader or a list of inputs that is not empty, and not an "
            "iterator that was used up before"
        ) from None
    if run is on_first:
        _input(first, model)
    return chain([first], iterator)


def on_first(model: nn.Module, batch: Any) -> object:
    """Run a model on a batch that is an input or a tuple that starts with one."""
    try:
        return model(_input(batch, model))
    except TypeError as error:
        if "required positional argument" not in str(error):
            raise
        raise TypeError(
            f"{error}: of a batch the first entry is taken for the input; pass forward, such as "
            "lambda model, batch: model(*batch)"
        ) from error


def _input(batch: Any, model: nn.Module) -> Tensor:
    x = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(x, Tensor):
        raise TypeError(
            "a batch must be a tensor, or a tuple that starts with one, got "
            f"{type(x).__name__}; for other batches pass forward, such as "
            "lambda model, batch: model(**batch)"
        )
    if x.numel() == 0:
        raise ValueError(f"a batch is empty: its shape is {tuple(x.shape)}; leave it out")
    like = next(model.parameters(), x)
    return x.to(like.device)
