"""Where no batch norm sets the scale of an activation: calibrate it, learn it, both or neither?

    torchrun --standalone --nproc-per-node 2 -m learnsched.benchmarks.without_batch_norm [--quick]
                                             [--seed N] [--json PATH]

Small networks of ternary weights and 2-bit activations under the default schedule, from scratch and
from a trained float network; accuracy on validation data, at the better of two learning rates.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import learnsched as ls
from learnsched.benchmarks.campaign import one_of_the_ranks, recorded
from learnsched.benchmarks.command_line import KEEPS, command_line
from learnsched.data import DataSet, load
from learnsched.meta import processes
from learnsched.tables import markdown

WAYS = ("as made", "calibrated", "learned", "calibrated and learned")
RATES = (0.008, 0.02)
_EPOCHS, _STEPS, _BATCH = 8, 20, 50
_SEEDS = 3


def _convolutional(depth: int, start: Callable[[Tensor], object] | None = None) -> nn.Module:
    layers: list[nn.Module] = []
    for channels in (1, *[16] * (depth - 1)):
        layers += [nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU()]
    net = nn.Sequential(*layers, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(256, 10))
    if start is not None:
        for layer in net:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                start(layer.weight)
    return net


def _mlp() -> nn.Module:
    hidden = [part for _ in range(2) for part in (nn.Linear(64, 64), nn.ReLU())]
    return nn.Sequential(nn.Linear(40, 64), nn.ReLU(), *hidden, nn.Linear(64, 10))


# Names, data sets and networks.
NETWORKS: Mapping[str, tuple[str, Callable[[], nn.Module]]] = {
    "3 convolutions": ("noisy_digits", lambda: _convolutional(3)),
    "5 convolutions": ("noisy_digits", lambda: _convolutional(5)),
    "5 convolutions, Kaiming's initial weights": (
        "noisy_digits",
        lambda: _convolutional(5, nn.init.kaiming_normal_),
    ),
    "MLP of 4 layers": ("mnist1d", _mlp),
}


def accuracy(
    data: DataSet, make: Callable[[], nn.Module], way: str, rate: float, seed: int, *, tuned: bool
) -> float:
    """Validation accuracy of the finished network."""
    torch.manual_seed(seed)
    x, y = data.train.x, data.train.y
    net = make()
    if tuned:
        optimizer = torch.optim.Adam(net.parameters(), 0.005)
        for _ in range(_EPOCHS):
            for loss in _epoch(net, x, y):
                _step(optimizer, loss)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no batch norm precedes")
        ls.quantize_(net, ls.ternary(), ls.unsigned(2), example_input=x[:1])
    if way.startswith("calibrated"):
        ls.calibrate_(net, [x[:200]])
    optimizer = torch.optim.Adam(net.parameters(), rate)
    if way.endswith("learned"):
        optimizer.add_param_group({"params": ls.learn_scales_(net), "weight_decay": 0})
    scheduler = ls.QuantizationScheduler(
        net,
        ls.load_pretrained("default"),
        epochs=_EPOCHS,
        steps_per_epoch=_STEPS,
        optimizer=optimizer,
        fine_tuning=tuned,
    )
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, scheduler.learning_rate_factor)
    for _ in range(_EPOCHS):
        total = 0.0
        for loss in _epoch(net, x, y):
            _step(optimizer, loss)
            decay.step()
            total += loss.item()
        scheduler.step(metrics={"train_loss": total / _STEPS})
    ls.finalize_(net).eval()
    with torch.no_grad():
        hits = net(data.validation.x).argmax(1) == data.validation.y
    return float(hits.float().mean())


def _epoch(net: nn.Module, x: Tensor, y: Tensor) -> Iterator[Tensor]:
    for _ in range(_STEPS):
        chosen = torch.randint(len(x), (_BATCH,))
        yield F.cross_entropy(net(x[chosen]), y[chosen])


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: accuracy in %, mean over seeds at the better learning rate."""
    found = {
        (r["network"], r["fine_tuned"], r["way"]): 100 * np.max(np.mean(r["accuracy"], axis=1))
        for r in records
    }
    rows = [["network", *WAYS]]
    for tuned, regime in ((False, "from scratch"), (True, "fine-tuned")):
        networks = dict.fromkeys(network for network, other, _ in found if other == tuned)
        if not networks:
            continue
        numbers = [[found[network, tuned, way] for way in WAYS] for network in networks]
        labels = [*(f"{network}, {regime}" for network in networks), f"{regime}, mean"]
        for label, row in zip(labels, [*numbers, np.mean(numbers, axis=0)], strict=True):
            rows.append([label, *(f"{number:.1f}" for number in row)])
    return markdown(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = command_line(__doc__, quick="one network from scratch, one seed", json=KEEPS)
    options = parser.parse_args(arguments)
    names, regimes, seeds = (
        (list(NETWORKS)[-1:], (False,), 1)
        if options.quick
        else (list(NETWORKS), (False, True), _SEEDS)
    )
    jobs = [(name, tuned, way) for tuned in regimes for name in names for way in WAYS]

    def work(job: tuple[str, bool, str]) -> list[dict[str, Any]]:
        name, tuned, way = job
        data, make = load(NETWORKS[name][0]), NETWORKS[name][1]
        found = [
            [
                accuracy(data, make, way, rate, 1000 * options.seed + seed, tuned=tuned)
                for seed in range(seeds)
            ]
            for rate in RATES
        ]
        return [{"network": name, "fine_tuned": tuned, "way": way, "accuracy": found}]

    with one_of_the_ranks():
        records = recorded(
            options.json,
            {job: job for job in jobs},
            work,
            lambda record: (record["network"], record["fine_tuned"], record["way"]),
            seed=options.seed,
            quick=options.quick,
        )
        if processes.rank() == 0:
            print(table(records))


if __name__ == "__main__":
    main()
