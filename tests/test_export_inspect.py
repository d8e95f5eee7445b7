"""The report for a hardware engineer."""

import pytest
import torch
from export_networks import random_network
from torch import nn

import learnsched as ls
from learnsched.export import FolderError, QuantizedInput
from learnsched.export.inspect import inspect


def make():
    torch.manual_seed(0)
    net = nn.Sequential(
        QuantizedInput(0.05),
        nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    x = torch.randn(6, 1, 8, 8)
    ls.quantize_(net, ls.ternary(), ls.unsigned(2))
    return ls.finalize_(net, [x]).eval(), x


def test_ternary_folder_by_hand(tmp_path):
    net, x = make()
    ls.export_ternary(net, x, tmp_path / "net")
    report = inspect(tmp_path / "net")
    conv, linear = report.layers
    weights = ls.integer_weights(net)
    assert (conv.weights, conv.weight_bytes, conv.operations) == (36, 8, 36 * 64)
    assert (linear.weights, linear.weight_bytes, linear.operations) == (640, 128, 640)
    assert conv.zeros == int((weights["1"].integers == 0).sum())
    assert (conv.output_bits, linear.output_bits) == (2, 32)
    assert conv.shape == (4, 8, 8) and conv.activation_bytes == 4 * 64 * 2 // 8
    # 8-bit inputs and 2-bit codes; then pooled codes, and an accumulator for each of ten outputs.
    assert (conv.input_bytes, linear.input_bytes) == (64, 16)
    assert linear.activation_bytes == 40
    assert report.activation_bytes == 64 + 64
    assert report.sparsity == (conv.zeros + linear.zeros) / 676
    assert report.operations == 36 * 64 + 640
    assert report.nonzero_operations == (36 - conv.zeros) * 64 + 640 - linear.zeros
    assert report.file_bytes == sum(f.stat().st_size for f in (tmp_path / "net").iterdir())
    text = str(report)
    assert "learnsched-ternary 2" in text and "4×8×8" in text and "multiply-accumulates" in text


@pytest.mark.parametrize("kind", ["folder", "onnx", "qonnx"])
def test_codes_of_pooled_accumulators_are_counted_where_they_are(kind, tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(
        QuantizedInput(0.05),
        nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    x = torch.randn(6, 1, 8, 8)
    ls.finalize_(ls.quantize_(net, ls.ternary(), ls.unsigned(2)), [x]).eval()
    if kind != "folder":
        pytest.importorskip("onnx")
    write = {"folder": ls.export_ternary, "onnx": ls.export_onnx, "qonnx": ls.export_qonnx}[kind]
    write(net, x, tmp_path / "net")
    conv, linear = inspect(tmp_path / "net").layers
    # 64 codes of 2 bits: the four by four places of four channels that the pool leaves.
    assert conv.shape == (4, 8, 8)
    assert (conv.activation_bytes, linear.input_bytes) == (16, 16)


def test_files_agree_with_the_folder(tmp_path):
    pytest.importorskip("onnx")
    for family in ("mlp", "cnn1d", "residual"):
        net, x = random_network(family, seed=50)
        ls.export_ternary(net, x, tmp_path / "net")
        ls.export_onnx(net, x, tmp_path / "net.onnx")
        ls.export_onnx(net, x, tmp_path / "wide.onnx", opset=21)
        ls.export_qonnx(net, x, tmp_path / "net.qonnx")
        folder = inspect(tmp_path / "net")
        for name, bits in (("net.onnx", 2), ("wide.onnx", 8), ("net.qonnx", 2)):
            report = inspect(tmp_path / name)
            assert [a.name for a in report.layers] == [a.name for a in folder.layers]
            assert report.operations == folder.operations
            assert report.sparsity == folder.sparsity
            assert {layer.weight_bits for layer in report.layers} == {bits}
            if bits == 2:
                mine = [layer.output_bits for layer in report.layers]
                assert mine == [layer.output_bits for layer in folder.layers]
                read = [layer.input_bytes for layer in report.layers]
                assert read == [layer.input_bytes for layer in folder.layers]
            assert str(report)
    assert "QONNX" in inspect(tmp_path / "net.qonnx").format


def test_real_layers_are_shown(tmp_path):
    pytest.importorskip("onnx")
    net = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    ls.quantize_(net, ls.ternary(), ls.unsigned(2), skip=["first"])
    ls.export_onnx(ls.finalize_(net), torch.randn(3, 8), tmp_path / "net.onnx")
    first, last = inspect(tmp_path / "net.onnx").layers
    assert (first.name, first.weight_bits, first.weight_bytes) == ("0", 32, 192)
    assert (last.name, last.weight_bits, last.weight_bytes) == ("3", 2, 3)


def test_what_is_no_export(tmp_path):
    onnx = pytest.importorskip("onnx")
    (tmp_path / "text.onnx").write_text("no")
    (tmp_path / "empty.onnx").write_text("")
    for name in ("text.onnx", "empty.onnx"):
        with pytest.raises(FolderError, match="no ONNX file"):
            inspect(tmp_path / name)
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    x, y = (onnx.helper.make_tensor_value_info(name, 1, [1, 2]) for name in "xy")
    graph = onnx.helper.make_graph([node], "g", [x], [y])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "other.onnx")
    with pytest.raises(FolderError, match="has no linear layer or convolution"):
        inspect(tmp_path / "other.onnx")
    # A product of two activations, and one of a tensor whose shape nothing tells.
    for inputs in (["x", "x"], ["h", "x"]):
        nodes = [onnx.helper.make_node("Relu", ["x"], ["h"])]
        nodes.append(onnx.helper.make_node("MatMul", inputs, ["y"]))
        graph = onnx.helper.make_graph(nodes, "g", [x], [y])
        onnx.save(onnx.helper.make_model(graph), tmp_path / "product.onnx")
        with pytest.raises(FolderError, match="was not written by export_onnx or export_qonnx"):
            inspect(tmp_path / "product.onnx")
    with pytest.raises(FileNotFoundError):
        inspect(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError):
        inspect(tmp_path)


def test_a_folder_without_layers_is_refused(tmp_path):
    net = ls.quantize_(nn.Sequential(QuantizedInput(0.1), nn.ReLU()), activation=ls.unsigned(2))
    ls.export_ternary(ls.finalize_(net), torch.randn(4, 8), tmp_path / "net")
    with pytest.raises(FolderError, match="net has no linear layer or convolution"):
        inspect(tmp_path / "net")
