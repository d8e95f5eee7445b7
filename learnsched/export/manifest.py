"""Layers as entries of a JSON manifest and arrays as bytes, both ways."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from learnsched.export import graph as g
from learnsched.export.errors import FolderError
from learnsched.export.trits import pack, unpack

_KINDS: dict[str, type[g.Node]] = {
    "input": g.Input,
    "reshape": g.Reshape,
    "quantize": g.Quantize,
    "product": g.Product,
    "threshold": g.Threshold,
    "max_pool": g.MaxPool,
    "sum_pool": g.SumPool,
    "concat": g.Concat,
    "pad": g.Pad,
    "repeat": g.Repeat,
    "decode": g.Decode,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}


class Files:
    """The arrays of a folder, as they are collected.

    Attributes:
        content: bytes by file name.
    """

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}

    def add(self, name: str, array: NDArray[Any], kind: str) -> dict[str, Any]:
        """Keep an array; what the manifest says of it."""
        array = np.asarray(array)
        file = f"{re.sub('[^A-Za-z0-9_.-]', '-', name)}.{kind}"
        while file in self.content:
            file = f"_{file}"
        content = pack(array) if kind == "trits" else array.astype("<i4").tobytes()
        self.content[file] = content
        return {"file": file, "kind": kind, "shape": list(array.shape)}


def write_entry(node: g.Node, files: Files) -> dict[str, Any]:
    """What the manifest says of a node, whose arrays are added to ``files``."""
    entry: dict[str, Any] = {
        "kind": _NAMES[type(node)],
        "name": node.name,
        "inputs": list(node.inputs),
        "shape": list(node.shape),
    }
    if isinstance(node, g.Quantize):
        entry |= {
            "levels": asdict(node.levels),
            "thresholds": list(node.thresholds),
            "scale": node.scale,
        }
    elif isinstance(node, g.Product):
        entry |= {
            "weight": files.add(f"{node.name}.weight", node.weight, "trits"),
            "levels": asdict(node.levels),
            "window": None if node.window is None else asdict(node.window),
            "low": node.low.tolist(),
            "high": node.high.tolist(),
        }
    elif isinstance(node, g.Threshold):
        entry |= {
            "thresholds": files.add(f"{node.name}.thresholds", node.thresholds, "i32"),
            "sign": node.sign.tolist(),
            "low": node.low.tolist(),
            "high": node.high.tolist(),
            "row_low": node.row_low,
            "levels": asdict(node.levels),
        }
    elif isinstance(node, g.MaxPool | g.SumPool):
        entry |= {"kernel": list(node.kernel), "window": asdict(node.window)}
    elif isinstance(node, g.Pad):
        entry |= {"before": list(node.before), "after": list(node.after)}
    elif isinstance(node, g.Repeat):
        entry |= {"times": list(node.times)}
    elif isinstance(node, g.Decode):
        entry |= {
            "scale": node.scale.astype(float).tolist(),
            "bias": None if node.bias is None else node.bias.astype(float).tolist(),
        }
    return entry


def read_array(entry: dict[str, Any], files: Mapping[str, bytes]) -> NDArray[np.int64]:
    """The array that an entry of the manifest describes.

    Raises:
        FolderError: the file is not listed, or does not hold an array of that shape.
    """
    shape = tuple(entry["shape"])
    if any(not isinstance(n, int) or n < 1 for n in shape):
        raise FolderError(f"{entry['file']} has the shape {shape}")
    if entry["file"] not in files:
        raise FolderError(f"{entry['file']} is not among the manifest's files")
    content, count = files[entry["file"]], math.prod(shape)
    if entry["kind"] == "trits":
        return unpack(content, count).reshape(shape)
    if entry["kind"] != "i32" or len(content) != 4 * count:
        raise FolderError(
            f"{entry['file']} does not hold {count} numbers of kind {entry['kind']!r}"
        )
    return np.frombuffer(content, dtype="<i4").astype(np.int64).reshape(shape)


def read_entry(entry: dict[str, Any], files: Mapping[str, bytes]) -> g.Node:
    """The node that an entry of the manifest describes.

    Raises:
        FolderError: its kind is not known, or its arrays are not there.
    """
    if entry["kind"] not in _KINDS:
        raise FolderError(f"{entry['name']} is of the unknown kind {entry['kind']!r}")
    kind: Callable[..., g.Node] = _KINDS[entry["kind"]]
    arguments: dict[str, Any] = {
        "name": str(entry["name"]),
        "inputs": tuple(map(str, entry["inputs"])),
        "shape": tuple(map(int, entry["shape"])),
    }
    for key in ("low", "high", "sign"):
        if key in entry:
            arguments[key] = np.array(entry[key], dtype=np.int64)
    if "levels" in entry:
        levels = entry["levels"]
        integers_ = tuple(map(int, levels["integers"]))
        arguments["levels"] = g.IntegerLevels(integers_, float(levels["unit"]), str(levels["name"]))
    if "window" in entry:
        arguments["window"] = None if entry["window"] is None else _window(entry["window"])
    for key in ("kernel", "before", "after", "times"):
        if key in entry:
            arguments[key] = tuple(map(int, entry[key]))
    if entry["kind"] == "quantize":
        arguments |= {"thresholds": tuple(entry["thresholds"]), "scale": float(entry["scale"])}
    elif entry["kind"] == "product":
        arguments["weight"] = read_array(entry["weight"], files)
    elif entry["kind"] == "threshold":
        arguments |= {
            "thresholds": read_array(entry["thresholds"], files),
            "row_low": int(entry["row_low"]),
            "slopes": None,
        }
    elif entry["kind"] == "decode":
        bias = entry["bias"]
        arguments |= {
            "scale": np.array(entry["scale"], dtype=np.float32),
            "bias": None if bias is None else np.array(bias, dtype=np.float32),
        }
    return kind(**arguments)


def _window(entry: dict[str, Any]) -> g.Window:
    return g.Window(
        stride=tuple(map(int, entry["stride"])),
        padding=tuple(map(int, entry["padding"])),
        dilation=tuple(map(int, entry["dilation"])),
        groups=int(entry["groups"]),
        transposed=bool(entry["transposed"]),
    )
