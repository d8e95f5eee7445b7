"""Named configurations of meta-training."""

from __future__ import annotations

from dataclasses import dataclass, replace

from learnsched.meta.estimators import Estimator
from learnsched.meta.evolution import EvolutionStrategies
from learnsched.meta.guarded import Guarded
from learnsched.meta.hybrid import Hybrid
from learnsched.meta.mix import Mix
from learnsched.meta.tasks import BITS, Task, task_of
from learnsched.meta.trainer import TrainerConfig
from learnsched.meta.unrolled import Unrolled
from learnsched.policies import BaseCurve, BaseCurves, Case, Domain
from learnsched.policies.domain import REAL_LEVELS


@dataclass(frozen=True)
class Preset:
    """What a name on the command line stands for.

    Attributes:
        steps: outer steps unless told otherwise.
        trainer: mix, validation tasks and outer optimizer.
        base: the hand-coded curve that training starts from.
        estimator: what gives meta-gradients.

    Example:
        >>> PRESETS["quick"].steps, PRESETS["quick"].domain.horizon
        (12, (6, 8))
    """

    steps: int
    trainer: TrainerConfig
    base: BaseCurves
    estimator: Estimator

    @property
    def domain(self) -> Domain:
        """The range of runs that the mix can draw; of fan-ins, that of all presets' networks."""
        mix = self.trainer.mix
        sets = [BITS[name] for name, _ in mix.bits]
        weights = [len(weight.values) for weight, _ in sets]
        levels = [REAL_LEVELS if a is None else len(a.values) for _, a in sets]
        return Domain(
            horizon=(min(mix.horizons), max(mix.horizons)),
            steps=mix.run_steps,
            depth=(
                min(d for a in mix.architectures for d in a[3]),
                max(d for a in mix.architectures for d in a[3]),
            ),
            fan_in=(5, 320),
            activation_levels=(min(levels), max(levels)),
            weight_levels=(min(weights), max(weights)),
        )


