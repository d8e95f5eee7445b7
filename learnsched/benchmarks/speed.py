"""How fast the quantizer, a training step and the scheduler are, as ratios within one run.

    python -m learnsched.benchmarks.speed [--quick] [--seed N] [--threads N] [--json PATH] [--plot PATH]

Alternatives take turns, round after round; a ratio is the median over rounds of the ratio within a
round, so that a busy machine slows all of them alike. With one thread on a CPU the time is that of the
processor, which others cannot lengthen by much. Brevitas' and torchao's quantizers are measured too
where they are installed. Runs on a GPU if there is one.

The floor of an operation is the time to move its tensors once at the speed of a plain copy, measured in
the same rounds: a forward pass reads one and writes one; with the backward pass, which reads x and the
gradient and writes one, five.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import learnsched as ls
from learnsched.benchmarks.command_line import RESULTS, command_line
from learnsched.benchmarks.environment import write_results
from learnsched.benchmarks.speed_networks import (
    Action,
    Network,
    Operation,
    cnn,
    mlp,
    peer_operations,
    quantized,
    resnet,
    training_step,
    training_steps,
)
from learnsched.figure_style import paper_style, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ELEMENTS = 1_000_000
_SIZES = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)
_BITS = (1, 2, 3, 4, 5, 6, 7, 8)
_NETWORKS = (mlp(), cnn(), resnet())
# Where the device computes longer than Python takes to launch it.
_ON_A_GPU = (cnn(batch=1024), resnet(batch=1024))
_DEPTHS = tuple(cnn((32,) * depth, batch=16) for depth in (2, 4, 8))
_WIDTHS = tuple(cnn((width,) * 4, batch=16) for width in (16, 32, 64))
_SECTIONS = ("operations", "steps", "depth", "width", "scaling", "levels", "memory")
# Tensors that an operation moves, in those that a copy does.
_FORWARD, _BOTH, _DOUBLE = 1.0, 2.5, 2.5


def take_turns(actions: dict[str, Action], rounds: int) -> dict[str, list[float]]:
    """Seconds of each action in each round, after one round that does not count.

    In a round an action runs twice and the second time counts: the first pays for what the one
    before it left behind, memory handed back and caches filled with something else.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    alone = _device().type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    for round_ in range(rounds + 1):
        for name, action in actions.items():
            action()
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
    """Forward, forward and backward, and double backward of single operations, in ReLUs and floors."""
    device = _device()
    generator = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(elements, generator=generator).to(device) for _ in range(2))
    leaf = x.clone().requires_grad_()
    functions = _functions(device, elements)
    copy = {"copy": _copy(x)}
    forward = take_turns(
        copy | {name: partial(_no_grad, f, x) for name, f in functions.items()}, rounds
    )
    both = take_turns(
        copy | {name: partial(_both, f, leaf, grad) for name, f in functions.items()}, rounds
    )
    forward_relus, both_relus = ratios(forward, "ReLU"), ratios(both, "ReLU")
    forward_copies, both_copies = ratios(forward, "copy"), ratios(both, "copy")
    rows = [
        {
            "operation": name,
            "forward in ReLUs": forward_relus[name],
            "forward and backward in ReLUs": both_relus[name],
            "forward in floors": forward_copies[name] / _FORWARD,
            "forward and backward in floors": both_copies[name] / _BOTH,
            "nanoseconds an element": 1e9 * statistics.median(forward[name]) / elements,
        }
        for name in functions
    ]
    return [*rows, *_double_backward(leaf, grad, rounds)]


def bandwidth(elements: int, rounds: int) -> float:
    """Bytes a second that a copy reads and writes."""
    x = torch.randn(elements, device=_device())
    seconds = statistics.median(take_turns({"copy": _copy(x)}, rounds)["copy"])
    return 2 * x.nbytes / seconds


def _copy(x: Tensor) -> Action:
    target = torch.empty_like(x)
    return partial(target.copy_, x)


