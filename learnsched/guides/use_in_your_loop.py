"""Guide 1: use a learned schedule in your own training loop.

    python -m learnsched.guides.use_in_your_loop [--quick]

A small convolutional network learns handwritten digits with ternary weights and 2-bit activations.
The run is interrupted in the middle and goes on from its checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import learnsched as ls
from learnsched.data import Split, load
from learnsched.files import write
from learnsched.guides import options as guide


def network() -> nn.Module:
    """Any model will do; of calls of F.relu ``ls.activations_to_modules_`` makes modules."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, 2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, 2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def prepare(epochs: int, steps: int, seed: int) -> dict[str, Any]:
    """Model, optimizer, learning-rate scheduler and quantization scheduler of a run."""
    torch.manual_seed(seed)
    # In place: the parameters stay the same objects, so optimizers and checkpoints stay valid.
    model = ls.quantize_(
        network(), ls.ternary(), ls.unsigned(2), example_input=torch.zeros(1, 1, 8, 8)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    # The constructor applies the settings of epoch 0.
    scheduler = ls.QuantizationScheduler(
        model, ls.load_pretrained("default"), epochs, steps_per_epoch=steps, optimizer=optimizer
    )
    # The learning rate that the schedule is made for; it steps with the optimizer.
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, scheduler.learning_rate_factor)
    return {"model": model, "optimizer": optimizer, "decay": decay, "scheduler": scheduler}


def train(run: dict[str, Any], data: Split, last: int, checkpoint: Path) -> None:
    """Train until ``last`` epochs are done, with a checkpoint after each."""
    while run["scheduler"].epoch < last:
        total = 0.0
        batches = torch.randperm(len(data)).split(50)
        for rows in batches:
            loss = F.cross_entropy(run["model"](data.x[rows]), data.y[rows])
            run["optimizer"].zero_grad()
            loss.backward()
            run["optimizer"].step()
            run["decay"].step()
            total += loss.item() / len(batches)
        # A learned schedule looks at the mean training loss of the epoch.
        run["scheduler"].step({"train_loss": total})
        state = {name: part.state_dict() for name, part in run.items()}
        state["random"] = torch.get_rng_state()
        write(checkpoint, partial(torch.save, state))  # whole, or as it was before
        print(f"epoch {run['scheduler'].epoch:2}  loss {total:.3f}")


def resume(run: dict[str, Any], checkpoint: Path) -> None:
    """Make everything as before, then load every state; nothing in it needs a pickle."""
    state = torch.load(checkpoint, weights_only=True)
    for name, part in run.items():
        part.load_state_dict(state[name])
    torch.set_rng_state(state["random"])


@torch.no_grad()
def accuracy(model: nn.Module, data: Split) -> float:
    """Share of right answers."""
    return float((model.eval()(data.x).argmax(1) == data.y).float().mean())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the guide."""
    options = guide.parse(__doc__, arguments)
    data, epochs = load("digits"), 6 if options.quick else 16
    checkpoint = options.out / "last.pt"
    steps = len(data.train) // 50

    run = prepare(epochs, steps, options.seed)
    print(ls.report(run["model"]))
    train(run, data.train, epochs // 2, checkpoint)

    print("interrupted; going on from the checkpoint")
    run = prepare(epochs, steps, options.seed)
    resume(run, checkpoint)
    train(run, data.train, epochs, checkpoint)

    # Noise off, every weight on its level to the bit, batch-norm statistics re-estimated.
    model = ls.finalize_(run["model"], data.train.x.split(50))
    print(f"test accuracy of the hard network: {100 * accuracy(model, data.test):.1f} %")
    for name, layer in ls.integer_weights(model).items():
        values = layer.integers.unique().tolist()
        print(f"layer {name}: weights {values} times one scale for each of its channels")
    run["scheduler"].history.save(options.out / "history.json")
    print(f"draw the schedule with: learnsched plot {options.out / 'history.json'}")


if __name__ == "__main__":
    main()
