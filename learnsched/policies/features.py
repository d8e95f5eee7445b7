"""What a meta-network is shown of a run: layers and horizon before it, telemetry along it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from learnsched.policies.base_curve import depths
from learnsched.policies.domain import Domain
from learnsched.schedule import RunInfo, Telemetry

# Raised with every change of the features or outputs; artefacts of another schema are refused.
FEATURE_SCHEMA = 3

_KNOTS = (0.1, 0.3, 0.5, 0.7, 0.9)
# Numbers a layer of each kind.
STATIC = 11 + len(_KNOTS)
FEEDBACK = 3


def static_features(run: RunInfo, progress: float, domain: Domain) -> Tensor:
    """What is known before training, shape ``(layers, features)``, of order 1."""

    def log_within(value: float, seen: tuple[float, float], typical: float) -> float:
        return math.log(min(max(value, seen[0]), seen[1]) / typical)

    count = len(run.layers)
    horizon = log_within(run.horizon, domain.horizon, 15.0)
    typical_steps = math.sqrt(domain.steps[0] * domain.steps[1])
    total = typical_steps if run.steps is None else run.steps
    rows = []
    for index, (layer, depth) in enumerate(zip(run.layers, depths(count), strict=True)):
        fan_in = log_within(layer.fan_in, domain.fan_in, 50.0) if layer.fan_in else 0.0
        weight_levels = domain.shown_weight_levels(layer.weight_levels)
        rows.append(
            [
                depth,
                float(index == 0),
                float(index == count - 1),
                fan_in / 2,
                math.log2(weight_levels) / 2 if layer.weight_levels else 0.0,
                math.log2(layer.activation_levels) / 2 if layer.activation_levels else 0.0,
                log_within(count, domain.depth, 4.0),
                horizon,
                log_within(total, domain.steps, 300.0),
                float(run.fine_tuning),
                progress,
                *(math.tanh((progress - knot) / 0.15) for knot in _KNOTS),
            ]
        )
    return torch.tensor(rows, device="cpu")


def feedback_features(telemetry: Telemetry) -> Tensor:
    """Telemetry, shape ``(..., layers, 3)``, of order 1 whatever the run."""
    error = telemetry.weight_error
    loss = telemetry.loss.clamp(min=1e-4).log().clamp(-4, 1)
    trend = (4 * telemetry.loss_trend.clamp(min=1e-4).log()).clamp(-2, 2)
    columns = [loss.unsqueeze(-1).expand_as(error), trend.unsqueeze(-1).expand_as(error), error]
    return torch.nan_to_num(torch.stack(columns, dim=-1))