def _functions(device: torch.device, elements: int) -> dict[str, Operation]:
    two_bit, zero = ls.unsigned(2), torch.zeros((), device=device)
    functions: dict[str, Operation] = {"ReLU": torch.relu}
    functions["fake_quantize"] = lambda x: torch.fake_quantize_per_tensor_affine(x, 1.0, 0, 0, 3)
    for noise in ("uniform", "normal"):
        functions[f"composed {noise}"] = partial(_composed, noise=noise)
    for levels in (ls.ternary(), two_bit, ls.unsigned(8)):
        functions[f"hard {levels.name}"] = _quantizer(levels, "normal", zero)
        for noise in ("uniform", "triangular", "normal", "logistic"):
            std = torch.full((), 0.3, device=device)
            functions[f"{noise} {levels.name}"] = _quantizer(levels, noise, std)
    functions.update(peer_operations(elements))
    return functions


def _quantizer(levels: ls.LevelSet, noise: str, std: Tensor) -> Operation:
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
                "copy": _copy(grad),
                "backward": partial(torch.autograd.grad, y, leaf, grad, retain_graph=True),
                "double backward": partial(
                    torch.autograd.grad, first, (leaf, outer, std), grad, retain_graph=True
                ),
            },
            rounds,
        )
        rows.append(
            {
                "operation": f"double backward, normal {levels.name}",
                "in backwards": ratios(seconds, "backward")["double backward"],
                "in floors": ratios(seconds, "copy")["double backward"] / _DOUBLE,
            }
        )
    return rows


def steps(seed: int, rounds: int, networks: Sequence[Network] = _NETWORKS) -> list[dict[str, Any]]:
    """Whole training steps of networks, against the same networks in floating point."""
    rows = []
    for network in networks:
        seconds = take_turns(training_steps(network, seed, _device()), rounds)
        for kind, ratio in ratios(seconds, "float").items():
            median = statistics.median(seconds[kind])
            rows.append(
                {"network": network.name, "kind": kind, "in float steps": ratio, "seconds": median}
            )
    return rows


def memory(elements: int) -> list[dict[str, Any]]:
    """Bytes an element that operations keep for their backward pass, x itself included."""
    x = torch.randn(elements, device=_device(), requires_grad=True)
    rows = []
    for name, function in _functions(_device(), elements).items():
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            result = function(x)
        rows.append({"operation": name, "bytes saved an element": sum(kept.values()) / elements})
        del result
    return rows


def scheduler(seed: int, rounds: int) -> dict[str, float]:
    """The share of an epoch of 100 steps that the scheduler takes, for two policies."""
    shares = {}
    for name, policy in (
        ("straight-through", ls.policies.StraightThrough()),
        ("learned", ls.load_pretrained("default")),
    ):
        network = cnn()
        model = quantized(network, seed, _device())
        # Two actions a round, one round more than counts, and an epoch that is not stepped over.
        epochs = 2 * (rounds + 1) + 1
        scheduler = ls.QuantizationScheduler(model, policy, epochs, steps_per_epoch=100)
        step = training_step(model, network, _device())
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


def levels_scaling(seed: int, rounds: int, elements: int = _ELEMENTS) -> list[dict[str, Any]]:
    """Forward, and forward and backward, of the normal quantizer over the bits, in those of 2 bits."""
    device = _device()
    generator = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(elements, generator=generator).to(device) for _ in range(2))
    leaf = x.clone().requires_grad_()
    std = torch.full((), 0.3, device=device)
    rows: list[dict[str, Any]] = [{"bits": bits} for bits in _BITS]
    for noise in ("uniform", "triangular", "normal", "logistic"):
        functions = {str(bits): _quantizer(ls.unsigned(bits), noise, std) for bits in _BITS}
        forward = take_turns({k: partial(_no_grad, f, x) for k, f in functions.items()}, rounds)
        both = take_turns({k: partial(_both, f, leaf, grad) for k, f in functions.items()}, rounds)
        in_forward, in_both = ratios(forward, "2"), ratios(both, "2")
        for row in rows:
            row[f"{noise} forward"] = in_forward[str(row["bits"])]
            row[f"{noise} forward and backward"] = in_both[str(row["bits"])]
    return rows


