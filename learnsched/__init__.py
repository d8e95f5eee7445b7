"""Learned schedules for training 1- and 2-bit networks.

Convert a model with :func:`quantize_`, train it under a :class:`QuantizationScheduler` with a policy
such as ``load_pretrained("default")``, and finish it with :func:`finalize_`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from learnsched import policies
from learnsched.activation_calls import activations_to_modules_
from learnsched.annealed import annealed_quantize, level_probabilities
from learnsched.attention import attention_to_linears_
from learnsched.batch_norm import reestimate_batch_norm_
from learnsched.calibration import calibrate_
from learnsched.choose import LayerConfig
from learnsched.conversion_report import report
from learnsched.convert import quantize_
from learnsched.finalize import finalize_, integer_weights, remove_quantizers_
from learnsched.kernels import show_config
from learnsched.learned_quantizers import (
    learn_noise_,
    learn_scales_,
    learn_weight_scales_,
    sample_concrete_,
)
from learnsched.levels import LevelSet, binary, power_of_two, signed, ternary, unsigned
from learnsched.micro_batches import quantize_once
from learnsched.plotting import plot_comparison, plot_schedule
from learnsched.pretrained import (
    ArtefactError,
    list_pretrained,
    load_pretrained,
    pretrained_card,
    save_artefact,
)
from learnsched.scales import AbsoluteMean, Fixed, LeastSquares, Maximum, PowerOfTwo
from learnsched.schedule import LayerInfo, RunInfo, Schedule, Setting, Telemetry, plan
from learnsched.scheduler import QuantizationScheduler

if TYPE_CHECKING:
    from learnsched.export import export_onnx, export_qonnx, export_ternary, integer_reference

__version__ = "0.1.0"

_EXPORTS = ("export_onnx", "export_qonnx", "export_ternary", "integer_reference")

__all__ = [
    "AbsoluteMean",
    "ArtefactError",
    "Fixed",
    "LayerConfig",
    "LayerInfo",
    "LeastSquares",
    "LevelSet",
    "Maximum",
    "PowerOfTwo",
    "QuantizationScheduler",
    "RunInfo",
    "Schedule",
    "Setting",
    "Telemetry",
    "activations_to_modules_",
    "annealed_quantize",
    "attention_to_linears_",
    "binary",
    "calibrate_",
    "export_onnx",
    "export_qonnx",
    "export_ternary",
    "finalize_",
    "integer_reference",
    "integer_weights",
    "learn_noise_",
    "learn_scales_",
    "learn_weight_scales_",
    "level_probabilities",
    "list_pretrained",
    "load_pretrained",
    "plan",
    "plot_comparison",
    "plot_schedule",
    "policies",
    "power_of_two",
    "pretrained_card",
    "quantize_",
    "quantize_once",
    "reestimate_batch_norm_",
    "remove_quantizers_",
    "report",
    "sample_concrete_",
    "save_artefact",
    "show_config",
    "signed",
    "ternary",
    "unsigned",
]


def __getattr__(name: str) -> Any:
    """Load :mod:`learnsched.export` when one of its names is asked for."""
    if name in _EXPORTS:
        from learnsched import export

        return getattr(export, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
