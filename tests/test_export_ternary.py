"""The folder for accelerators: what it holds, and what its reader refuses."""

import hashlib
import json
import math
import os
import shutil
import stat

import numpy as np
import pytest
import torch
from export_networks import FAMILIES, random_network, reference_codes
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import learnsched as ls
from learnsched.export import FolderError, QuantizedInput
from learnsched.export import graph as g
from learnsched.export.reference import _quantize as quantized
from learnsched.export.reference import unfold
from learnsched.export.trits import pack, unpack
from learnsched.export.values import integer_levels


@given(st.lists(st.sampled_from([-1, 0, 1]), max_size=60))
def test_trits_come_back(values):
    content = pack(np.array(values, dtype=np.int64))
    assert len(content) == -(-len(values) // 5)
    assert unpack(content, len(values)).tolist() == values
    assert all(byte < 243 for byte in content)


@pytest.mark.parametrize(
    ("content", "count", "match"),
    [
        (b"\x00", 6, "6 trits take 2 bytes, got 1"),
        (b"\x00\x00", 5, "5 trits take 1 bytes, got 2"),
        (b"\xf3", 5, "below 243"),
        (b"\x02", 0, "0 trits take 0"),
        (bytes([81 * 2]), 4, "filled up"),
    ],
)
def test_bytes_that_are_no_trits(content, count, match):
    with pytest.raises(FolderError, match=match):
        unpack(content, count)


def test_only_trits_are_packed():
    with pytest.raises(ValueError, match="-1, 0 and 1"):
        pack(np.array([2]))


@pytest.fixture
def folder(tmp_path):
    net, x = random_network("residual", seed=30)
    ls.export_ternary(net, x, tmp_path / "net")
    return tmp_path / "net"


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_between_the_ends_is_an_integer(family, tmp_path):
    net, x = random_network(family, seed=31)
    ls.export_ternary(net, x, tmp_path / "net")
    reference = ls.integer_reference(tmp_path / "net")
    for node in reference.graph:
        if isinstance(node, g.Product | g.Threshold):
            arrays = [v for v in vars(node).values() if isinstance(v, np.ndarray)]
            assert arrays and all(np.issubdtype(a.dtype, np.integer) for a in arrays)
    found = reference.layers(reference.vectors["input"])
    assert all(
        np.issubdtype(values.dtype, np.integer) for name, values in found.items() if name != "input"
    )


def test_codes_and_real_inputs_give_the_same(folder):
    reference = ls.integer_reference(folder)
    x = torch.randn(70, 1, 8, 8).numpy()
    codes = reference.layers(x)["0"]
    assert codes.dtype == np.int32
    assert np.array_equal(reference(x), reference(codes))
    assert np.array_equal(reference(x)[3:5], reference(x[3:5]))


def test_an_empty_batch(folder):
    assert ls.integer_reference(folder)(np.zeros((0, 1, 8, 8), np.float32)).shape == (0, 10)


def test_an_input_that_is_not_a_number_is_given_the_level_that_pytorch_gives_it(folder):
    quantizer = QuantizedInput(0.05)
    values = torch.tensor([-math.inf, -1.0, math.nan, 1.0, math.inf])
    node = g.Quantize(
        name="x", inputs=(), shape=(), scale=0.05, thresholds=quantizer.levels.thresholds,
        levels=g.IntegerLevels(tuple(map(int, quantizer.levels.values)), 1.0, "unsigned8"),
    )  # fmt: skip
    expected = quantizer.levels.quantize(values / 0.05).int()
    assert torch.equal(torch.from_numpy(quantized(node, values.numpy())), expected)


def test_a_folder_and_its_files_have_the_permissions_that_the_umask_leaves(tmp_path):
    net, x = random_network("mlp", seed=1)
    before = os.umask(0o027)
    try:
        for _ in range(2):
            ls.export_ternary(net, x, tmp_path / "net")
            assert stat.S_IMODE((tmp_path / "net").stat().st_mode) == 0o750
            modes = {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "net").iterdir()}
            assert modes == {0o640}
    finally:
        os.umask(before)


def test_inputs_of_another_shape_or_range(folder):
    reference = ls.integer_reference(folder)
    with pytest.raises(ValueError, match=r"shape \(samples, 1, 8, 8\), got \(1, 8, 8\)"):
        reference(np.zeros((1, 8, 8), np.float32))
    with pytest.raises(ValueError, match="codes from -127 to 127"):
        reference(np.full((1, 1, 8, 8), 200))


