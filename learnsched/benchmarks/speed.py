"""How fast the quantizer, a training step and the scheduler are, as ratios within one run.

    python -m learnsched.benchmarks.speed [--quick] [--seed N] [--threads N] [--json PATH] [--plot PATH]

Alternatives take turns, round after round; a ratio is the median over rounds of the ratio within a
round, so that a busy machine slows all of them alike. With one thread on a CPU the time is that of the
processor, which others cannot lengthen by much. Brevitas' quantizers are measured too where they are
installed. Runs on a GPU if there is one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import learnsched as ls
from learnsched.benchmarks.environment import describe
from learnsched.files import write_text

# Computes something once; what it returns is thrown away.
Action = Callable[[], object]

_ELEMENTS = 1_000_000
_SIZES = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)


def take_turns(actions: dict[str, Action], rounds: int) -> dict[str, list[float]]:
    """Seconds of each action in each round, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    alone = _device().type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    for round_ in range(rounds + 1):
        for name, action in actions.items():
            _wait()
            start = clock()
            action()
            _wait()
            if round_:
                seconds[name].append(clock() - start)
    return seconds


def ratios(seconds: dict[str, list[float]], reference: str) -> dict[str, float]:
    """Median over rounds of each action's time over the reference's in the same round."""
    return {
        name: statistics.median(a / b for a, b in zip(times, seconds[reference], strict=True))
        for name, times in seconds.items()
    }


def operations(elements: int, seed: int, rounds: int) -> list[dict[str, Any]]:
    """Forward, forward and backward, and double backward of single operations, in ReLUs."""
    device = _device()
    generator = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(elements, generator=generator).to(device) for _ in range(2))
    leaf = x.clone().requires_grad_()
    functions = _functions(device)
    forward = take_turns({name: partial(_no_grad, f, x) for name, f in functions.items()}, rounds)
    both = take_turns(
        {name: partial(_both, f, leaf, grad) for name, f in functions.items()},
        rounds,
    )
    in_forward, in_both = ratios(forward, "ReLU"), ratios(both, "ReLU")
    rows = [
        {
            "operation": name,
            "forward in ReLUs": in_forward[name],
            "forward and backward in ReLUs": in_both[name],
            "nanoseconds an element": 1e9 * statistics.median(forward[name]) / elements,
        }
        for name in functions
    ]
    return [*rows, *_double_backward(leaf, grad, rounds)]


def _functions(device: torch.device) -> dict[str, Callable[[Tensor], Tensor]]:
    two_bit, zero = ls.unsigned(2), torch.zeros((), device=device)
    functions: dict[str, Callable[[Tensor], Tensor]] = {"ReLU": torch.relu}
    functions["fake_quantize"] = lambda x: torch.fake_quantize_per_tensor_affine(x, 1.0, 0, 0, 3)
    for noise in ("uniform", "normal"):
        functions[f"composed {noise}"] = partial(_composed, noise=noise)
    for levels in (ls.ternary(), two_bit, ls.unsigned(8)):
        functions[f"hard {levels.name}"] = _quantizer(levels, "normal", zero)
        for noise in ("uniform", "triangular", "normal", "logistic"):
            std = torch.full((), 0.3, device=device)
            functions[f"{noise} {levels.name}"] = _quantizer(levels, noise, std)
    functions.update(_peer_operations())
    return functions


def _quantizer(levels: ls.LevelSet, noise: str, std: Tensor) -> Callable[[Tensor], Tensor]:
    backward = torch.full_like(std, 0.6)
    return lambda x: ls.annealed_quantize(
        x, levels, forward_std=std, backward_std=backward, noise=noise
    )


def _composed(x: Tensor, noise: str) -> Tensor:
    """The 2-bit expectation written down plainly, differentiated by autograd."""
    y = torch.zeros_like(x)
    for threshold in (0.5, 1.5, 2.5):
        z = (x - threshold) / 0.3
        y = y + (torch.special.ndtr(z) if noise == "normal" else (z / 3.4641 + 0.5).clamp(0, 1))
    return y


def _peer_operations() -> dict[str, Callable[[Tensor], Tensor]]:
    found: dict[str, Callable[[Tensor], Tensor]] = {}
    try:
        import brevitas.nn as qnn
    except ImportError:
        pass
    else:
        module = qnn.QuantReLU(bit_width=2, max_val=3.0)
        found["Brevitas QuantReLU, 2 bits"] = lambda x: module(x)
    return found


