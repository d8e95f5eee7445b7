"""Size and speed of exported networks, against the same networks in float32 and INT8.

    python -m learnsched.benchmarks.export [--quick] [--seed N] [--data NAME] [--json PATH]

Each network is trained with the default schedule, finalized, and written in every format. Float32 and
INT8 are the untrained network through torch.onnx and ONNX Runtime's own static quantization: size and
speed do not depend on the weights. Latency is that of ONNX Runtime with one thread on the CPU, the
median of runs that take turns; what counts are ratios within one line. ONNX Runtime stores INT2 but
computes with float32, so that a small file is not a fast one there: the ternary folder is for hardware
that makes something of it.
"""

from __future__ import annotations

import copy
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import learnsched as ls
from learnsched.benchmarks.command_line import RESULTS, command_line
from learnsched.benchmarks.environment import describe, write_results
from learnsched.data import DataSet, load
from learnsched.export import QuantizedInput
from learnsched.export.check import pytorch_codes
from learnsched.export.inspect import inspect
from learnsched.export.reference import run
from learnsched.export.trace import trace
from learnsched.meta.networks import ResidualBlock
from learnsched.tables import markdown

_BATCHES = (1, 64)
_PART = 500


def _convolution(inputs: int, outputs: int) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]


def mlp(side: int, width: int) -> nn.Module:
    """Three linear layers."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in ((side * side, width), (width, width)):
        layers += [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def cnn(side: int, width: int) -> nn.Module:
    """Three convolutions with pools between them, and a linear layer."""
    layers = [*_convolution(1, width), nn.MaxPool2d(2), *_convolution(width, 2 * width)]
    layers += [nn.MaxPool2d(2), *_convolution(2 * width, 2 * width), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(2 * width * (side // 4) ** 2, 10))


def residual(side: int, width: int) -> nn.Module:
    """A convolution, two residual blocks, a mean over space and a linear layer."""
    layers = [*_convolution(1, width), nn.MaxPool2d(2), ResidualBlock(width), ResidualBlock(width)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


NETWORKS: dict[str, tuple[Callable[[int, int], nn.Module], int]] = {
    "mlp": (mlp, 256),
    "cnn": (cnn, 16),
    "residual": (residual, 16),
}


def train(net: nn.Module, data: DataSet, epochs: int, steps: int, seed: int) -> nn.Module:
    """The network behind an 8-bit input, trained under the default schedule and finalized."""
    x, y = data.train.x, data.train.y
    net = nn.Sequential(QuantizedInput.fit(x), net)
    ls.quantize_(net, ls.ternary(), ls.unsigned(2), example_input=x[:2])
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    scheduler = ls.QuantizationScheduler(
        net, ls.load_pretrained("default"), epochs, steps_per_epoch=steps, optimizer=optimizer
    )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        total = 0.0
        for _ in range(steps):
            chosen = torch.randint(len(x), (64,), generator=generator)
            loss = nn.functional.cross_entropy(net(x[chosen]), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
            total += loss.item()
        scheduler.step({"train_loss": total / steps})
    return ls.finalize_(net, x[:2048].split(64)).eval()


def measure(
    name: str, data: DataSet, epochs: int, steps: int, seed: int, repeats: int
) -> dict[str, Any]:
    """Sizes, latencies, sparsity, and agreement on the whole test split of one network."""
    torch.manual_seed(seed)
    build, width = NETWORKS[name]
    real = build(data.shape[-1], width)
    net = train(copy.deepcopy(real), data, epochs, steps, seed)
    x, y = data.test.x, data.test.y
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = _write_all(real.eval(), net, x, folder)
        report = inspect(folder / "ternary")
        return {
            "network": name,
            "width": width,
            "weights": report.weights,
            "zero": report.sparsity,
            "operations": report.operations,
            "nonzero_operations": report.nonzero_operations,
            "weight_bytes": {
                "float32": 4 * report.weights,
                "INT8": report.weights,
                "INT2": inspect(files["INT2"]).weight_bytes,
                "ternary": report.weight_bytes,
            },
            "disk_bytes": {
                **{kind: path.stat().st_size for kind, path in files.items()},
                "QONNX": (folder / "net.qonnx").stat().st_size,
                "ternary": report.file_bytes,
            },
            "milliseconds": {
                str(batch): _latency(files, x[:batch].numpy(), repeats) for batch in _BATCHES
            },
            **_agreement(net, files["INT2"], folder / "ternary", x, y),
        }


def _write_all(real: nn.Module, net: nn.Module, x: Tensor, folder: Path) -> dict[str, Path]:
    """Every file of a network; those for ONNX Runtime by name."""
    files = {kind: folder / f"{kind}.onnx" for kind in ("float32", "INT8", "INT2")}
    ls.export_onnx(net, x[:16], files["INT2"])
    ls.export_qonnx(net, x[:1], folder / "net.qonnx")
    ls.export_ternary(net, x[:16], folder / "ternary")
    _float_baseline(real, x, files["float32"])
    _int8_baseline(files["float32"], x, files["INT8"])
    return files


def _float_baseline(real: nn.Module, x: Tensor, path: Path) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision at every call
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.onnx warns of its own deprecated calls
        torch.onnx.export(
            real, (x[:2],), path, input_names=["input"], output_names=["output"], verbose=False,
            dynamic_shapes=({0: torch.export.Dim("batch")},), external_data=False, dynamo=True,
        )  # fmt: skip


def _int8_baseline(path: Path, x: Tensor, target: Path) -> None:
    from onnxruntime import quantization as q

    class Reader(q.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(x[:256].split(64))

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"input": batch.numpy()}

    logging.disable(logging.WARNING)
    q.quantize_static(str(path), str(target), Reader(), quant_format=q.QuantFormat.QDQ)
    logging.disable(logging.NOTSET)


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _latency(files: dict[str, Path], x: NDArray[Any], repeats: int) -> dict[str, float]:
    """Median milliseconds of one call; the files take turns, so that all see the same machine."""
    sessions = {kind: _session(path) for kind, path in files.items()}
    times: dict[str, list[float]] = {kind: [] for kind in files}
    for _ in range(repeats):
        for kind, session in sessions.items():
            start = time.perf_counter()
            session.run(None, {"input": x})
            times[kind].append(1000 * (time.perf_counter() - start))
    return {kind: statistics.median(values) for kind, values in times.items()}


def _agreement(
    net: nn.Module, file: Path, folder: Path, x: Tensor, y: Tensor
) -> dict[str, float | int]:
    """Accuracy of PyTorch, ONNX Runtime and integers, and how many codes differ from PyTorch's."""
    modules = trace(net, x[:2])
    graph, session = ls.integer_reference(folder).graph, _session(file)
    right = {"pytorch": 0, "onnxruntime": 0, "integers": 0}
    compared = different = 0
    for part, labels in zip(x.split(_PART), y.split(_PART), strict=True):
        with torch.no_grad():
            outputs = {"pytorch": net(part).numpy()}
        outputs["onnxruntime"] = session.run(None, {"input": part.numpy()})[0]
        found = run(graph, part.numpy())
        outputs["integers"] = found[graph.output.name]
        for kind, output in outputs.items():
            right[kind] += int((output.argmax(1) == labels.numpy()).sum())
        for layer, codes in pytorch_codes(net, modules, part).items():
            compared += codes.size
            accumulators = graph.output.inputs[0] if layer == graph.output.name else layer
            different += int(np.ma.filled(codes != found[accumulators], False).sum())
    accuracy = {f"accuracy_{kind}": count / len(y) for kind, count in right.items()}
    return {**accuracy, "codes_compared": compared, "codes_different": different}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Two Markdown tables: sizes and agreement; latencies."""
    sizes = [
        [
            "network", "weights", "zero", "float32", "INT8", "INT2", "trits", "float32 / trits",
            "accuracy: PyTorch, ONNX Runtime, integers", "codes compared", "different",
        ]
    ]  # fmt: skip
    for row in rows:
        size = row["weight_bytes"]
        accuracy = [row[f"accuracy_{k}"] for k in ("pytorch", "onnxruntime", "integers")]
        sizes.append([
            f"{row['network']} {row['width']}",
            f"{row['weights']:,}",
            f"{row['zero']:.0%}",
            *(f"{size[k]:,}" for k in ("float32", "INT8", "INT2", "ternary")),
            f"{size['float32'] / size['ternary']:.1f}",
            ", ".join(f"{100 * a:.2f}" for a in accuracy),
            f"{row['codes_compared']:,}",
            f"{row['codes_different']:,}",
        ])  # fmt: skip
    disk_head = "file bytes: float32, INT8, INT2"
    latencies = [["network", "batch", "float32 ms", "INT8 ms", "INT2 ms", disk_head]]
    for row in rows:
        disk = ", ".join(f"{row['disk_bytes'][k]:,}" for k in ("float32", "INT8", "INT2"))
        for batch, times in row["milliseconds"].items():
            spent = [f"{times[k]:.3f}" for k in ("float32", "INT8", "INT2")]
            name = f"{row['network']} {row['width']}"
            latencies.append([name, batch, *spent, disk])
    return f"{markdown(sizes)}\n\n{markdown(latencies)}"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = command_line(__doc__, quick="two networks on digits, 6 × 10 steps", json=RESULTS)
    parser.add_argument(
        "--data", choices=("fashion_mnist", "digits"), help="fashion_mnist if omitted"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    data = load(options.data or ("digits" if options.quick else "fashion_mnist"))
    epochs, steps, repeats = (6, 10, 20) if options.quick else (6, 100, 300)
    rows = []
    for name in list(NETWORKS)[: 2 if options.quick else None]:
        rows.append(measure(name, data, epochs, steps, options.seed, repeats))
        print(f"{name} done", flush=True)
    print(table(rows))
    if options.json:
        packages = ("onnx", "onnxruntime", "qonnx")
        environment = describe() | {name: metadata.version(name) for name in packages}
        content = {
            "environment": environment,
            "seed": options.seed,
            "data": data.name,
            "epochs": epochs,
            "steps": steps,
            "rows": rows,
        }
        write_results(options.json, content)


if __name__ == "__main__":
    main()