# Where meta-training starts, for each pair of level sets and regime: what `python -m
# learnsched.benchmarks.curve_search` found, rounded, and towards the middle where tasks disagree.
# That forward noise follows the loss came later: it gains on runs of 768 steps and more, not on those
# of 384 and fewer (`python -m learnsched.benchmarks.follow_loss`).
_TWO_BIT = BaseCurve(
    weight_forward_std=0.45,
    activation_forward_std=0.4,
    weight_hard_from=0.65,
    activation_hard_from=0.8,
    power=0.9,
    weight_backward_std=2.8,
    weight_backward_end=0.4,
    activation_backward_std=0.65,
    activation_backward_end=0.52,
    freeze_from=0.55,
    loss_power=1.0,
    loss_from=540.0,
)
# MLPs on tables of numbers keep wide backward noise of the weights to the end: where classes are a
# formula without noise that is worth several points (`curve_search --vectors`).
_TWO_BIT_TABLES = BaseCurve(
    weight_forward_std=0.6,
    activation_forward_std=0.6,
    weight_hard_from=1.0,
    activation_hard_from=0.43,
    power=1.5,
    weight_backward_std=4.0,
    weight_backward_end=4.0,
    activation_backward_std=0.38,
    activation_backward_end=1.2,
    freeze_from=0.62,
    hard_tilt=-0.3,
    weight_backward_tilt=-1.2,
    activation_backward_tilt=-0.6,
)
# Hard problems want narrow backward noise of signed activations, easy ones wide: something in between,
# for all but signals under 1-d convolutions, with which the first searches were made.
_TERNARY = BaseCurve(
    weight_forward_std=0.55,
    activation_forward_std=0.27,
    weight_hard_from=1.0,
    activation_hard_from=1.0,
    power=2.5,
    weight_backward_std=4.0,
    weight_backward_end=0.45,
    activation_backward_std=0.6,
    activation_backward_end=0.14,
    freeze_from=0.95,
    weight_backward_tilt=-1.2,
    activation_backward_tilt=1.0,
)
_TERNARY_SIGNALS = BaseCurve(
    weight_forward_std=0.6,
    activation_forward_std=0.19,
    weight_hard_from=0.93,
    activation_hard_from=1.0,
    power=2.5,
    weight_backward_std=4.0,
    weight_backward_end=0.67,
    activation_backward_std=0.34,
    activation_backward_end=0.1,
    freeze_from=0.97,
    hard_tilt=0.3,
    weight_backward_tilt=-1.2,
    activation_backward_tilt=1.17,
)
_TERNARY_SIGNALS_TUNED = BaseCurve(
    weight_forward_std=0.3,
    activation_forward_std=0.1,
    weight_hard_from=0.7,
    activation_hard_from=0.7,
    weight_backward_std=2.5,
    weight_backward_end=0.7,
    activation_backward_std=0.29,
    activation_backward_end=0.12,
    freeze_from=0.9,
)
_BINARY_SIGNALS = BaseCurve(
    weight_forward_std=0.0,
    activation_forward_std=0.4,
    weight_hard_from=0.4,
    activation_hard_from=0.9,
    power=0.9,
    weight_backward_std=2.7,
    weight_backward_end=0.5,
    activation_backward_std=0.6,
    activation_backward_end=0.1,
    freeze_from=0.9,
)
_BINARY = replace(
    _BINARY_SIGNALS,
    activation_forward_std=0.25,
    activation_backward_std=1.0,
    activation_backward_end=0.18,
    activation_backward_tilt=1.2,
)
# Weights alone: what concerns activations has no effect. From scratch, hard problems want more noise
# than the search found and later freezing, easy ones do not: something in between.
_WEIGHTS_TUNED = BaseCurve(
    weight_forward_std=0.5,
    weight_hard_from=1.0,
    power=2.5,
    weight_backward_std=2.3,
    weight_backward_end=0.9,
    freeze_from=0.4,
    hard_tilt=-0.8,
    weight_backward_tilt=-0.4,
)
_WEIGHTS = replace(_WEIGHTS_TUNED, weight_forward_std=0.57, power=2.2, freeze_from=0.7)


# At most so many inputs of a first layer's output are few: results differ between 5 and 9.
FEW_INPUTS = 7.0


def _tuned(curve: BaseCurve) -> BaseCurve:
    """The curve for fine-tuning: filters of few inputs stay as they were trained.

    Of first layers with a fan-in of 5 that is clearly better, of 9 neither, of 40 worse
    (`python -m learnsched.benchmarks.first_layer`).
    """
    return replace(curve, frozen_fan_in=FEW_INPUTS)


WARM_UNTIL = 0.2


def _warmed(curve: BaseCurve) -> BaseCurve:
    """The curve for training from scratch, with a learning rate that rises over a fifth of the run.

    With 2-bit activations it gained 1.6 points on the seeds that it was found on, and nothing on fresh
    ones (`python -m learnsched.benchmarks.warm_up`); with real ones, 1.2 on three tasks of the first
    (`figures/meta_training.md`).
    """
    return replace(curve, warm_until=WARM_UNTIL)


# Along which a signal's kernel slides.
_SIGNALS = 1

_BASE = BaseCurves(
    (
        Case(3, 4, False, _warmed(_TWO_BIT)),
        Case(3, 4, True, _tuned(_TWO_BIT)),
        Case(3, 3, False, _TERNARY),
        Case(3, 3, False, _TERNARY_SIGNALS, spatial_dims=_SIGNALS),
        Case(3, 3, True, _tuned(_TERNARY)),
        Case(3, 3, True, _tuned(_TERNARY_SIGNALS_TUNED), spatial_dims=_SIGNALS),
        Case(2, 2, False, _BINARY),
        Case(2, 2, False, _BINARY_SIGNALS, spatial_dims=_SIGNALS),
        Case(2, 2, True, _tuned(replace(_BINARY, freeze_from=0.5))),
        Case(2, 2, True, _tuned(_BINARY_SIGNALS), spatial_dims=_SIGNALS),
        Case(3, 0, False, _warmed(_WEIGHTS)),
        Case(3, 0, True, _tuned(_WEIGHTS_TUNED)),
    )
)

