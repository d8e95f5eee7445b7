"""``export_qonnx``: QONNX, the exchange format of FINN, hls4ml and Brevitas."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor, nn

from learnsched.export import graph as g
from learnsched.export.emit import Emitter
from learnsched.export.onnx_file import write_onnx_file

_DOMAIN = "qonnx.custom_op.general"
# What qonnx's own transformations are written for.
_OPSET = 16


class _Qonnx:
    """Quant nodes of scale 1, and BipolarQuant for the levels -1 and 1."""

    def __init__(self, batch: int) -> None:
        self.domains = {"": _OPSET, _DOMAIN: 2}
        self.batch: int | str = batch

    def weight(
        self, emitter: Emitter, name: str, weight: g.Integers, levels: g.IntegerLevels
    ) -> str:
        stored = emitter.constant(f"{name}.weight", weight)
        inputs, kind, attributes = self._quant(emitter, levels)
        return emitter.op(
            kind,
            [stored, *inputs],
            f"{name}.weight.quant",
            weight.shape,
            domain=_DOMAIN,
            batched=False,
            **attributes,
        )

    def codes(
        self, emitter: Emitter, name: str, x: str, shape: tuple[int, ...], levels: g.IntegerLevels
    ) -> None:
        inputs, kind, attributes = self._quant(emitter, levels)
        least, most = levels.integers[0], levels.integers[-1]
        full = 2**levels.bits - 1 - (levels.signed and bool(attributes.get("narrow")))
        if kind == "Quant" and most - least != full:
            ends = [emitter.shared(f"whole{i}", float(i)) for i in (least, most)]
            x = emitter.op("Clip", [x, *ends], f"{name}.clipped", shape)
        emitter.op(kind, [x, *inputs], name, shape, domain=_DOMAIN, **attributes)

    def bipolar(
        self, emitter: Emitter, name: str, x: str, shape: tuple[int, ...], levels: g.IntegerLevels
    ) -> None:
        if levels.integers == (-1, 1):
            self.codes(emitter, name, x, shape, levels)
            return
        low, high = levels.integers
        one = emitter.shared("one", 1.0)
        sign = emitter.op("BipolarQuant", [x, one], f"{name}.sign", shape, domain=_DOMAIN)
        half = emitter.constant(f"{name}.half", (high - low) / 2)
        middle = emitter.constant(f"{name}.middle", (high + low) / 2)
        spread = emitter.op("Mul", [sign, half], f"{name}.spread", shape)
        level = emitter.op("Add", [spread, middle], f"{name}.level", shape)
        self.codes(emitter, name, level, shape, levels)

    def _quant(
        self, emitter: Emitter, levels: g.IntegerLevels
    ) -> tuple[list[str], str, dict[str, Any]]:
        """Inputs after the first, operator and attributes."""
        one = emitter.shared("one", 1.0)
        if levels.integers == (-1, 1):
            return [one], "BipolarQuant", {}
        zero = emitter.shared("zero", 0.0)
        bits = emitter.shared(f"bits{levels.bits}", float(levels.bits))
        narrow = levels.signed and levels.integers[0] > -(2 ** (levels.bits - 1))
        attributes = {"signed": int(levels.signed), "narrow": int(narrow), "rounding_mode": "ROUND"}
        return [one, zero, bits], "Quant", attributes


def export_qonnx(model: nn.Module, example_input: Tensor, path: str | os.PathLike[str]) -> None:
    """Write a finalized network as QONNX, whose codes are the same to the bit in its executor.

    Weights and activations are ``Quant`` nodes of scale 1 (ternary: 2 bits, signed, narrow), or
    ``BipolarQuant``: the tensors hold the integers themselves, and a layer's scales and batch norm are
    one factor and offset a channel, chosen so that no sum comes near a rounding boundary. The batch size
    is that of the example, as QONNX's tools expect. The tensor that holds a layer's codes has its name.

    Args:
        model: finished by ``finalize_``; it is left as it is.
        example_input: a batch of inputs; the codes of these are compared with PyTorch's.
        path: the file to write, whole or not at all.

    Raises:
        ImportError: onnx is not installed.
        ExportError: the model is not finalized, a layer cannot be written, or
            codes differ from PyTorch's on the example; the message names the layer and the way out.
        ValueError: the model has no quantized layers.

    Example:
        >>> import tempfile, torch
        >>> from learnsched import finalize_, quantize_, ternary
        >>> net = finalize_(quantize_(nn.Sequential(nn.Linear(8, 4)), ternary()))
        >>> export_qonnx(net, torch.randn(2, 8), tempfile.mkdtemp() + "/net.qonnx")
    """
    write_onnx_file(_Qonnx(len(example_input)), model, example_input, path)
