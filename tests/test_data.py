"""Data sets: splits are fixed, disjoint, standardised, and broken files are refused by name."""

from __future__ import annotations

import gzip
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from learnsched.data import DATA_SETS, DataSet, Split, load, standardised, stratified
from learnsched.data.fashion_mnist import read_idx

VECTORS = ("products", "clusters", "teacher", "hypercube", "friedman", "quadrics")


@pytest.fixture(scope="module")
def mnist1d() -> DataSet:
    return load("mnist1d")


@pytest.fixture(scope="module")
def digits() -> DataSet:
    return load("digits")


def write_idx(path: Path, values: np.ndarray) -> None:
    header = bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))


@pytest.fixture
def fashion_folder(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for part, count in (("train", 120), ("t10k", 30)):
        write_idx(
            tmp_path / f"{part}-images-idx3-ubyte.gz", generator.integers(0, 256, (count, 28, 28))
        )
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", np.arange(count) % 10)
    return tmp_path


@pytest.fixture
def cifar_folder(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        labels = np.arange(20)[:, None] % 10
        # channels of very different brightness show a mean that is not taken channel by channel
        planes = generator.integers(0, [[[10], [100], [250]]], (20, 3, 1024)).reshape(20, -1)
        (tmp_path / f"{name}.bin").write_bytes(
            np.hstack([labels, planes]).astype(np.uint8).tobytes()
        )
    return tmp_path


def rows(split: Split) -> set[bytes]:
    return {x.numpy().tobytes() for x in split.x}


def assert_disjoint(data: DataSet) -> None:
    train, validation, test = rows(data.train), rows(data.validation), rows(data.test)
    assert len(train) == len(data.train)
    assert train.isdisjoint(validation)
    assert train.isdisjoint(test)
    assert validation.isdisjoint(test)


def assert_standardised(data: DataSet, dims: tuple[int, ...]) -> None:
    assert data.train.x.dtype == torch.float32
    assert data.train.y.dtype == torch.int64
    mean, std = data.train.x.double().mean(dims), data.train.x.double().std(dims, correction=0)
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-6, rtol=0)
    torch.testing.assert_close(std, torch.ones_like(std), atol=1e-5, rtol=0)


def test_mnist1d_has_the_published_sizes_and_a_fresh_validation_split(mnist1d: DataSet) -> None:
    assert (mnist1d.name, mnist1d.classes, mnist1d.shape) == ("mnist1d", 10, (40,))
    assert [len(s) for s in (mnist1d.train, mnist1d.validation, mnist1d.test)] == [4000, 2000, 1000]
    assert_disjoint(mnist1d)
    assert_standardised(mnist1d, (0, 1))
    # the validation split is another draw of the same distribution
    assert abs(float(mnist1d.validation.x.mean())) < 0.02
    assert abs(float(mnist1d.validation.x.std()) - 1) < 0.02


def test_loading_again_gives_the_generators_data_to_the_bit_and_keeps_random_states(
    mnist1d: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mnist1d.data as generator

    made, make = [], generator.make_dataset

    def spy(arguments: Any) -> Any:
        made.append((arguments.seed, make(arguments)))
        return made[-1][1]

    monkeypatch.setattr(generator, "make_dataset", spy)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    again = load("mnist1d")
    assert random.getstate() == states[0]
    for kept, now in zip(states[1], np.random.get_state(), strict=True):
        np.testing.assert_array_equal(now, kept)
    assert torch.equal(torch.get_rng_state(), states[2])

    assert again.sha256 == mnist1d.sha256
    assert torch.equal(again.validation.x, mnist1d.validation.x)
    (seed, published), (other_seed, other) = made
    assert (seed, other_seed) == (42, 43)
    np.testing.assert_array_equal(again.train.y.numpy(), published["y"])
    np.testing.assert_array_equal(again.test.y.numpy(), published["y_test"])
    np.testing.assert_array_equal(again.validation.y.numpy(), other["y"][:2000])
    x = (published["x_test"] - published["x"].mean()) / published["x"].std()
    np.testing.assert_allclose(again.test.x.numpy(), x, atol=1e-5)


def test_random_states_are_restored_when_the_generator_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import mnist1d.data

    def fail(_: object) -> None:
        random.seed(0)
        np.random.seed(0)
        raise RuntimeError("generator")

    monkeypatch.setattr(mnist1d.data, "make_dataset", fail)
    python, numpy = random.getstate(), np.random.get_state()
    with pytest.raises(RuntimeError, match="generator"):
        load("mnist1d")
    assert random.getstate() == python
    for kept, now in zip(numpy, np.random.get_state(), strict=True):
        np.testing.assert_array_equal(now, kept)


def test_digits_are_split_stratified_and_always_alike(digits: DataSet) -> None:
    assert (digits.name, digits.classes, digits.shape) == ("digits", 10, (1, 8, 8))
    assert [len(s) for s in (digits.train, digits.validation, digits.test)] == [1000, 297, 500]
    assert_disjoint(digits)
    assert_standardised(digits, (0, 1, 2, 3))
    share = digits.train.y.bincount() / 1000
    for split in (digits.validation, digits.test):
        assert (split.y.bincount() / len(split) - share).abs().max() < 0.01
    torch.manual_seed(7)
    # pixels are whole numbers, so that the hash is the same on every machine
    assert load("digits").sha256 == digits.sha256
    assert digits.sha256.startswith("ac4256aa4895")


def test_hash_tells_values_labels_and_splits_apart(digits: DataSet) -> None:
    def changed(**parts: Split) -> DataSet:
        splits = {n: getattr(digits, n) for n in ("train", "validation", "test")} | parts
        return DataSet("digits", **splits, classes=10)

    x = digits.test.x.clone()
    x[-1, 0, 0, 0] += 1e-3
    hashes = {
        digits.sha256,
        changed(test=Split(x, digits.test.y)).sha256,
        changed(test=Split(digits.test.x, digits.test.y.flip(0))).sha256,
        changed(validation=digits.test, test=digits.validation).sha256,
    }
    assert len(hashes) == 4
    assert changed(test=Split(digits.test.x.clone(), digits.test.y)).sha256 == digits.sha256


def test_splits_are_frozen_and_checked() -> None:
    split = Split(torch.zeros(2, 3), torch.tensor([0, 1]))
    with pytest.raises(FrozenInstanceError):
        split.y = torch.tensor([1, 0])  # type: ignore[misc]
    with pytest.raises(ValueError, match=r"int64.*float32"):
        Split(torch.zeros(2, 3), torch.zeros(2))
    with pytest.raises(ValueError, match=r"2 labels need inputs of shape \(2, \.\.\.\)"):
        Split(torch.zeros(3, 3), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"\[0, 1\).*0 to 1 in the train split"):
        DataSet("toy", split, split, split, classes=1)
    with pytest.raises(ValueError, match="validation split of toy is empty"):
        DataSet("toy", split, Split(torch.zeros(0, 3), torch.zeros(0).long()), split, classes=2)
    with pytest.raises(ValueError, match=r"\(3,\) in the train split, but \(4,\) in the test"):
        DataSet("toy", split, split, Split(torch.zeros(2, 4), split.y), classes=2)


@pytest.mark.parametrize("value", [1.0, float("nan"), float("inf")])
def test_a_channel_that_cannot_be_standardised_is_refused(value: float) -> None:
    split = Split(torch.full((2, 3), value), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="every channel of toy must vary"):
        standardised("toy", split, split, split, classes=2)


def test_stratified_choices_are_disjoint_complete_and_proportional() -> None:
    y = torch.cat([torch.zeros(600), torch.ones(300), torch.full((100,), 2.0)]).long()
    state = torch.get_rng_state()
    choices = stratified(y, (500, 300, 200), seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(set(torch.cat(choices).tolist())) == 1000
    for choice in (*choices, choices[0][:100]):
        shares = y[choice].bincount(minlength=3) / len(choice)
        assert (shares - torch.tensor([0.6, 0.3, 0.1])).abs().max() < 0.011
    assert torch.equal(choices[1], stratified(y, (500, 300, 200), seed=3)[1])
    assert not torch.equal(choices[1], stratified(y, (500, 300, 200), seed=4)[1])
    with pytest.raises(ValueError, match=r"cannot choose \(900, 101\) of 1000"):
        stratified(y, (900, 101), seed=0)
    with pytest.raises(ValueError, match="at least 0"):
        stratified(y, (-1, 3), seed=0)


def test_shifted_digits_hold_the_digits_somewhere(digits: DataSet) -> None:
    shifted = load("shifted_digits")
    assert shifted.shape == (1, 16, 16) and shifted.classes == 10
    assert [len(s) for s in (shifted.train, shifted.validation, shifted.test)] == [4000, 297, 500]
    places = set()
    for copy in range(4):
        part = shifted.train.y[1000 * copy : 1000 * (copy + 1)]
        assert torch.equal(part, digits.train.y)
    for index in range(40):
        image, digit = shifted.train.x[index], digits.train.x[index]
        # The place where image and digit agree best, by brute force.
        score = torch.nn.functional.conv2d(image[None], digit[None])[0, 0]
        top, left = divmod(int(score.argmax()), 9)
        window = image[0, top : top + 8, left : left + 8].flatten()
        found = torch.corrcoef(torch.stack([window, digit.flatten()]))[0, 1]
        assert float(found) > 0.85
        places.add((top, left))
    assert len(places) > 20
    assert load("shifted_digits").sha256 == shifted.sha256


def test_noisy_digits_are_the_digits_under_noise(digits: DataSet) -> None:
    noisy = load("noisy_digits")
    assert_standardised(noisy, (0, 1, 2, 3))
    assert [len(s) for s in (noisy.train, noisy.validation, noisy.test)] == [4000, 297, 500]
    assert torch.equal(noisy.train.y, digits.train.y.repeat(4))
    assert torch.equal(noisy.test.y, digits.test.y)
    copies = noisy.train.x.unflatten(0, (4, 1000))
    # Images of variance 1 and noise of variance 0.64, standardised together.
    noise = copies * 1.64**0.5 - digits.train.x
    assert float(noise.std()) == pytest.approx(0.8, abs=0.01)
    correlation = float((noise[0] * noise[1]).mean()) / 0.64
    assert abs(correlation) < 0.02, "each copy has noise of its own"
    assert load("noisy_digits").sha256 == noisy.sha256


def test_unknown_names_and_useless_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'mnist'; choose one of .*fashion_mnist, cifar10"):
        load("mnist")
    with pytest.raises(ValueError, match="digits is not read from files"):
        load("digits", tmp_path)
    assert set(DATA_SETS) == {
        "mnist1d", "digits", "noisy_digits", "shifted_digits", "fashion_mnist", "cifar10", *VECTORS,
    }  # fmt: skip


@pytest.mark.parametrize("name", VECTORS)
def test_vectors_are_always_alike_and_no_class_is_rare(name: str) -> None:
    data = load(name)
    assert data.name == name and len(data.shape) == 1
    assert [len(s) for s in (data.train, data.validation, data.test)] == [4000, 1000, 1000]
    assert_disjoint(data)
    assert float(data.train.x.mean()) == pytest.approx(0, abs=1e-4)
    for split in (data.train, data.validation, data.test):
        assert split.y.bincount(minlength=data.classes).min() > 0.03 * len(split)
    assert load(name).sha256 == data.sha256


def test_products_cannot_be_told_from_single_numbers_and_friedman_s_fifths_are_even() -> None:
    data = load("products")
    x, y = data.test.x.double(), data.test.y
    # Standardised by one mean and deviation, which are nearly 0 and 1.
    score = x[:, 0] * x[:, 1] + x[:, 2] * x[:, 3] + 0.5 * x[:, 4]
    assert float(((score > 0) == (y == 1)).double().mean()) > 0.97
    each = [float((((x[:, n] > 0) == (y == 1)).double().mean() - 0.5).abs()) for n in range(20)]
    assert max(each[:4] + each[5:]) < 0.06 < each[4]
    shares = torch.cat([getattr(load("friedman"), s).y for s in ("train", "validation", "test")])
    assert shares.bincount().tolist() == [1200] * 5


def test_fashion_mnist_is_read_from_idx_files(
    fashion_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load("fashion_mnist", fashion_folder)
    assert data.shape == (1, 28, 28)
    assert [len(s) for s in (data.train, data.validation, data.test)] == [110, 10, 30]
    assert data.validation.y.bincount().tolist() == [1] * 10
    assert_disjoint(data)
    assert_standardised(data, (0, 1, 2, 3))
    # the test split keeps the file's order, and the inverse map gives its bytes back
    pixels = read_idx(fashion_folder / "t10k-images-idx3-ubyte.gz")
    scale = (data.test.x.max() - data.test.x.min()) / (pixels.max() - pixels.min())
    raw = (data.test.x - data.test.x.min()) / scale + pixels.min()
    assert torch.equal(raw.round().squeeze(1), pixels.float())
    assert data.test.y.tolist() == [i % 10 for i in range(30)]
    monkeypatch.setenv("LEARNSCHED_FASHION_MNIST", str(fashion_folder))
    assert load("fashion_mnist").sha256 == data.sha256


def test_missing_fashion_files_name_the_file_and_the_remedies(fashion_folder: Path) -> None:
    (fashion_folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        load("fashion_mnist", fashion_folder)
    for word in (
        str(fashion_folder / "t10k-labels-idx1-ubyte.gz"),
        "apt-get install dataset-fashion-mnist",
        "folder=",
        "LEARNSCHED_FASHION_MNIST",
    ):
        assert word in str(caught.value)


def rezip(change: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    return lambda content: gzip.compress(change(gzip.decompress(content)))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c[: len(c) // 2], "not a whole gzip file"),
        (lambda c: c[:-8] + b"12345678", "not a whole gzip file"),
        (lambda c: c[:30] + bytes(64) + c[94:], "not a whole gzip file"),
        (lambda _: b"", "magic number 00 00 08 and its sizes, got nothing"),
        (lambda _: b"plain text", "not a whole gzip file"),
        (rezip(lambda c: c[:-1]), "94080 bytes, but holds 94079"),
        (rezip(lambda c: c + b"0"), "94080 bytes, but holds 94081"),
        (rezip(lambda c: b"\0\0\x0d" + c[3:]), "00 00 08 and its sizes, got 00 00 0d 03"),
        (rezip(lambda c: c[:6]), "00 00 08 and its sizes"),
        (rezip(lambda _: b""), "00 00 08 and its sizes"),
        (rezip(lambda c: c[:8] + b"\0\0\0\x0e\0\0\0\x38" + c[16:]), "images of 28 × 28"),
    ],
)
def test_damaged_idx_files_are_refused_by_name(
    fashion_folder: Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    path = fashion_folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        load("fashion_mnist", fashion_folder)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "message"), [(np.arange(119) % 10, "120 labels"), (np.arange(120) % 11, "below 10")]
)
def test_idx_labels_must_fit_the_images(
    fashion_folder: Path, labels: np.ndarray, message: str
) -> None:
    path = fashion_folder / "train-labels-idx1-ubyte.gz"
    write_idx(path, labels)
    with pytest.raises(ValueError, match=message) as caught:
        load("fashion_mnist", fashion_folder)
    assert str(path) in str(caught.value)


def test_the_real_fashion_mnist_if_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LEARNSCHED_FASHION_MNIST", raising=False)
    try:
        data = load("fashion_mnist")
    except FileNotFoundError:
        pytest.skip("the Debian package dataset-fashion-mnist is not installed")
    assert [len(s) for s in (data.train, data.validation, data.test)] == [55000, 5000, 10000]
    assert data.validation.y.bincount().tolist() == [500] * 10
    assert data.sha256.startswith("fd3c14506b57")


def test_cifar10_is_read_from_its_binary_layout(
    cifar_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load("cifar10", cifar_folder)
    assert data.shape == (3, 32, 32)
    assert [len(s) for s in (data.train, data.validation, data.test)] == [90, 10, 20]
    assert data.validation.y.bincount().tolist() == [1] * 10
    assert_disjoint(data)
    assert_standardised(data, (0, 2, 3))
    # planes are red, green, blue, row by row: the standardised values keep the order of the bytes
    record = np.frombuffer((cifar_folder / "test_batch.bin").read_bytes(), np.uint8)[:3073]
    planes = record[1:].reshape(3, 32, 32).astype(float)
    for channel in range(3):
        correlation = np.corrcoef(planes[channel].ravel(), data.test.x[0, channel].flatten())
        assert correlation[0, 1] > 1 - 1e-6
    assert data.test.y[:3].tolist() == [0, 1, 2]
    monkeypatch.setenv("LEARNSCHED_CIFAR10", str(cifar_folder))
    assert load("cifar10").sha256 == data.sha256


def test_cifar10_needs_a_folder_with_all_files(
    cifar_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LEARNSCHED_CIFAR10", raising=False)
    with pytest.raises(FileNotFoundError, match=r"no folder is named.*LEARNSCHED_CIFAR10"):
        load("cifar10")
    (cifar_folder / "data_batch_4.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"data_batch_4\.bin is missing"):
        load("cifar10", cifar_folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c[:-1], "whole records of 3073 bytes, got 61459 bytes"),
        (lambda _: b"", "got 0 bytes"),
        (lambda c: b"\x0a" + c[1:], "labels below 10, got 10"),
    ],
)
def test_damaged_cifar_files_are_refused_by_name(
    cifar_folder: Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    path = cifar_folder / "data_batch_2.bin"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        load("cifar10", cifar_folder)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(("name", "package"), [("mnist1d", "mnist1d"), ("digits", "scikit-learn")])
def test_a_missing_package_is_named(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mnist1d.data", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=f"pip install {package}"):
        load(name)


def test_importing_the_package_is_light() -> None:
    code = (
        "import sys, learnsched.data, learnsched.plotting; "
        "print([m for m in ('sklearn', 'mnist1d', 'matplotlib', 'scipy') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
