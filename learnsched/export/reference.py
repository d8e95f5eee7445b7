"""``integer_reference``: inference with integers alone, in NumPy, as an accelerator computes.

Between the two ends, where real inputs become codes and accumulators become real outputs, there is no
floating-point number. Written plainly, as a reference to check faster implementations against.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from learnsched.export import graph as g
from learnsched.export.errors import FolderError
from learnsched.export.folder import MANIFEST, read_files, read_manifest
from learnsched.export.manifest import read_array, read_entry

Codes = NDArray[np.int32]

# Samples at a time: unfolded windows of a whole data set would not fit in memory.
_CHUNK = 64


class IntegerReference:
    """Integer-only inference of a network that ``export_ternary`` wrote; made by ``integer_reference``.

    Attributes:
        graph: the layers.
        manifest: the manifest, as read.
        vectors: codes of the inputs and accumulators of the outputs that the folder holds.

    Example:
        >>> import tempfile, torch
        >>> from torch import nn
        >>> from learnsched import export_ternary, finalize_, integer_reference, quantize_, ternary
        >>> from learnsched.export import QuantizedInput
        >>> net = nn.Sequential(QuantizedInput(0.05), nn.Linear(8, 4, bias=False))
        >>> folder, x = tempfile.mkdtemp(), torch.randn(20, 8)
        >>> export_ternary(finalize_(quantize_(net, ternary())), x, folder)
        >>> reference = integer_reference(folder)
        >>> reference(x.numpy()).dtype.name, reference.layers(x.numpy())["output"].dtype.name
        ('float32', 'int32')
    """

    def __init__(
        self, graph: g.Graph, manifest: dict[str, Any], vectors: dict[str, NDArray[np.int32]]
    ) -> None:
        self.graph, self.manifest, self.vectors = graph, manifest, vectors

    def __call__(self, x: NDArray[Any]) -> NDArray[np.float32]:
        """Outputs of the network: float32, ``accumulator * scale + bias``.

        Args:
            x: real inputs, shape ``(samples, ...)``; or integers, the codes of the input's quantizer.
        """
        return run(self.graph, x)[self.graph.output.name]

    def layers(self, x: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Integers of every layer, by name; the accumulators behind the output under ``output``."""
        return integers(self.graph, x)

    def verify(self) -> None:
        """Compute the folder's test vectors.

        Raises:
            FolderError: a result is not what the folder says.
        """
        wrong = (
            self.layers(self.vectors["input"])[self.graph.output.name] != self.vectors["output"]
        ).sum()
        if wrong:
            raise FolderError(f"{wrong} accumulators of the test vectors differ; export again")


