"""Guide 2: train a schedule of your own.

    python -m learnsched.guides.train_your_own [--quick]

``meta_train.py`` does this for the presets, with a report; here you choose the tasks. The run can be
interrupted: started again with the same options it goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

import learnsched as ls
from learnsched.guides import options as guide
from learnsched.meta.presets import PRESETS
from learnsched.meta.trainer import MetaTrainer
from learnsched.policies import Domain, LearnedPolicy, MetaNetwork
from learnsched.schedule import LayerInfo, RunInfo


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the guide."""
    options = guide.parse(__doc__, arguments)
    torch.set_num_threads(1)  # the tensors are small: threads cost more than they bring
    torch.manual_seed(options.seed)
    outer_steps, total_steps = (2, (8, 12)) if options.quick else (12, (24, 48))
    preset = PRESETS["quick"]

    # 1. The tasks: draw networks, horizons and learning rates like those that you will train. What
    #    meta-training has not seen, a schedule does not know.
    mix = replace(
        preset.trainer.mix,
        architectures=(("digits", "mlp", (8, 16), (3, 4)), ("digits", "cnn2d", (6,), (3,))),
        horizons=(4, 6),
        total_steps=total_steps,
        members=4,
    )
    # 2. Other tasks select the policy: never trained on, with seeds of their own.
    validation = (
        replace(
            preset.trainer.validation[0],
            data="digits",
            family="mlp",
            width=12,
            depth=3,
            horizon=5,
            steps=8,
        ),
    )
    config = replace(
        preset.trainer, mix=mix, validation=validation, validate_every=2, seed=options.seed
    )

    # An estimator of your own goes to MetaTrainer as `estimator`. Make it a frozen dataclass: a run is
    # resumed only if the `repr` of its estimator is the same as before.

    # 3. A fresh meta-network gives the hand-coded base curve; training bends it.
    domain = Domain(horizon=(4, 6), steps=total_steps, depth=(3, 4), fan_in=(8, 64))
    policy = LearnedPolicy(MetaNetwork(), preset.base, domain)
    folder = options.out / f"meta-{outer_steps}-{options.seed}"
    trainer = MetaTrainer(policy, config, folder, config.load_data())
    trainer.run(
        outer_steps, lambda entry: print(f"step {entry['step']}: {entry['outer_loss']:.3f}")
    )
    trainer.load_best()

    # 4. An artefact is one file of data, never a pickle, with its card inside.
    path = ls.save_artefact(
        policy,
        folder / "schedule.safetensors",
        {
            "name": "mine",
            "limits": f"{outer_steps} outer steps on digits: it shows the way, not a good schedule.",
            "made": {"outer_steps": trainer.step, "validation_error": trainer.best_error},
        },
    )

    # 5. Loaded again, it is a policy like any other.
    mine = ls.load_pretrained(path)
    layers = tuple(LayerInfo(f"layer {i + 1}", 32, 3, 4) for i in range(3))
    schedule = ls.plan(mine, RunInfo(layers, horizon=6, steps_per_epoch=8))
    for name in ("weight_forward_std", "weight_backward_std", "fraction"):
        print(f"{name:20}", [round(value, 3) for value in schedule[name].mean(1).tolist()])
    ls.plot_schedule(schedule, folder / "schedule.png", title="My schedule")
    print(f"wrote {path} and {folder / 'schedule.png'}")


if __name__ == "__main__":
    main()
