"""From a finished model to a file of ONNX's, in any dialect."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from learnsched.export.check import prove
from learnsched.export.emit import Dialect, Emitter, need_onnx
from learnsched.export.trace import trace
from learnsched.files import write


def write_onnx_file(
    dialect: Dialect, model: nn.Module, example_input: Tensor, path: str | os.PathLike[str]
) -> None:
    """Translate a model, compare its codes with PyTorch's on the example, and write the file whole.

    Raises:
        ImportError: onnx is not installed.
        ExportError: a layer cannot be written, or codes differ.
        ValueError: the model has no quantized layers.
    """
    need_onnx()
    graph = trace(model, example_input)
    prove(model, graph, example_input)
    content: Any = Emitter(dialect).model(graph)
    write(Path(path), lambda temporary: temporary.write_bytes(content.SerializeToString()))
