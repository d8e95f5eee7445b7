"""Guide 3: add a policy, a level set, data and a kind of network that the package does not have.

    python -m learnsched.guides.add_your_own [--quick]

None of them needs a change of the package: a policy is any object with the attributes and methods of
:class:`learnsched.schedule.Policy`, a level set a tuple of numbers; meta-training is
given data sets and kinds of networks by their names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F

import learnsched as ls
from learnsched.data import DataSet, Split
from learnsched.guides import options as guide
from learnsched.meta.networks import FAMILIES, Family
from learnsched.meta.presets import PRESETS
from learnsched.meta.rollout import PolicyRollout, run_forward
from learnsched.policies import LearnedPolicy, MetaNetwork
from learnsched.schedule import RunInfo, Telemetry

# A level set: increasing values; thresholds lie in the middle unless you give them. Here five levels
# without the expensive ±3, as for a multiplier that only shifts.
SHIFTS = ls.LevelSet((-2.0, -1.0, 0.0, 1.0, 2.0), name="shifts")


@dataclass(frozen=True)
class CosineAnnealing:
    """A policy: noise that falls along a cosine, later in later layers.

    The terminal conditions (no noise, all weights frozen in the last epoch) are not a policy's
    business: they hold by construction. A frozen dataclass has a ``repr`` that tells its parameters,
    by which a checkpoint knows its policy.
    """

    std: float = 0.4
    noise: str = "normal"
    partition: str = "settled"
    metrics: tuple[str, ...] = ()

    def begin(self, run: RunInfo) -> None:
        """No state; a policy with one returns a dictionary of tensors."""

    def settings(
        self, run: RunInfo, epoch: int, telemetry: Telemetry, state: None
    ) -> tuple[Sequence[ls.Setting], None]:
        """One setting a layer."""
        result = []
        for index in range(len(run.layers)):
            end = (index + 1) / len(run.layers)
            progress = min(1.0, run.progress(epoch) / end)
            std = self.std * (1 + math.cos(math.pi * progress)) / 2
            result.append(ls.Setting(std, 0.8, std, 0.8))
        return result, None


def two_moons(seed: int) -> DataSet:
    """A data set: three splits of inputs and labels."""

    def moons(count: int, offset: int) -> Split:
        generator = torch.Generator().manual_seed(3 * seed + offset)
        y = torch.arange(count) % 2
        angle = math.pi * torch.rand(count, generator=generator)
        x = torch.stack([angle.cos() + y - 0.5, (1 - 2 * y) * (angle.sin() - 0.25)], 1)
        return Split(x + 0.1 * torch.randn(count, 2, generator=generator), y)

    return DataSet("two_moons", moons(600, 0), moons(300, 1), moons(300, 2), classes=2)


def bottleneck(shape: tuple[int, ...], width: int, depth: int, classes: int) -> nn.Module:
    """A kind of network: ``depth`` linear layers, every second one half as wide."""
    layers: list[nn.Module] = []
    inputs = shape[0]
    for index in range(depth - 1):
        outputs = width if index % 2 == 0 else max(1, width // 2)
        layers += [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU()]
        inputs = outputs
    return nn.Sequential(*layers, nn.Linear(inputs, classes))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the guide."""
    options = guide.parse(__doc__, arguments)
    data, epochs = two_moons(options.seed), 6 if options.quick else 30

    # The policy and the level set in a loop of one's own.
    torch.manual_seed(options.seed)
    model = nn.Sequential(
        nn.Linear(2, 16), nn.BatchNorm1d(16), nn.ReLU(),
        nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2),
    )  # fmt: skip
    ls.quantize_(model, SHIFTS, ls.unsigned(2), weight_scale=ls.LeastSquares())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    scheduler = ls.QuantizationScheduler(model, CosineAnnealing(), epochs, optimizer=optimizer)
    for _ in range(epochs):
        for rows in torch.randperm(len(data.train)).split(50):
            loss = F.cross_entropy(model(data.train.x[rows]), data.train.y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
    ls.finalize_(model, data.train.x.split(50))
    with torch.no_grad():
        right = model.eval()(data.test.x).argmax(1) == data.test.y
    print(f"two moons, own policy and levels: {100 * right.float().mean():.1f} % on test data")
    used = {int(v) for layer in ls.integer_weights(model).values() for v in layer.integers.unique()}
    print(f"weights on the levels {sorted(used)}")

    # Data and networks as a task of meta-training, here one inner run. A MetaTrainer is given them as
    # data={"two_moons": data}, families=families.
    families = {**FAMILIES, "bottleneck": Family(bottleneck, inputs=("features",))}
    task = replace(
        PRESETS["quick"].trainer.validation[0],
        data="two_moons", family="bottleneck", width=16, depth=4,
    )  # fmt: skip
    inner = task.build(data, families=families)
    with torch.no_grad():
        rollout = PolicyRollout(LearnedPolicy(MetaNetwork()), inner.run, len(task.learning_rates))
        losses = run_forward(inner, rollout)[2]
    first, last = (float(loss.mean()) for loss in (losses[0], losses[-1]))
    print(f"{task.name}: mean training loss {first:.3f} in the first epoch, {last:.3f} in the last")


if __name__ == "__main__":
    main()