def integer_reference(folder: str | os.PathLike[str]) -> IntegerReference:
    """Read a folder of ``export_ternary`` for integer-only inference in NumPy.

    Every file is checked against the manifest, and the test vectors are computed, before it returns.

    Raises:
        FileNotFoundError: there is no such folder, or no manifest in it.
        FolderError: the folder is of another format or version, or a file is missing, unlisted, altered,
            truncated or outside; or the test vectors do not come out.

    Example:
        >>> import tempfile, torch
        >>> from torch import nn
        >>> from learnsched import export_ternary, finalize_, quantize_, ternary
        >>> from learnsched.export import QuantizedInput
        >>> net = nn.Sequential(QuantizedInput(0.05), nn.Linear(8, 4))
        >>> net = finalize_(quantize_(net, ternary()))
        >>> folder, x = tempfile.mkdtemp(), torch.randn(20, 8)
        >>> export_ternary(net, x, folder)
        >>> reference = integer_reference(folder)
        >>> bool(np.allclose(reference(x.numpy()), net(x).detach().numpy(), atol=1e-5))
        True
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    files = read_files(folder, manifest)
    try:
        nodes = tuple(read_entry(entry, files) for entry in manifest["layers"])
        vectors = {
            name: read_array(manifest["vectors"][name], files).astype(np.int32)
            for name in ("input", "output")
        }
        reference = IntegerReference(g.Graph(nodes), manifest, vectors)
        _check_order(nodes)
        reference.verify()
    except (KeyError, TypeError, IndexError, AttributeError, OverflowError) as error:
        raise FolderError(f"{folder / MANIFEST} does not describe a network: {error!r}") from error
    except FolderError:
        raise
    except ValueError as error:
        raise FolderError(f"{folder / MANIFEST} does not fit its files: {error}") from error
    return reference


def run(graph: g.Graph, x: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """The output of every node.

    Args:
        graph: from integers to a :class:`~learnsched.export.graph.Decode`, without real operations.
        x: real inputs, shape ``(samples, ...)``; or integers, which are taken for the codes of the
            input's quantizer, in the shape that it puts out.

    Returns:
        int32 arrays by node name; float32 for the input and the decoded output. Given codes, of the
        nodes from there on.

    Raises:
        ValueError: the input does not have the network's shape, or codes are out of range.
    """
    x = np.asarray(x)
    coded = np.issubdtype(x.dtype, np.integer)
    first = next(node for node in graph if isinstance(node, g.Quantize if coded else g.Input))
    if x.shape[1:] != first.shape:
        raise ValueError(
            f"the network takes {'codes' if coded else 'inputs'} of shape "
            f"(samples, {', '.join(map(str, first.shape))}), got {x.shape}"
        )
    if isinstance(first, g.Quantize) and not np.isin(x, first.levels.integers).all():
        raise ValueError(
            f"integer inputs must be codes from {first.levels.integers[0]} to "
            f"{first.levels.integers[-1]}; pass real inputs as float32"
        )
    return propagate(graph, {first.name: x.astype(np.int32) if coded else x})


def integers(graph: g.Graph, x: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """As :func:`run`, but the accumulators behind the output stand under its name."""
    found = run(graph, x)
    return {**found, graph.output.name: found[graph.output.inputs[0]]}


def propagate(
    graph: g.Graph,
    known: Mapping[str, NDArray[Any]],
    others: Mapping[type[g.Node], Callable[..., NDArray[Any]]] | None = None,
) -> dict[str, NDArray[Any]]:
    """The output of every node that follows from known ones, without operations on real numbers.

    Args:
        graph: any.
        known: outputs of nodes, by name, all of as many samples.
        others: how to compute what is no operation on integers, too.

    Returns:
        outputs by node name, the known ones among them.
    """
    compute = {**_COMPUTE, **(others or {})}
    count = max(len(values) for values in known.values())
    parts = []
    for start in range(0, max(count, 1), _CHUNK):
        values = {name: array[start : start + _CHUNK] for name, array in known.items()}
        for node in graph:
            ready = type(node) in compute and all(name in values for name in node.inputs)
            if ready and node.name not in values:
                inputs = [values[name] for name in node.inputs]
                values[node.name] = compute[type(node)](node, *inputs)
        parts.append(values)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _reshape(node: g.Reshape, x: NDArray[Any]) -> NDArray[Any]:
    return x.reshape(len(x), *node.shape)


def _quantize(node: g.Quantize, x: NDArray[Any]) -> Codes:
    scaled = x.astype(np.float32) / np.float32(node.scale)
    code = np.searchsorted(np.asarray(node.thresholds, np.float32), scaled.ravel(), side="right")
    code[np.isnan(scaled.ravel())] = 0  # as in PyTorch, where NaN reaches no threshold
    return np.asarray(node.levels.integers, np.int32)[code].reshape(x.shape)


def _product(node: g.Product, x: Codes) -> Codes:
    return convolved(x, node.weight.astype(np.int32), node.window, node.shape)


def convolved(
    x: NDArray[Any], weight: NDArray[Any], window: g.Window | None, shape: tuple[int, ...]
) -> NDArray[Any]:
    """A matrix product or convolution, in the type of both.

    Args:
        x: inputs, shape ``(samples, channels, ...)``.
        weight: output channels first, of a transposed convolution too.
        window: of a convolution; None for a matrix product.
        shape: of the output, without the batch dimension.
    """
    if window is None:
        return x @ weight.T
    if window.transposed:
        x, weight, window = _spread(x, weight, window, shape)
    columns = unfold(x, weight.shape[2:], window, fill=0)
    spatial = columns.shape[2 : 2 + len(weight.shape[2:])]
    inputs, outputs = weight.shape[1], len(weight) // window.groups
    results = []
    for index in range(window.groups):
        part = columns[:, index * inputs : (index + 1) * inputs]
        part = np.moveaxis(part, 1, 1 + len(spatial)).reshape(-1, weight[0].size)
        rows = weight[index * outputs : (index + 1) * outputs].reshape(outputs, -1)
        results.append((part @ rows.T).reshape(len(x), *spatial, outputs))
    return np.ascontiguousarray(np.moveaxis(np.concatenate(results, -1), -1, 1))


def _spread(
    x: Codes, weight: Codes, window: g.Window, shape: tuple[int, ...]
) -> tuple[Codes, Codes, g.Window]:
    """A transposed convolution as a convolution: of inputs with zeros between and around them.

    Args:
        x: its input.
        weight: output channels first.
        window: of the transposed convolution.
        shape: of its output, without the batch dimension.
    """
    stride, dilation, rank = window.stride, window.dilation, len(window.stride)
    sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)]
    spread = np.zeros((*x.shape[:2], *sizes), x.dtype)
    spread[(slice(None), slice(None), *(slice(None, None, s) for s in stride))] = x
    around = [(0, 0), (0, 0)]
    inside = [slice(None), slice(None)]
    dimensions = zip(sizes, shape[1:], weight.shape[2:], dilation, window.padding, strict=True)
    for size, out, k, d, cut in dimensions:
        reach = d * (k - 1)
        before, whole = reach - cut, out + reach
        # What is cut off beyond the zeros is cut off the inputs.
        around.append((max(before, 0), max(whole - before - size, 0)))
        start = max(-before, 0)
        inside.append(slice(start, start + whole))
    flipped = np.flip(weight, axis=tuple(range(2, 2 + rank)))
    plain = g.Window(
        stride=(1,) * rank, padding=(0,) * rank, dilation=dilation, groups=window.groups
    )
    return np.pad(spread, around)[tuple(inside)], flipped, plain


def _threshold(node: g.Threshold, x: Codes, other: Codes | None = None) -> Codes:
    rank = x.ndim - 2
    signed = x * node.sign.astype(np.int32).reshape(-1, *[1] * rank)
    channel = np.arange(x.shape[1]).reshape(-1, *[1] * rank)
    row = 0 if other is None else other - node.row_low
    code = np.zeros(x.shape, dtype=np.int32)
    for step in range(node.thresholds.shape[2]):
        code += signed >= node.thresholds[channel, row, step]
    return np.asarray(node.levels.integers, np.int32)[code]


def _max_pool(node: g.MaxPool, x: Codes) -> Codes:
    windows = unfold(x, node.kernel, node.window, fill=np.iinfo(np.int32).min)
    return windows.max(axis=tuple(range(-len(node.kernel), 0)))


def _sum_pool(node: g.SumPool, x: Codes) -> Codes:
    windows = unfold(x, node.kernel, node.window, fill=0)
    axes = tuple(range(-len(node.kernel), 0))
    return windows.mean(axis=axes) if node.mean else windows.sum(axis=axes, dtype=np.int32)


def _concat(node: g.Concat, *parts: Codes) -> Codes:
    return np.concatenate(parts, axis=1)


def _pad(node: g.Pad, x: Codes) -> Codes:
    return np.pad(x, [(0, 0), (0, 0), *zip(node.before, node.after, strict=True)])


def _repeat(node: g.Repeat, x: Codes) -> Codes:
    for axis, times in enumerate(node.times, start=2):
        x = np.repeat(x, times, axis=axis)
    return x


def _decode(node: g.Decode, x: Codes) -> NDArray[np.float32]:
    shape = (-1, *[1] * (x.ndim - 2))
    real = x.astype(np.float32) * node.scale.reshape(shape)
    return real if node.bias is None else real + node.bias.reshape(shape)


def unfold(x: Codes, kernel: tuple[int, ...], window: g.Window, fill: int) -> Codes:
    """Every window of a convolution or pool.

    Returns:
        shape ``(samples, channels, *places, *kernel)``.

    Example:
        >>> window = g.Window(stride=(1,), padding=(1,), dilation=(1,))
        >>> unfold(np.array([[[1, 2, 3]]]), (3,), window, fill=0).tolist()
        [[[[0, 1, 2], [1, 2, 3], [2, 3, 0]]]]
    """
    rank = len(kernel)
    padding = [(0, 0), (0, 0), *((p, p) for p in window.padding)]
    padded = np.pad(x, padding, constant_values=fill)
    reach = tuple(d * (k - 1) + 1 for k, d in zip(kernel, window.dilation, strict=True))
    axes = tuple(range(2, 2 + rank))
    windows = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=axes)
    places = tuple(slice(None, None, s) for s in window.stride)
    inside = tuple(slice(None, None, d) for d in window.dilation)
    return windows[(slice(None), slice(None), *places, *inside)]


def _check_order(nodes: tuple[g.Node, ...]) -> None:
    known: set[str] = set()
    for index, node in enumerate(nodes):
        if isinstance(node, g.Input) != (index == 0):
            raise FolderError("the first layer must be the input, and no other; export again")
        if node.name in known or not set(node.inputs) <= known:
            raise FolderError(
                f"{node.name} is there twice, or reads what does not come before it; export again"
            )
        known.add(node.name)
    if not nodes or not isinstance(nodes[-1], g.Decode):
        raise FolderError("the last layer must decode the output; export again")


_COMPUTE: Mapping[type[g.Node], Callable[..., NDArray[Any]]] = {
    g.Reshape: _reshape,
    g.Quantize: _quantize,
    g.Product: _product,
    g.Threshold: _threshold,
    g.MaxPool: _max_pool,
    g.SumPool: _sum_pool,
    g.Concat: _concat,
    g.Pad: _pad,
    g.Repeat: _repeat,
    g.Decode: _decode,
}
