"""Named configurations of meta-training."""

from __future__ import annotations

from dataclasses import dataclass, replace

from learnsched.meta.estimators import Estimator, Unrolled
from learnsched.meta.evolution import EvolutionStrategies
from learnsched.meta.tasks import Mix, Task
from learnsched.meta.trainer import TrainerConfig
from learnsched.policies import BaseCurve, BaseCurves, Domain


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
        """The range of runs that the mix can draw."""
        mix = self.trainer.mix
        return Domain(
            horizon=(min(mix.horizons), max(mix.horizons)),
            steps=mix.total_steps,
            depth=(
                min(d for a in mix.architectures for d in a[3]),
                max(d for a in mix.architectures for d in a[3]),
            ),
            fan_in=(5, 600),
        )


_BASE = BaseCurves.everywhere(BaseCurve())

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
        ("mnist1d", "cnn1d", (8, 12, 16), (3, 4, 5, 6)),
        ("digits", "cnn2d", (6, 10), (3, 4)),
        ("mnist1d", "mlp", (24, 32, 64), (3, 4)),
    ),
    horizons=(6, 8, 12, 16, 20),
    total_steps=(80, 600),
    batches=(32,),
    bits=(("ternary/2-bit", 0.76), ("ternary/ternary", 0.12), ("binary/binary", 0.12)),
    learning_rates=(1e-2, 5e-2),
    fine_tuning=0.35,
    members=12,
    tasks=2,
)


def _validation(
    members: int, *tasks: tuple[str, str, int, int, int, int, bool]
) -> tuple[Task, ...]:
    """Tasks by data, family, width, depth, horizon, steps an epoch and fine-tuning."""
    return tuple(
        Task(
            family=family,
            data=data,
            width=width,
            depth=depth,
            horizon=horizon,
            steps=steps,
            batch=64,
            bits="ternary/2-bit",
            learning_rates=(0.015, 0.04) * (members // 2),
            fine_tuning=fine_tuning,
            seed=1_000_000 + index,
        )
        for index, (data, family, width, depth, horizon, steps, fine_tuning) in enumerate(tasks)
    )


PRESETS: dict[str, Preset] = {
    "quick": Preset(
        steps=12,
        trainer=TrainerConfig(
            mix=_QUICK_MIX,
            validation=_validation(8, ("mnist1d", "cnn1d", 8, 4, 8, 12, False)),
            learning_rate=0.002,
            average=0.8,
            validate_every=4,
        ),
        base=_BASE,
        estimator=Unrolled(damping=0.5),
    ),
    "standard": Preset(
        steps=200,
        trainer=TrainerConfig(
            mix=_STANDARD_MIX,
            validation=_validation(
                24,
                ("mnist1d", "cnn1d", 8, 4, 8, 20, False),
                ("mnist1d", "cnn1d", 10, 4, 8, 20, True),
                ("mnist1d", "cnn1d", 16, 4, 20, 30, False),
                ("mnist1d", "cnn1d", 12, 5, 16, 25, True),
                ("mnist1d", "mlp", 32, 4, 12, 15, False),
            ),
            learning_rate=0.0006,
            decay=200.0,
            average=0.9,
        ),
        base=_BASE,
        estimator=EvolutionStrategies(pairs=6, std=0.15, relative_std=0.5, knots=3, by_layer=False),
    ),
}
PRESETS["long"] = replace(
    PRESETS["standard"],
    steps=1000,
    trainer=replace(
        PRESETS["standard"].trainer,
        mix=replace(
            _STANDARD_MIX, total_steps=(80, 1200), horizons=(6, 8, 12, 16, 20, 30), tasks=4
        ),
        decay=200.0,
        average=0.97,
    ),
)