# Those of the artefact `tables`.
TABLES = BaseCurves((Case(3, 4, False, _warmed(_TWO_BIT_TABLES)), *_BASE.cases[1:]))

_QUICK_MIX = Mix(
    architectures=(
        ("mnist1d", "cnn1d", (6, 8), (3, 4)),
        ("digits", "cnn2d", (6,), (3,)),
        ("mnist1d", "mlp", (24,), (3,)),
    ),
    horizons=(6, 8),
    total_steps=(60, 120),
    batches=(32,),
    bits=(("ternary/2-bit", 1.0),),
    learning_rates=(5e-3, 5e-2),
    fine_tuning=0.2,
    members=8,
    tasks=2,
)

_STANDARD_MIX = Mix(
    architectures=(
        ("mnist1d", "cnn1d", (8, 12, 16), (3, 4, 5, 6)),
        ("mnist1d", "cnn1d", (8, 12, 16), (3, 4, 5, 6)),
        ("noisy_digits", "cnn2d", (6, 10, 16), (3, 4, 5)),
        ("noisy_digits", "residual", (6, 10), (5,)),
        ("digits", "cnn2d", (6, 10), (3, 4)),
        ("mnist1d", "mlp", (24, 32, 64), (3, 4)),
        ("noisy_digits", "mlp", (24, 32, 64), (3, 4)),
    ),
    horizons=(6, 8, 12, 16, 20),
    total_steps=(80, 320),
    batches=(32,),
    bits=(("ternary/2-bit", 1.0),),
    learning_rates=(1e-2, 5e-2),
    fine_tuning=0.3,
    members=8,
    tasks=4,
)


