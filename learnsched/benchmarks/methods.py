"""The methods that are compared, each with its own parameters and their ranges for the search."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from learnsched.benchmarks import spaces
from learnsched.benchmarks.input_scales import scale_inputs_
from learnsched.benchmarks.spaces import Trial
from learnsched.choices import check_choice
from learnsched.choose import LayerConfig
from learnsched.layers import quantized_layers
from learnsched.learned_quantizers import (
    learn_noise_,
    learn_scales_,
    learn_weight_scales_,
    sample_concrete_,
)
from learnsched.learning_rate import warm_cosine
from learnsched.levels import LevelSet, power_of_two
from learnsched.meta.estimators import Rollout
from learnsched.meta.inner import InnerLoop
from learnsched.meta.presets import WARM_UNTIL
from learnsched.meta.rollout import (
    PolicyRollout,
    following_rollout,
    learning_rates,
    step_by_step,
    table_rollout,
)
from learnsched.meta.tasks import BITS
from learnsched.policies import (
    BaseCurve,
    BaseCurves,
    IncrementalQuantization,
    LearnedPolicy,
    MetaNetwork,
)
from learnsched.policies.annealing_grid import PUBLISHED_STD
from learnsched.scales import AbsoluteMean, FanIn, PowerOfTwo
from learnsched.schedule import Policy, RunInfo, plan

TERNARY = ("ternary/2-bit", "ternary/ternary", "ternary/real")
BINARY = ("binary/binary", "binary/2-bit", "binary/real")

# TWN's thresholds are ±0.7 times the mean magnitude Δ/0.7 (equation 6), its levels ± the mean of what
# lies beyond; here by the ratio that the two have for normal weights.
_DELTA = 0.7 * math.sqrt(2 / math.pi)
TWN_LEVEL = math.exp(-_DELTA * _DELTA / 2) / (math.erfc(_DELTA / math.sqrt(2)) / 2) / 2
TWN_LEVELS = LevelSet((-TWN_LEVEL, 0.0, TWN_LEVEL), (-0.7, 0.7), name="twn")

# Of the best methods over all cells, before warm-ups; each also with a learning rate that rises first.
WARM_UP_SUFFIX = ", warm-up"
_WARMED = ("ANA, triangular", "ANA, normal", "ANA, uniform", "STE, moving", "STE, uniform")

_STE = "Bengio et al. 2013 (arXiv:1308.3432)"
_ANA = "Spallanzani et al. 2022 (arXiv:2203.11323), section 4"
_INQ = "Zhou et al. 2017 (arXiv:1702.03044)"
_RQ = "Louizos et al. 2019 (arXiv:1810.01875)"


@dataclass(frozen=True)
class Method:
    """One row of a comparison.

    Attributes:
        name: as in tables.
        noise: shape of the noise of its settings.
        partition: order in which INQ takes weights.
        suggest: from a trial to a policy; None where the policy is learned.
        learned: the learned policy, tuned in nothing.
        hardened: whether accuracy is that of the hard network.
        mode: the forward value while there is noise, see :func:`learnsched.annealed_quantize`.
        levels: from the level sets of a cell to the level sets and scale rules of the method; None
            keeps the cell's, with their customary rules.
        rate: from a policy and the progress of optimizer steps, in [0, 1), to the factor on the
            learning rate; None is the policy's own, or the cosine.
        prepare: called with each quantized network, to make parameters of what is learned by gradient.
        bits: keys of :data:`learnsched.meta.tasks.BITS` that the method applies to.
        source: paper and equation.
    """

    name: str
    noise: str
    partition: str
    suggest: Callable[[Trial], Policy] | None = None
    learned: LearnedPolicy | None = None
    hardened: bool = True
    mode: str = "expectation"
    levels: Callable[[LayerConfig], LayerConfig] | None = None
    rate: Callable[[Any, float], float] | None = None
    prepare: Callable[[nn.Module], object] | None = None
    bits: tuple[str, ...] = tuple(BITS)
    source: str = ""

    def config(self, bits: str) -> LayerConfig:
        """Level sets and scale rules of the method in a cell of these bits."""
        config = LayerConfig(*BITS[bits])
        return config if self.levels is None else self.levels(config)

    def rates(self, policies: Sequence[Policy], run: RunInfo) -> torch.Tensor:
        """Factors on the members' learning rates, step by step.

        Args:
            policies: one a member; none where the policy is learned.
            run: whose horizon and steps an epoch are known.

        Returns:
            shape ``(horizon * steps, members)``, or one column for all.
        """
        if self.learned is not None:
            return learning_rates(self.learned, run)
        columns = {
            policy: learning_rates(policy, run)
            if self.rate is None
            else step_by_step(partial(self.rate, policy), run)
            for policy in set(policies)
        }
        return torch.cat([columns[policy] for policy in policies], dim=1)

    def rollout(self, inner: InnerLoop, policies: list[Policy]) -> Rollout:
        """The settings of every member, whose policies are given.

        Raises:
            ValueError: a policy is neither learned nor a base curve, and follows telemetry.
        """
        if self.learned is not None:
            return PolicyRollout(self.learned, inner.run, inner.population.members)
        for policy in policies:
            if policy.metrics and not isinstance(policy, BaseCurve | BaseCurves):
                raise ValueError(
                    f"{self.name} follows {', '.join(policy.metrics)}, and hand-coded policies are "
                    "compared by their plans, as if nothing happened in training; leave metrics empty"
                )
        plans: dict[Policy, torch.Tensor] = {}
        for policy in policies:
            if policy not in plans:
                plans[policy] = plan(policy, inner.run, hardened=self.hardened).table.float()
        table = torch.stack([plans[policy] for policy in policies], dim=1)
        powers = [
            p.power_in(inner.run) if isinstance(p, BaseCurve | BaseCurves) else 0.0
            for p in policies
        ]
        return (
            following_rollout(table, torch.tensor(powers)) if any(powers) else table_rollout(table)
        )


def rivals() -> list[Method]:
    """The strongest hand-coded methods, one or two of each family: what a quick comparison tunes."""
    plain = [
        Method("straight-through", "normal", "settled", spaces.straight_through, source=_STE),
        Method("ANA, normal", "normal", "settled", spaces.annealing("normal"), source=_ANA),
        Method("ANA, uniform", "uniform", "settled", spaces.annealing("uniform"), source=_ANA),
        Method(
            "INQ, magnitude", "uniform", "magnitude", spaces.incremental("magnitude"), source=_INQ
        ),
        Method("INQ, settled", "uniform", "settled", spaces.incremental("settled"), source=_INQ),
    ]
    return _with_warmed(plain)


def warmed(method: Method) -> Method:
    """The method under the learning rate of the default schedule: does it gain from that alone?"""
    return replace(
        method,
        name=f"{method.name}{WARM_UP_SUFFIX}",
        rate=lambda policy, progress: warm_cosine(progress, WARM_UNTIL),
    )


def _with_warmed(methods: Sequence[Method]) -> list[Method]:
    """The methods, then some of the best with a warm-up."""
    return [*methods, *(warmed(method) for method in methods if method.name in _WARMED)]


def hand_coded(bits: str = "ternary/2-bit") -> list[Method]:
    """Every method of the field that applies to these bits.

    BinaryConnect, TWN, BWN and INQ leave activations real in their papers; here they have the cell's,
    which makes BinaryConnect the BinaryNet of Hubara et al. 2016 where those are binary. With binary
    weights, whose customary scale is the filter's mean magnitude, BWN and XNOR-Net are what the uniform
    straight-through estimator is with ternary ones.

    Args:
        bits: a key of :data:`learnsched.meta.tasks.BITS`.

    Raises:
        ValueError: there are no such bits.

    Example:
        >>> [method.name for method in hand_coded("binary/binary") if "Net" in method.name]
        ['XNOR-Net', 'XNOR-Net, input scales']
    """
    check_choice("bits", bits, BITS)
    methods = (*rivals(), *_with_warmed(_others()))
    return [_within(method, bits) for method in methods if bits in method.bits]


def _within(method: Method, bits: str) -> Method:
    """The method with the space that suits the activations."""
    if method.suggest is None:
        return method
    return replace(method, suggest=spaces.within(method.suggest, bits))


def _others() -> list[Method]:
    uniform, settled = "uniform", "settled"
    inq = ("2 bits", "3 bits", "4 bits", "5 bits")
    return [
        Method("STE, moving", "normal", settled, spaces.straight_through_moving, source=_STE),
        Method(
            "STE, uniform", uniform, settled, spaces.straight_through_uniform, bits=TERNARY,
            source=_STE,
        ),
        Method(
            "BinaryConnect", uniform, settled, spaces.straight_through_uniform,
            levels=lambda c: replace(c, weight_scale=FanIn()), bits=BINARY,
            source="Courbariaux et al. 2015 (arXiv:1511.00363), equation 1",
        ),
        Method(
            "BinaryConnect, stochastic", uniform, settled, spaces.binary_connect, mode="random",
            levels=lambda c: replace(c, weight_scale=FanIn()), bits=BINARY,
            source="Courbariaux et al. 2015 (arXiv:1511.00363), equations 2 and 3",
        ),
        Method(
            "TWN", uniform, settled, spaces.straight_through_uniform,
            levels=lambda c: replace(c, weight=TWN_LEVELS, weight_scale=AbsoluteMean("tensor")),
            bits=TERNARY, source="Li et al. 2016 (arXiv:1605.04711), equations 3 to 6",
        ),
        Method(
            "BWN", uniform, settled, spaces.straight_through_uniform,
            levels=lambda c: replace(c, weight_scale=AbsoluteMean("channel")),
            bits=("binary/2-bit", "binary/real"),
            source="Rastegari et al. 2016 (arXiv:1603.05279), equation 6",
        ),
        Method(
            "XNOR-Net", uniform, settled, spaces.straight_through_uniform,
            levels=lambda c: replace(c, weight_scale=AbsoluteMean("channel")),
            bits=("binary/binary",),
            source="Rastegari et al. 2016 (arXiv:1603.05279), equation 6, without the inputs' scales",
        ),
        Method(
            "XNOR-Net, input scales", uniform, settled, spaces.straight_through_uniform,
            levels=lambda c: replace(c, weight_scale=AbsoluteMean("channel")),
            prepare=scale_inputs_, bits=("binary/binary",),
            source="Rastegari et al. 2016 (arXiv:1603.05279), equations 6 to 11",
        ),
        Method(
            "INQ", uniform, "magnitude", spaces.incremental("magnitude"),
            levels=lambda c: replace(c, weight=power_of_two(2), weight_scale=PowerOfTwo()),
            rate=IncrementalQuantization.restarted, bits=TERNARY, source=f"{_INQ}, equations 1 to 4",
        ),
        Method(
            "INQ, random", uniform, "random", spaces.incremental("random"), source=_INQ,
        ),
        Method(
            "INQ, magnitude, any fractions", uniform, "magnitude",
            spaces.incremental_of("magnitude", inq), source=_INQ,
        ),
        Method(
            "INQ, settled, any fractions", uniform, settled, spaces.incremental_of("settled", inq),
            source=_INQ,
        ),
        Method(
            "INQ, settled, restarts", uniform, settled, spaces.incremental("settled"),
            rate=IncrementalQuantization.restarted, source=_INQ,
        ),
        Method(
            "RPR", uniform, "redraw", spaces.incremental_of("redraw", ("rpr", *inq)),
            source="Cavigelli and Benini 2020 (arXiv:2001.01091)",
        ),
        Method(
            "ANA 2019", uniform, settled, spaces.annealing_2019,
            source="Spallanzani et al. 2019 (arXiv:1905.10452)",
        ),
        *(
            Method(f"ANA, {noise}", noise, settled, spaces.annealing(noise), source=_ANA)
            for noise in ("triangular", "logistic")
        ),
        *(
            Method(
                f"ANA 2022, {noise}", noise, settled, spaces.annealing_2022(noise, "expectation"),
                source=_ANA,
            )
            for noise in PUBLISHED_STD
        ),
        *(
            Method(
                f"ANA 2022, {mode}", uniform, settled, spaces.annealing_2022(uniform, mode), mode=mode,
                source=_ANA,
            )
            for mode in ("mode", "random")
        ),
        Method(
            "RQ", "logistic", settled, spaces.relaxed_quantization("expectation"),
            source=f"{_RQ}, section 2.1",
        ),
        Method(
            "RQ, learned", "logistic", settled, spaces.relaxed_quantization("expectation"),
            prepare=_learn_scales_and_noise, source=f"{_RQ}, section 2.1",
        ),
        Method(
            "RQ, concrete", "logistic", settled, spaces.relaxed_quantization("expectation"),
            prepare=_learn_from_samples, source=f"{_RQ}, algorithm 1",
        ),
        Method(
            "LSQ", uniform, settled, spaces.straight_through_uniform, prepare=_learn_all_scales,
            source="Esser et al. 2020 (arXiv:1902.08153), equation 3",
        ),
        Method(
            "RQ ST", "logistic", settled, spaces.relaxed_quantization("random"), mode="random",
            source=f"{_RQ}, section 2.1",
        ),
        Method(
            "PARQ", uniform, settled, spaces.piecewise_affine,
            source="Jin et al. 2025 (arXiv:2503.15748)",
        ),
    ]  # fmt: skip


def _learn_all_scales(model: nn.Module) -> None:
    if any(layer.activations for layer in quantized_layers(model)):
        learn_scales_(model)
    learn_weight_scales_(model)


def _learn_scales_and_noise(model: nn.Module) -> None:
    _learn_all_scales(model)
    learn_noise_(model)


def _learn_from_samples(model: nn.Module) -> None:
    _learn_scales_and_noise(model)
    sample_concrete_(model)


def parametric(bits: str = "ternary/2-bit") -> Method:
    """A search over all the numbers of the closed form: how far parameters without learning go."""
    method = Method("parametric curve", BaseCurve.noise, BaseCurve.partition, spaces.base_curve)
    return _within(method, bits)


def upper_bound() -> Method:
    """The relaxed network: the practical upper bound, not hard."""
    return Method("relaxed (never hard)", "normal", "settled", spaces.relaxed, hardened=False)


def learned(policy: LearnedPolicy) -> Method:
    """The learned policy; only its learning rate is searched."""
    return Method("learned", policy.noise, policy.partition, learned=policy)


def start_of(policy: LearnedPolicy) -> Method:
    """The hand-coded curve that a learned policy starts from: the same with a fresh network."""
    fresh = LearnedPolicy(
        MetaNetwork(), policy.base, policy.domain, open_loop=not policy.base.metrics
    )
    return replace(learned(fresh), name="learned, before meta-training")