def test_sizes_and_the_weights_are_those_of_integer_weights(tmp_path):
    net, x = random_network("cnn2d", seed=32)
    ls.export_ternary(net, x, tmp_path / "net")
    weights = ls.integer_weights(net)
    for name, weight in weights.items():
        content = (tmp_path / "net" / f"1.{name.removeprefix('1.')}.weight.trits").read_bytes()
        assert len(content) == -(-weight.codes.numel() // 5)
        values = unpack(content, weight.codes.numel()).reshape(weight.codes.shape)
        assert np.array_equal(values, weight.integers.numpy())


def test_test_vectors_are_pytorchs(folder, tmp_path):
    net, x = random_network("residual", seed=30)
    _, expected = reference_codes(net, x)
    reference = ls.integer_reference(folder)
    assert np.array_equal(reference.vectors["input"], expected["0"][:8])
    assert np.array_equal(reference.vectors["output"], expected["output"][:8])


def rewrite(folder, change):
    """Change the manifest and make its own hash right again, as whoever tampers can."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    change(manifest)
    content = json.dumps(manifest, sort_keys=True).encode()
    manifest["sha256"] = hashlib.sha256(content).hexdigest()
    path.write_text(json.dumps(manifest))


def weight_file(folder):
    return next(iter(sorted(folder.glob("*.trits"))))


def test_every_altered_byte_is_seen(folder):
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        for position in (0, len(content) // 2, len(content) - 2):
            changed = bytearray(content)
            changed[position] ^= 1
            file.write_bytes(changed)
            with pytest.raises(FolderError):
                ls.integer_reference(folder)
        file.write_bytes(content)
    ls.integer_reference(folder)


def test_truncated_and_missing_files(folder):
    file = weight_file(folder)
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(FolderError, match=f"{file.name} has {len(content) - 1} bytes.*truncated"):
        ls.integer_reference(folder)
    file.unlink()
    with pytest.raises(FolderError, match=f"{file.name} is missing"):
        ls.integer_reference(folder)
    (folder / "manifest.json").write_text((folder / "manifest.json").read_text()[:-40])
    with pytest.raises(FolderError, match="not whole JSON"):
        ls.integer_reference(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"manifest\.json is missing"):
        ls.integer_reference(folder)


def test_altered_file_of_the_same_size(folder):
    file = weight_file(folder)
    content = bytearray(file.read_bytes())
    content[0] = (content[0] + 1) % 243
    file.write_bytes(content)
    with pytest.raises(FolderError, match=f"{file.name} was altered"):
        ls.integer_reference(folder)


def test_altered_manifest(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"row_low": 0', '"row_low": 1', 1))
    with pytest.raises(FolderError, match=r"manifest\.json was altered"):
        ls.integer_reference(folder)


def test_unlisted_file(folder):
    (folder / "extra.bin").write_bytes(b"")
    with pytest.raises(FolderError, match=r"extra.bin.*not listed"):
        ls.integer_reference(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/b", "..", "a\\b", ""])
def test_paths_that_lead_out_of_the_folder(folder, name):
    (folder.parent / "secret").write_bytes(b"")
    stated = {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    rewrite(folder, lambda m: m["files"].update({name: stated}))
    with pytest.raises(FolderError, match="leads out of the folder"):
        ls.integer_reference(folder)


def test_links_are_not_followed(folder):
    file = weight_file(folder)
    shutil.move(file, folder.parent / "elsewhere")
    file.symlink_to(folder.parent / "elsewhere")
    with pytest.raises(FolderError, match="not a plain file"):
        ls.integer_reference(folder)


def test_other_formats_and_versions(folder, tmp_path):
    rewrite(folder, lambda m: m.update(version=3))
    with pytest.raises(FolderError, match="version 3, this learnsched reads 2"):
        ls.integer_reference(folder)
    rewrite(folder, lambda m: m.update(format="onnx"))
    with pytest.raises(FolderError, match="another format"):
        ls.integer_reference(folder)
    (folder / "manifest.json").write_text("[]")
    with pytest.raises(FolderError, match="another format"):
        ls.integer_reference(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError):
        ls.integer_reference(tmp_path / "empty")
    with pytest.raises(FileNotFoundError):
        ls.integer_reference(tmp_path / "nowhere")


def test_test_vectors_that_do_not_come_out(folder):
    # A whole and well-formed folder whose arithmetic is wrong.
    file = folder / "output.vectors.i32"
    values = np.frombuffer(file.read_bytes(), "<i4").copy()
    values[0] += 1
    file.write_bytes(values.tobytes())
    digest = hashlib.sha256(values.tobytes()).hexdigest()
    rewrite(folder, lambda m: m["files"][file.name].update(sha256=digest))
    with pytest.raises(FolderError, match="1 accumulators of the test vectors differ"):
        ls.integer_reference(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["layers"].pop(),
        lambda m: m["layers"].pop(1),
        lambda m: m["layers"].append(m["layers"][2]),
        lambda m: m["layers"][2].pop("weight"),
        lambda m: m["layers"][2].update(kind="attention"),
        lambda m: m["layers"][2].update(inputs=["later"]),
        lambda m: m["layers"][2]["weight"].update(shape=[1, 1, 3, 3]),
        lambda m: m["layers"][2]["weight"].update(shape=[-8, -1, 3, 3]),
        lambda m: m["layers"][2]["weight"].update(file="other.trits"),
        lambda m: m["layers"][3]["thresholds"].update(kind="f32"),
        lambda m: m.update(layers=3),
        lambda m: m.update(layers=[]),
        lambda m: m.pop("vectors"),
        lambda m: m.update(files=[]),
        lambda m: m["files"].popitem(),
    ],
)
def test_manifests_that_describe_no_network(folder, change):
    rewrite(folder, change)
    with pytest.raises(FolderError):
        ls.integer_reference(folder)


def test_an_export_replaces_an_export_and_nothing_else(folder, tmp_path):
    net, x = random_network("mlp", seed=33)
    ls.export_ternary(net, x, folder)
    assert "1.1" in ls.integer_reference(folder).layers(x.numpy())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("!")
    for target in (tmp_path / "mine", tmp_path / "mine" / "thesis.tex"):
        with pytest.raises(FileExistsError, match="new folder"):
            ls.export_ternary(net, x, target)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "!"
    (folder / "notes.txt").write_text("!")
    with pytest.raises(FileExistsError, match=r"notes\.txt for one"):
        ls.export_ternary(net, x, folder)
    assert (folder / "notes.txt").read_text() == "!"
    ls.export_ternary(net, x, tmp_path / "new" / "inner")
    ls.integer_reference(tmp_path / "new" / "inner")


def test_an_export_that_cannot_be_put_in_place_leaves_the_earlier_one(
    folder, tmp_path, monkeypatch
):
    net, x = random_network("mlp", seed=33)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    replace, calls = os.replace, []

    def second_fails(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("no space left")
        replace(source, target)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(OSError, match="no space left"):
        ls.export_ternary(net, x, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["net"]


def test_module_names_that_are_no_file_names(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.front = QuantizedInput(0.05)
            self.add_module("a/b", nn.Linear(6, 4))
            self.act = nn.ReLU()

        def forward(self, x):
            return self.act(self.get_submodule("a/b")(self.front(x)))

    with pytest.warns(UserWarning):
        net = ls.finalize_(ls.quantize_(Odd(), ls.ternary(), ls.unsigned(2)))
    ls.export_ternary(net, torch.randn(4, 6), tmp_path / "net")
    assert ls.integer_reference(tmp_path / "net")(np.zeros((1, 6), np.float32)).shape == (1, 4)


def test_unfold_equals_torch():
    x = torch.randint(-3, 4, (2, 3, 9, 8))
    window = g.Window(stride=(2, 1), padding=(1, 2), dilation=(1, 2))
    mine = unfold(x.numpy(), (3, 2), window, fill=0)
    theirs = nn.functional.unfold(x.float(), (3, 2), (1, 2), (1, 2), (2, 1))
    assert np.array_equal(np.moveaxis(mine, (4, 5), (2, 3)).reshape(theirs.shape), theirs.numpy())


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16, torch.float32])
def test_the_scale_of_inputs_is_that_of_their_largest_magnitude(dtype):
    x = torch.tensor([-128, 5]).to(dtype)
    assert QuantizedInput.fit(x).scale.item() == pytest.approx(128 / 127)


@pytest.mark.parametrize(
    "values, integers, unit",
    [
        ((-128.0, 0.0, 127.0), (-128, 0, 127), 1.0),
        ((-0.5, 0.0, 0.75), (-2, 0, 3), 0.25),
        ((-4.0, 0.0, 2.0), (-2, 0, 1), 2.0),
        ((-1.0, 0.0, 0.1), None, None),
    ],
)
def test_levels_are_multiples_of_the_largest_unit(values, integers, unit):
    found = integer_levels(values)
    assert (found and found.integers, found and found.unit) == (integers, unit)