def _double_backward(leaf: Tensor, grad: Tensor, rounds: int) -> list[dict[str, Any]]:
    """Of the gradient to x, as meta-training asks for it: adjoints of grad, x and both stds."""
    rows = []
    for levels in (ls.ternary(), ls.unsigned(2)):
        outer = grad.clone().requires_grad_()
        std = torch.full((), 0.6, device=leaf.device, requires_grad=True)
        y = ls.annealed_quantize(leaf, levels, forward_std=0.3, backward_std=std)
        (first,) = torch.autograd.grad(y, leaf, outer, create_graph=True)
        seconds = take_turns(
            {
                "backward": partial(torch.autograd.grad, y, leaf, grad, retain_graph=True),
                "double backward": partial(
                    torch.autograd.grad, first, (leaf, outer, std), grad, retain_graph=True
                ),
            },
            rounds,
        )
        ratio = ratios(seconds, "backward")["double backward"]
        rows.append({"operation": f"double backward, normal {levels.name}", "in backwards": ratio})
    return rows


def steps(seed: int, rounds: int) -> list[dict[str, Any]]:
    """Whole training steps of networks, against the same networks in floating point."""
    rows = []
    for name, (make, shape) in _NETWORKS.items():
        actions: dict[str, Action] = {}
        for kind in ("float", "hard", "annealed"):
            torch.manual_seed(seed)
            model = make(nn.Conv2d, nn.ReLU).to(_device())
            if kind != "float":
                x = torch.randn(shape, device=_device())
                model = ls.quantize_(model, ls.ternary(), ls.unsigned(2), example_input=x)
                _set_noise(model, 0.3 if kind == "annealed" else 0.0)
            actions[kind] = _training_step(model, shape)
        actions.update(_peer_steps(make, shape, seed))
        seconds = take_turns(actions, rounds)
        for kind, ratio in ratios(seconds, "float").items():
            median = statistics.median(seconds[kind])
            rows.append({"network": name, "kind": kind, "in float steps": ratio, "seconds": median})
    return rows


def _set_noise(model: nn.Module, std: float) -> None:
    for name, buffer in model.named_buffers():
        if name.endswith("forward_std"):
            buffer.fill_(std)


def _training_step(model: nn.Module, shape: tuple[int, ...]) -> Action:
    x = torch.randn(shape, device=_device())
    y = torch.randint(10, shape[:1], device=_device())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def _mlp(convolution: Any, activation: Any) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs in (784, 256, 256):
        layers += [nn.Linear(inputs, 256, bias=False), nn.BatchNorm1d(256), activation()]
    return nn.Sequential(*layers, nn.Linear(256, 10))


