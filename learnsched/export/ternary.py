"""``export_ternary`` and ``integer_reference``: a folder for accelerators, and what reads it back.

The folder holds ``manifest.json``, which describes the layers in order, and one file for each array:
ternary and binary weights at five trits a byte, thresholds and test vectors as little-endian int32. The
manifest states the size and SHA-256 of every file, and its own.

What it describes is integer arithmetic only: convolutions of trits, comparisons with thresholds, pools.
At the two ends stand the real scale that turns inputs into codes and those that turn the last
accumulators into outputs.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from learnsched.export import graph as g
from learnsched.export.check import integers, prove
from learnsched.export.errors import ExportError, FolderError
from learnsched.export.reference import run
from learnsched.export.trace import trace
from learnsched.export.trits import pack, unpack

FORMAT = "learnsched-ternary"
VERSION = 1
MANIFEST = "manifest.json"
_VECTORS = 8
_LARGEST_MANIFEST = 1 << 24

_KINDS: dict[str, type[g.Node]] = {
    "input": g.Input,
    "reshape": g.Reshape,
    "quantize": g.Quantize,
    "product": g.Product,
    "threshold": g.Threshold,
    "max_pool": g.MaxPool,
    "sum_pool": g.SumPool,
    "decode": g.Decode,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}


def export_ternary(model: nn.Module, example_input: Tensor, folder: str | os.PathLike[str]) -> None:
    """Write a finalized network for a ternary accelerator: trits, integer thresholds, test vectors.

    Batch norm, activation and residual addition become integer thresholds for each channel, exactly as
    PyTorch decides, negative γ included. The network's input must be quantized: put
    :class:`learnsched.export.QuantizedInput` in front of it.

    Args:
        model: finished by ``finalize_``; it is left as it is.
        example_input: a batch of inputs; the codes of these are compared with PyTorch's, and the first
            eight become test vectors.
        folder: a new folder, or one with an export of this format, which is replaced; written whole
            or not at all.

    Raises:
        ExportError: the model is not finalized, a layer computes with real numbers or has other than
            ternary or binary weights, or codes differ from PyTorch's on the example; the message names
            the layer and the way out.
        FileExistsError: the folder holds something else.
        ValueError: the model has no quantized layers.

    Example:
        >>> import tempfile, torch
        >>> from learnsched import finalize_, quantize_, ternary
        >>> from learnsched.export import QuantizedInput
        >>> net = nn.Sequential(QuantizedInput(0.05), nn.Linear(8, 4))
        >>> net = finalize_(quantize_(net, ternary()))
        >>> folder = Path(tempfile.mkdtemp()) / "net"
        >>> export_ternary(net, torch.randn(20, 8), folder)
        >>> sorted(file.name for file in folder.iterdir())
        ['1.weight.trits', 'input.vectors.i32', 'manifest.json', 'output.vectors.i32']
    """
    graph = trace(model, example_input)
    _check_integer(graph)
    prove(model, graph, example_input)
    _replaceable(Path(folder))
    found = integers(graph, example_input[:_VECTORS].detach().cpu().numpy())
    coded = next(node for node in graph if isinstance(node, g.Quantize))
    vectors = {"input": found[coded.name], "output": found[graph.output.name]}
    _write(Path(folder), graph, vectors)


class IntegerReference:
    """Integer-only inference of a network that ``export_ternary`` wrote; made by ``integer_reference``.

    Attributes:
        graph: the layers.
        manifest: the manifest, as read.
        vectors: codes of the inputs and accumulators of the outputs that the folder holds.
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
        wrong = (self.layers(self.vectors["input"])["output"] != self.vectors["output"]).sum()
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
        >>> from learnsched import finalize_, quantize_, ternary
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
    manifest = _read_manifest(folder)
    files = _read_files(folder, manifest)
    try:
        nodes = tuple(_node(entry, files) for entry in manifest["layers"])
        vectors = {
            name: _array(manifest["vectors"][name], files).astype(np.int32)
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


def _check_integer(graph: g.Graph) -> None:
    for node in graph:
        if isinstance(node, g.RealProduct):
            raise ExportError(
                f"{node.name} cannot be written as integers: {node.reason}; export_qonnx and "
                "export_onnx can hold it as it is"
            )
        if isinstance(node, g.Product) and not set(node.levels.integers) <= {-1, 0, 1}:
            raise ExportError(
                f"{node.name} has {node.levels.name} weights, which are no trits; quantize it with "
                "ternary() or binary(), or use export_qonnx"
            )
        if isinstance(node, g.REAL):
            raise ExportError(
                f"{node.name} computes with real numbers; put a quantized activation between it and the "
                "layer before, or use export_qonnx or export_onnx"
            )
        if isinstance(node, g.SumPool | g.MaxPool | g.Reshape) and isinstance(
            graph[node.inputs[0]], g.Decode
        ):
            raise ExportError(f"{node.name} comes after the last quantized layer; leave it out")
    if not isinstance(graph.output, g.Decode) or sum(isinstance(n, g.Quantize) for n in graph) != 1:
        raise ExportError(
            "the network must have one quantized input and an integer output; put "
            "learnsched.export.QuantizedInput in front of it, or use export_qonnx or export_onnx"
        )


# Writing.


class _Files:
    """The arrays of a folder, as they are collected."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}

    def add(self, name: str, array: NDArray[Any], kind: str) -> dict[str, Any]:
        """Keep an array; what the manifest says of it."""
        array = np.asarray(array)
        file = f"{name.replace('#', '-')}.{kind}"
        while file in self.content:
            file = f"_{file}"
        content = pack(array) if kind == "trits" else array.astype("<i4").tobytes()
        self.content[file] = content
        return {"file": file, "kind": kind, "shape": list(array.shape)}


def _write(folder: Path, graph: g.Graph, vectors: dict[str, NDArray[Any]]) -> None:
    files = _Files()
    layers = [_entry(node, files) for node in graph]
    described = {n: files.add(f"{n}.vectors", array, "i32") for n, array in vectors.items()}
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "layers": layers,
        "vectors": described,
        "files": {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in files.content.items()
        },
    }
    manifest["sha256"] = _digest(manifest)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for name, content in files.content.items():
            (temporary / name).write_bytes(content)
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        temporary.chmod(0o755)
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
            os.replace(folder, old)
            os.replace(temporary, folder)
            shutil.rmtree(old)
        else:
            os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _replaceable(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; give the name of a new folder")
    if any(folder.iterdir()):
        try:
            _read_manifest(folder)
        except (FolderError, FileNotFoundError):
            raise FileExistsError(
                f"{folder} holds something other than an export; give the name of a new folder"
            ) from None


def _entry(node: g.Node, files: _Files) -> dict[str, Any]:
    """What the manifest says of a node."""
    entry: dict[str, Any] = {
        "kind": _NAMES[type(node)],
        "name": node.name,
        "inputs": list(node.inputs),
        "shape": list(node.shape),
    }
    if isinstance(node, g.Quantize):
        entry |= {
            "levels": _levels_entry(node.levels),
            "thresholds": list(node.thresholds),
            "scale": node.scale,
        }
    elif isinstance(node, g.Product):
        entry |= {
            "weight": files.add(f"{node.name}.weight", node.weight, "trits"),
            "levels": _levels_entry(node.levels),
            "window": None if node.window is None else _window_entry(node.window),
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
            "levels": _levels_entry(node.levels),
        }
    elif isinstance(node, g.MaxPool | g.SumPool):
        entry |= {"kernel": list(node.kernel), "window": _window_entry(node.window)}
    elif isinstance(node, g.Decode):
        entry |= {
            "scale": node.scale.astype(float).tolist(),
            "bias": None if node.bias is None else node.bias.astype(float).tolist(),
        }
    return entry


def _levels_entry(levels: g.IntegerLevels) -> dict[str, Any]:
    return {"integers": list(levels.integers), "unit": levels.unit, "name": levels.name}


def _window_entry(window: g.Window) -> dict[str, Any]:
    return {
        "stride": list(window.stride),
        "padding": list(window.padding),
        "dilation": list(window.dilation),
        "groups": window.groups,
    }


# Reading.


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; give a folder that export_ternary wrote")
    if path.stat().st_size > _LARGEST_MANIFEST:
        raise FolderError(f"{path} has {path.stat().st_size} bytes, too many for a manifest")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FolderError(f"{path} is not whole JSON ({error}); export again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise FolderError(f"{path} is of another format; expected {FORMAT!r}")
    if manifest.get("version") != VERSION:
        raise FolderError(
            f"{path} is of version {manifest.get('version')!r}, this learnsched reads {VERSION}; export "
            "again, or install the learnsched that wrote it"
        )
    if manifest.get("sha256") != _digest(manifest):
        raise FolderError(f"{path} was altered: its SHA-256 is not the one in it; export again")
    return manifest


def _digest(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest without the entry that holds it."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _read_files(folder: Path, manifest: dict[str, Any]) -> dict[str, bytes]:
    """Every file that the manifest lists, each as it says, and no other."""
    listed = manifest.get("files")
    if not isinstance(listed, dict):
        raise FolderError(f"{folder / MANIFEST} lists no files")
    result = {}
    for name, stated in listed.items():
        path = folder / name
        if Path(name).name != name or "\\" in name or name in ("", ".", "..", MANIFEST):
            raise FolderError(f"{name!r} leads out of the folder; file names must be plain")
        if path.is_symlink() or not path.is_file():
            raise FolderError(f"{name} is missing, or not a plain file; copy the whole folder")
        content = path.read_bytes()
        if not isinstance(stated, dict) or len(content) != stated.get("bytes"):
            raise FolderError(
                f"{name} has {len(content)} bytes, other than the manifest says; truncated?"
            )
        if hashlib.sha256(content).hexdigest() != stated.get("sha256"):
            raise FolderError(f"{name} was altered: its SHA-256 is not the manifest's")
        result[name] = content
    extra = sorted(p.name for p in folder.iterdir() if p.name not in {*listed, MANIFEST})
    if extra:
        raise FolderError(f"{extra} are not listed in the manifest; remove them")
    return result


def _array(entry: dict[str, Any], files: dict[str, bytes]) -> NDArray[np.int64]:
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


def _node(entry: dict[str, Any], files: dict[str, bytes]) -> g.Node:
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
    if "kernel" in entry:
        arguments["kernel"] = tuple(map(int, entry["kernel"]))
    if entry["kind"] == "quantize":
        arguments |= {"thresholds": tuple(entry["thresholds"]), "scale": float(entry["scale"])}
    elif entry["kind"] == "product":
        arguments["weight"] = _array(entry["weight"], files)
    elif entry["kind"] == "threshold":
        arguments |= {
            "thresholds": _array(entry["thresholds"], files),
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
    )


def _check_order(nodes: tuple[g.Node, ...]) -> None:
    known: set[str] = set()
    for index, node in enumerate(nodes):
        if isinstance(node, g.Input) != (index == 0):
            raise FolderError("the first layer must be the input, and no other")
        if node.name in known or not set(node.inputs) <= known:
            raise FolderError(f"{node.name} is there twice, or reads what does not come before it")
        known.add(node.name)
    if not nodes or not isinstance(nodes[-1], g.Decode):
        raise FolderError("the last layer must decode the output")