def plot(result: dict[str, Any], path: Path) -> None:
    """Operations in ReLUs, time over the number of elements, and over the number of levels."""
    with paper_style():
        save_figure(_drawn(result), path)


def _drawn(result: dict[str, Any]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplot_mosaic([["left", "top"], ["left", "bottom"]], width_ratios=(3, 2))
    left, right, bottom = axes["left"], axes["top"], axes["bottom"]
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
    left.set_yticks(list(places), [row["operation"] for row in rows])
    left.invert_yaxis()
    left.set_xscale("log")
    left.set_xlim(left=1)
    ticks = [1, 2, 5, 10, 20, 50, 100]
    left.set_xticks(ticks, [str(tick) for tick in ticks])
    left.set_xticks([], minor=True)
    left.set_xlabel("time / time of a ReLU of 10⁶ elements")
    left.grid(axis="x", color="0.9")
    left.set_axisbelow(True)
    left.legend()
    for name, style in (("composed", "k:^"), ("normal", "k-o"), ("ReLU", "k--s")):
        x = [row["elements"] for row in result["scaling"]]
        right.plot(x, [row[name] for row in result["scaling"]], style, markersize=4, label=name)
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_xticks(x, ["10" + "⁰¹²³⁴⁵⁶⁷⁸⁹"[round(math.log10(n))] for n in x])
    right.set_yticks([1, 10, 100], ["1", "10", "100"])
    right.set_xlabel("elements")
    right.set_ylabel("forward pass\n/ ns an element")
    right.set_ylim(top=3000)  # room for the legend
    right.legend(title="2 bits, normal noise", loc="upper center")
    for noise, style in (("uniform", "k:^"), ("normal", "k-o"), ("logistic", "k--s")):
        bits = [row["bits"] for row in result["levels"]]
        both = [row[f"{noise} forward and backward"] for row in result["levels"]]
        bottom.plot(bits, both, style, markersize=4, label=noise)
    bottom.set_ylim(bottom=0)
    bottom.set_xlabel("bits of the level set")
    bottom.set_ylabel("forward and backward\n/ those of 2 bits")
    bottom.legend()
    return figure


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _both(function: Operation, leaf: Tensor, grad: Tensor) -> object:
    return torch.autograd.grad(function(leaf), leaf, grad)


@torch.no_grad()
def _no_grad(function: Operation, x: Tensor) -> Tensor:
    return function(x)


def main() -> None:
    """The command line."""
    parser = command_line(__doc__, quick="fewer rounds, under a minute", json=RESULTS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plot", type=Path, help="draw them here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rounds = 7 if options.quick else 31
    networks = (*_NETWORKS, *(_ON_A_GPU if torch.cuda.is_available() else ()))
    result: dict[str, Any] = {
        "kernels": ls.show_config().split(" (")[0],
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": options.threads,
        "seed": options.seed,
        "operations": operations(_ELEMENTS, options.seed, rounds),
        "copy, bytes a second": bandwidth(_ELEMENTS, rounds),
        "steps": steps(options.seed, max(5, rounds // 3), networks),
        "depth": steps(options.seed, max(3, rounds // 5), _DEPTHS),
        "width": steps(options.seed, max(3, rounds // 5), _WIDTHS),
        "scheduler": scheduler(options.seed, 8),
        "scaling": scaling(options.seed, rounds),
        "levels": levels_scaling(options.seed, max(5, rounds // 2)),
        "memory": memory(_ELEMENTS),
    }
    print(f"{result['kernels']}, device {result['device']}, {options.threads} threads")
    for section in _SECTIONS:
        for row in result[section]:
            print(
                "  ".join(
                    f"{k}: {v:.3g}" if isinstance(v, float) else f"{v}" for k, v in row.items()
                )
            )
    print(f"copy: {result['copy, bytes a second'] / 1e9:.3g} GB/s")
    print("scheduler, share of an epoch of 100 steps:", result["scheduler"])
    write_results(options.json, result)
    if options.plot:
        plot(result, options.plot)


if __name__ == "__main__":
    main()