def _validation(
    members: int, *tasks: tuple[str, str, str, int, int, int, int, bool]
) -> tuple[Task, ...]:
    """Tasks by bits, data, family, width, depth, horizon, steps an epoch and fine-tuning."""
    return tuple(
        task_of(
            row,
            batch=64,
            bits=bits,
            learning_rates=(0.015, 0.02, 0.03, 0.04) * (members // 4),
            fine_tuning=fine_tuning,
            seed=1_000_000 + index,
        )
        for index, (bits, *row, fine_tuning) in enumerate(tasks)
    )


_EVOLUTION = EvolutionStrategies(pairs=3, std=0.15, relative_std=0.5, knots=3, by_layer=False)

PRESETS: dict[str, Preset] = {
    "quick": Preset(
        steps=12,
        trainer=TrainerConfig(
            mix=_QUICK_MIX,
            validation=_validation(8, ("ternary/2-bit", "mnist1d", "cnn1d", 8, 4, 8, 12, False)),
            learning_rate=0.002,
            average=0.8,
            validate_every=4,
        ),
        base=_BASE,
        estimator=Unrolled(damping=0.5),
    ),
    "standard": Preset(
        steps=100,
        trainer=TrainerConfig(
            mix=_STANDARD_MIX,
            validation=_validation(
                24,
                ("ternary/2-bit", "mnist1d", "cnn1d", 8, 4, 8, 20, False),
                ("ternary/2-bit", "mnist1d", "cnn1d", 10, 4, 8, 20, True),
                ("ternary/2-bit", "mnist1d", "cnn1d", 16, 4, 16, 25, False),
                ("ternary/2-bit", "mnist1d", "mlp", 32, 4, 12, 15, False),
                ("ternary/2-bit", "noisy_digits", "cnn2d", 8, 4, 8, 20, False),
                ("ternary/2-bit", "noisy_digits", "cnn2d", 10, 4, 8, 20, True),
                ("ternary/2-bit", "noisy_digits", "residual", 8, 5, 10, 20, False),
                ("ternary/2-bit", "noisy_digits", "mlp", 48, 3, 10, 20, False),
            ),
            learning_rate=0.003,
            decay=30.0,
            average=0.9,
        ),
        base=_BASE,
        estimator=Hybrid(Unrolled(damping=0.5), replace(_EVOLUTION, pairs=6)),
    ),
}
# To go on from a good network: no backpropagation through runs, the error itself is followed, which has
# no derivative. Where a gradient is noise Adam steps as far, and with the rate of `standard` that
# noise carried the network away.
PRESETS["evolution"] = replace(
    PRESETS["standard"],
    trainer=replace(PRESETS["standard"].trainer, learning_rate=0.0005, decay=1000.0),
    estimator=replace(_EVOLUTION, pairs=8, objective="error"),
)
# Wider networks and longer runs, in the way that stays on course there (`python -m
# learnsched.benchmarks.stability`): damped backpropagation, small steps, few members.
PRESETS["long"] = replace(
    PRESETS["standard"],
    steps=200,
    trainer=replace(
        PRESETS["standard"].trainer,
        mix=replace(
            _STANDARD_MIX,
            architectures=(
                ("mnist1d", "cnn1d", (12, 16, 32), (3, 4, 5, 6)),
                ("mnist1d", "cnn1d", (12, 16, 32), (3, 4, 5, 6)),
                ("noisy_digits", "cnn2d", (6, 10, 16), (3, 4, 5)),
                ("noisy_digits", "residual", (6, 10), (5,)),
                ("mnist1d", "mlp", (32, 64), (3, 4)),
            ),
            horizons=(8, 12, 16, 20, 30),
            total_steps=(160, 960),
            fine_tuning=0.2,
            members=4,
            tasks=2,
            alike=1,
        ),
        validation=_validation(
            16,
            ("ternary/2-bit", "mnist1d", "cnn1d", 16, 4, 16, 25, False),
            ("ternary/2-bit", "mnist1d", "cnn1d", 28, 4, 12, 40, False),
            ("ternary/2-bit", "mnist1d", "cnn1d", 32, 5, 20, 40, False),
            ("ternary/2-bit", "mnist1d", "cnn1d", 16, 4, 12, 30, True),
            ("ternary/2-bit", "mnist1d", "mlp", 48, 4, 16, 25, False),
            ("ternary/2-bit", "noisy_digits", "cnn2d", 10, 4, 16, 25, False),
            ("ternary/2-bit", "noisy_digits", "residual", 8, 5, 10, 25, False),
        ),
        learning_rate=0.001,
        decay=100.0,
        validate_every=20,
    ),
    estimator=Guarded(Unrolled(damping=0.5), _EVOLUTION),
)

# One network for all level sets of activations.
_ALL_BITS = (
    ("ternary/2-bit", 0.4),
    ("ternary/ternary", 0.2),
    ("binary/binary", 0.2),
    ("ternary/real", 0.2),
)
PRESETS["all-bits"] = replace(
    PRESETS["standard"],
    trainer=replace(
        PRESETS["standard"].trainer,
        mix=replace(_STANDARD_MIX, bits=_ALL_BITS),
        validation=_validation(
            24,
            *(
                (bits, *network)
                for bits, _ in _ALL_BITS
                for network in (
                    ("mnist1d", "cnn1d", 8, 4, 8, 20, False),
                    ("mnist1d", "cnn1d", 10, 4, 8, 20, True),
                    ("noisy_digits", "cnn2d", 8, 4, 8, 20, False),
                )
            ),
        ),
    ),
)

# For a GPU, where hundreds of copies of a run cost hardly more than one: only what is asked for in the
# end counts, the error of the hard network, and each layer has knots of its own.
PRESETS["population"] = replace(
    PRESETS["standard"],
    trainer=replace(
        PRESETS["standard"].trainer,
        mix=replace(_STANDARD_MIX, total_steps=(80, 600), tasks=8, alike=4),
        learning_rate=0.006,
        average=0.8,
        validate_every=10,
    ),
    estimator=EvolutionStrategies(
        pairs=32, std=0.12, relative_std=0.4, knots=3, by_layer=True, objective="error"
    ),
)
