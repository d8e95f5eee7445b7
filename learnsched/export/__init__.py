"""From a finalized network to files for other runtimes and hardware, proven to the bit.

``export_qonnx``, ``export_onnx`` and ``export_ternary`` write, ``integer_reference`` reads, and
:func:`learnsched.export.inspect.inspect` tells of any of them what a hardware engineer asks first.
"""

from learnsched.export.align import align_
from learnsched.export.errors import ExportError, FolderError
from learnsched.export.onnx import export_onnx
from learnsched.export.qonnx import export_qonnx
from learnsched.export.quantized_input import QuantizedInput
from learnsched.export.reference import IntegerReference, integer_reference
from learnsched.export.ternary import export_ternary

__all__ = [
    "ExportError",
    "FolderError",
    "IntegerReference",
    "QuantizedInput",
    "align_",
    "export_onnx",
    "export_qonnx",
    "export_ternary",
    "integer_reference",
]
