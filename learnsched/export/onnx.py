"""``export_onnx``: plain ONNX, codes in 2-bit types where the opset has them."""

from __future__ import annotations

import os

import numpy as np
from torch import Tensor, nn

from learnsched.export import graph as g
from learnsched.export.emit import Emitter
from learnsched.export.errors import ExportError
from learnsched.export.onnx_file import write_onnx_file

_NARROW, _WIDE = 25, 21


class _Plain:
    """QuantizeLinear and DequantizeLinear with scale 1 and zero point 0."""

    batch: int | str = "batch"

    def __init__(self, opset: int) -> None:
        self.domains = {"": opset}
        self._widths = (2, 4, 8) if opset >= _NARROW else (8,)

    def weight(
        self, emitter: Emitter, name: str, weight: g.Integers, levels: g.IntegerLevels
    ) -> str:
        kind = self._type(emitter, name, levels)[0]
        stored = emitter.constant(f"{name}.weight", weight, kind)
        one, zero = self._parameters(emitter, kind)
        inputs = [stored, one, zero]
        return emitter.op(
            "DequantizeLinear", inputs, f"{name}.weight.real", weight.shape, batched=False
        )

    def codes(
        self, emitter: Emitter, name: str, x: str, shape: tuple[int, ...], levels: g.IntegerLevels
    ) -> None:
        kind, low, high = self._type(emitter, name, levels)
        # QuantizeLinear clips to the ends of its type. Not Clip for other ends: ONNX Runtime fuses that
        # with QuantizeLinear, and then fails to load 2-bit types.
        for operator, limit, end in (
            ("Max", low, levels.integers[0]),
            ("Min", high, levels.integers[-1]),
        ):
            if limit != end:
                bound = emitter.shared(f"whole{end}", float(end))
                x = emitter.op(operator, [x, bound], f"{name}.{operator.lower()}", shape)
        one, zero = self._parameters(emitter, kind)
        stored = emitter.op("QuantizeLinear", [x, one, zero], f"{name}.stored", shape, dtype=kind)
        emitter.op("DequantizeLinear", [stored, one, zero], name, shape)

    def bipolar(
        self, emitter: Emitter, name: str, x: str, shape: tuple[int, ...], levels: g.IntegerLevels
    ) -> None:
        low, high = levels.integers
        truth, real = emitter.onnx.TensorProto.BOOL, emitter.onnx.TensorProto.FLOAT
        zero = emitter.shared("whole0", 0.0)
        upper = emitter.op("GreaterOrEqual", [x, zero], f"{name}.reached", shape, dtype=truth)
        code = emitter.op("Cast", [upper], f"{name}.code", shape, to=real)
        gap = emitter.shared(f"whole{high - low}", float(high - low))
        risen = emitter.op("Mul", [code, gap], f"{name}.risen", shape)
        least = emitter.shared(f"whole{low}", float(low))
        level = emitter.op("Add", [risen, least], f"{name}.level", shape)
        self.codes(emitter, name, level, shape, levels)

    def _type(self, emitter: Emitter, name: str, levels: g.IntegerLevels) -> tuple[int, int, int]:
        """The narrowest type that holds the levels, and its range."""
        width = next((w for w in self._widths if w >= levels.bits), None)
        if width is None:
            raise ExportError(
                f"{name}: its levels need {levels.bits} bits; ONNX's types end at 8 here"
            )
        kind = getattr(emitter.onnx.TensorProto, f"{'' if levels.signed else 'U'}INT{width}")
        low = -(2 ** (width - 1)) if levels.signed else 0
        return kind, low, low + 2**width - 1

    def _parameters(self, emitter: Emitter, kind: int) -> tuple[str, str]:
        type_name = emitter.onnx.TensorProto.DataType.Name(kind).lower()
        return emitter.shared("one", 1.0), emitter.shared(f"zero.{type_name}", np.array(0), kind)


def export_onnx(
    model: nn.Module,
    example_input: Tensor,
    path: str | os.PathLike[str],
    *,
    opset: int = _NARROW,
) -> None:
    """Write a finalized network as plain ONNX, whose codes are the same to the bit in every runtime.

    Weights and activations are stored in the narrowest of ONNX's types, ``INT2`` and ``UINT2`` at
    opset 25, and computed with as float32 integers, whose sums are exact. Batch norm and activation
    become one factor and offset a channel, chosen so that no sum comes near a rounding boundary. The
    batch size is free. The tensor that holds a layer's codes has the layer's name.

    Args:
        model: finished by ``finalize_``; it is left as it is.
        example_input: a batch of inputs; the codes of these are compared with PyTorch's.
        path: the file to write, whole or not at all.
        opset: 25, or 21 for runtimes without 2-bit types: ``INT8`` and ``UINT8`` then.

    Raises:
        ImportError: onnx is not installed.
        ExportError: the model is not finalized, a layer cannot be written, or
            codes differ from PyTorch's on the example; the message names the layer and the way out.
        ValueError: ``opset`` is another number, or the model has no quantized layers.

    Example:
        >>> import pathlib, tempfile, torch
        >>> from learnsched import finalize_, quantize_, ternary
        >>> net = finalize_(quantize_(nn.Sequential(nn.Linear(8, 4)), ternary()))
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "net.onnx"
        >>> export_onnx(net, torch.randn(2, 8), path)
        >>> path.stat().st_size < 2000
        True
    """
    if opset not in (_NARROW, _WIDE):
        raise ValueError(
            f"opset must be {_NARROW} (2-bit types) or {_WIDE} (8-bit types), got {opset}"
        )
    write_onnx_file(_Plain(opset), model, example_input, path)
