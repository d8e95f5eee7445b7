"""Running exported files in ONNX Runtime and in QONNX's executor, with every layer's codes."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray


def run_onnx(
    path: str | os.PathLike[str], x: NDArray[Any], layers: bool = False
) -> dict[str, NDArray[Any]]:
    """Run an exported ONNX file in ONNX Runtime on the CPU.

    Args:
        path: written by ``export_onnx``.
        x: inputs, shape ``(samples, ...)``.
        layers: whether to put out all inner float32 tensors as well, which keeps the runtime from
            fusing what lies between them.

    Returns:
        tensors by name.
    """
    import onnx
    import onnxruntime

    model = onnx.load(path)
    if layers:
        kinds = (onnx.TensorProto.FLOAT,)
        model.graph.output.extend(
            info for info in model.graph.value_info if info.type.tensor_type.elem_type in kinds
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"input": np.asarray(x, np.float32)}), strict=True))


def run_qonnx(path: str | os.PathLike[str], x: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Run an exported QONNX file in QONNX's own executor, batch by batch of the file's size.

    Args:
        path: written by ``export_qonnx``.
        x: inputs, shape ``(samples, ...)``; the samples must fill batches.

    Returns:
        every tensor with a batch dimension, by name.

    Raises:
        ValueError: the samples do not fill whole batches.
    """
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx

    model = ModelWrapper(str(path))
    batch = model.get_tensor_shape("input")[0]
    if not len(x) or len(x) % batch:
        raise ValueError(f"{len(x)} samples do not fill batches of {batch}, as the file takes")
    outputs = [name for node in model.graph.node for name in node.output]
    names = [name for name in outputs if not name.endswith(".weight.quant")]
    parts = []
    for start in range(0, len(x), batch):
        given = {"input": np.asarray(x[start : start + batch], np.float32)}
        context = execute_onnx(model, given, return_full_exec_context=True)
        parts.append({name: context[name] for name in names})
    return {name: np.concatenate([part[name] for part in parts]) for name in names}
