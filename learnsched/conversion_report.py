"""What is quantized in a model, and what is not."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from learnsched.activation_quantizer import ActivationQuantizer
from learnsched.modules import KNOWN, QUANTIZED_LAYERS, REAL, check_module, matrices
from learnsched.tables import aligned


@dataclass(frozen=True)
class Report:
    """What ``quantize_`` did with each module that computes; ``repr`` prints it as a table.

    Example:
        >>> import learnsched as ls
        >>> ls.report(ls.quantize_(nn.Sequential(nn.Linear(8, 4)), ls.ternary())).rows[0][0]
        '0'
    """

    rows: tuple[tuple[str, str, str, str], ...]

    def __repr__(self) -> str:
        return aligned([("module", "kind", "levels", "scale"), *self.rows])


def report(model: nn.Module) -> Report:
    """What is quantized in a model, and what is not: every module with a matrix or kernel of its own,
    and every activation function that is a module of ``torch.nn``.

    Raises:
        TypeError: it is no module.

    Example:
        >>> from learnsched import quantize_, ternary
        >>> net = quantize_(nn.Sequential(nn.Linear(8, 4), nn.ReLU()), ternary())
        >>> report(net)
        module  kind    levels   scale
        0       Linear  ternary  AbsoluteMean
        1       ReLU    real
    """
    check_module(model)
    rows = []
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in inside:
            continue
        if isinstance(module, QUANTIZED_LAYERS):
            quantizer = module.weight_quantizer
            kind = type(module).__name__.removeprefix("Quantized")
            rows.append((name, kind, quantizer.levels.name, type(quantizer.rule).__name__))
        elif isinstance(module, ActivationQuantizer):
            inside.update(module.modules())
            rows.append((name, "activation", module.levels.name, f"{module.scale.item():.4g}"))
        elif isinstance(module, (*KNOWN, *REAL)) or _computes(module):
            rows.append((name, type(module).__name__, "real", ""))
    return Report(tuple(rows))


def _computes(module: nn.Module) -> bool:
    """Whether a module that ``quantize_`` does not know is one that a reader would look for."""
    activation = type(module).__module__ == nn.Tanh.__module__
    return activation or bool(matrices(module))