def _cnn(convolution: Any, activation: Any) -> nn.Module:
    layers: list[nn.Module] = []
    channels = 3
    for index, width in enumerate((32, 32, 64, 64, 128, 128)):
        stride = 2 if index in (2, 4) else 1
        layers += [
            convolution(channels, width, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            activation(),
        ]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


_NETWORKS: dict[str, tuple[Callable[[Any, Any], nn.Module], tuple[int, ...]]] = {
    "MLP, 3 hidden layers of 256, batch 64": (_mlp, (64, 1, 28, 28)),
    "CNN, 6 convolutions, 32×32, batch 32": (_cnn, (32, 3, 32, 32)),
}


def _peer_steps(
    make: Callable[[Any, Any], nn.Module], shape: tuple[int, ...], seed: int
) -> dict[str, Action]:
    try:
        import brevitas.nn as qnn
    except ImportError:
        return {}
    if make is not _cnn:
        return {}
    torch.manual_seed(seed)

    def convolution(*args: Any, **options: Any) -> nn.Module:
        module: nn.Module = qnn.QuantConv2d(*args, weight_bit_width=2, **options)
        return module

    def activation() -> nn.Module:
        module: nn.Module = qnn.QuantReLU(bit_width=2)
        return module

    return {"Brevitas": _training_step(make(convolution, activation), shape)}


def scheduler(seed: int, rounds: int) -> dict[str, float]:
    """The share of an epoch of 100 steps that the scheduler takes, for two policies."""
    shares = {}
    for name, policy in (
        ("straight-through", ls.policies.StraightThrough()),
        ("learned", ls.load_pretrained("default")),
    ):
        torch.manual_seed(seed)
        shape = (32, 3, 32, 32)
        model = ls.quantize_(_cnn(nn.Conv2d, nn.ReLU).to(_device()), ls.ternary(), ls.unsigned(2))
        epochs = rounds + 2
        scheduler = ls.QuantizationScheduler(model, policy, epochs, steps_per_epoch=100)
        step = _training_step(model, shape)
        seconds = take_turns(
            {"step": step, "schedule": partial(scheduler.step, {"train_loss": 1.0})}, rounds
        )
        shares[name] = statistics.median(seconds["schedule"]) / (
            100 * statistics.median(seconds["step"])
        )
    return shares


def scaling(seed: int, rounds: int, sizes: Sequence[int] = _SIZES) -> list[dict[str, Any]]:
    """Nanoseconds an element of the normal 2-bit quantizer and of ReLU over the number of elements."""
    rows = []
    quantizer = _quantizer(ls.unsigned(2), "normal", torch.full((), 0.3, device=_device()))
    for elements in sizes:
        x = torch.randn(elements, generator=torch.Generator().manual_seed(seed)).to(_device())
        actions: dict[str, Action] = {
            "ReLU": partial(torch.relu, x),
            "normal": partial(_no_grad, quantizer, x),
            "composed": partial(_composed, x, "normal"),
        }
        seconds = take_turns(actions, rounds)
        rows.append(
            {"elements": elements}
            | {k: 1e9 * statistics.median(v) / elements for k, v in seconds.items()}
        )
    return rows


def plot(result: dict[str, Any], path: Path) -> None:
    """Operations in ReLUs, and time over the number of elements."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    rows = [
        r for r in result["operations"] if r.get("forward in ReLUs") and r["operation"] != "ReLU"
    ]
    places = range(len(rows))
    for offset, key, colour in (
        (-0.2, "forward in ReLUs", "0.75"),
        (0.2, "forward and backward in ReLUs", "0.25"),
    ):
        values = [row[key] for row in rows]
        left.barh([p + offset for p in places], values, 0.4, color=colour, label=key[:-9])
    left.set_yticks(list(places), [row["operation"] for row in rows], fontsize=8)
    left.invert_yaxis()
    left.set_xscale("log")
    left.set_xlim(left=1)
    ticks = [1, 2, 5, 10, 20, 50, 100]
    left.set_xticks(ticks, [str(tick) for tick in ticks])
    left.set_xticks([], minor=True)
    left.set_xlabel("time / time of a ReLU of $10^6$ elements")
    left.grid(axis="x", color="0.9")
    left.set_axisbelow(True)
    left.legend(frameon=False, fontsize=8)
    for name, style in (("composed", "k:^"), ("normal", "k-o"), ("ReLU", "k--s")):
        x = [row["elements"] for row in result["scaling"]]
        right.plot(x, [row[name] for row in result["scaling"]], style, markersize=4, label=name)
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_xlabel("elements")
    right.set_ylabel("time of the forward pass (ns an element)")
    right.legend(frameon=False, fontsize=8, title="2 bits, normal noise")
    figure.savefig(path, dpi=150)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _both(function: Callable[[Tensor], Tensor], leaf: Tensor, grad: Tensor) -> object:
    return torch.autograd.grad(function(leaf), leaf, grad)


@torch.no_grad()
def _no_grad(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return function(x)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds, under a minute")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--plot", type=Path, help="draw them here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rounds = 7 if options.quick else 31
    result: dict[str, Any] = {
        "environment": describe(),
        "kernels": ls.show_config().split(" (")[0],
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": options.threads,
        "seed": options.seed,
        "operations": operations(_ELEMENTS, options.seed, rounds),
        "steps": steps(options.seed, max(5, rounds // 3)),
        "scheduler": scheduler(options.seed, 8),
        "scaling": scaling(options.seed, rounds),
    }
    print(f"{result['kernels']}, device {result['device']}, {options.threads} threads")
    for section in ("operations", "steps", "scaling"):
        for row in result[section]:
            print(
                "  ".join(
                    f"{k}: {v:.3g}" if isinstance(v, float) else f"{v}" for k, v in row.items()
                )
            )
    print("scheduler, share of an epoch of 100 steps:", result["scheduler"])
    if options.json:
        write_text(options.json, json.dumps(result, indent=1) + "\n")
    if options.plot:
        plot(result, options.plot)


if __name__ == "__main__":
    main()
