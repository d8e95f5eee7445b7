"""Killed at any instant, on a full disk, in a read-only folder: the state on disk stays whole.

Runs are children of a fork server, so that a start takes milliseconds and fifty kills are cheap.
"""

import dataclasses
import errno
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_task import SMALL

import learnsched as ls
from learnsched.data import load
from learnsched.files import write, write_text
from learnsched.meta.presets import PRESETS
from learnsched.meta.trainer import MetaTrainer
from learnsched.policies import LearnedPolicy, MetaNetwork

OUTER_STEPS = 4
EPOCHS = 6

CONTEXT = multiprocessing.get_context("forkserver")
PRELOAD = ["learnsched.meta.trainer", "higher", "sklearn.datasets", "torch._dynamo", "pytest"]
CONTEXT.set_forkserver_preload(PRELOAD)


def digits():
    return load("digits")


def meta_train(folder):
    """A tiny meta-training run that goes on where the folder's checkpoint is."""
    preset = PRESETS["quick"]
    mix = dataclasses.replace(
        preset.trainer.mix,
        architectures=(("digits", "mlp", (4,), (2,)),),
        horizons=(2,), total_steps=(4, 5), members=2, tasks=1, fine_tuning=0.0,
    )  # fmt: skip
    task = dataclasses.replace(SMALL, width=4, depth=2, horizon=2, steps=2)
    config = dataclasses.replace(preset.trainer, mix=mix, validation=(task,), validate_every=2)
    torch.manual_seed(0)
    policy = LearnedPolicy(MetaNetwork(6, 4), preset.base, preset.domain)
    MetaTrainer(policy, config, folder, {"digits": digits()}).run(OUTER_STEPS)


def user_train(folder):
    """What a careful user writes: a checkpoint after every epoch, put in place whole."""
    path = Path(folder) / "last.pt"
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Dropout(0.1),
        torch.nn.Linear(8, 10),
    )  # fmt: skip
    ls.quantize_(model, ls.ternary(), ls.unsigned(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    policy = ls.policies.IncrementalQuantization(3, partition="random")
    scheduler = ls.QuantizationScheduler(model, policy, EPOCHS, optimizer=optimizer)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    if path.exists():
        state = torch.load(path, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["random"])
    data = digits().train
    for _ in range(scheduler.epoch, EPOCHS):
        for rows in torch.randperm(256).split(64):
            loss = torch.nn.functional.cross_entropy(model(data.x[rows].flatten(1)), data.y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step({"train_loss": loss.item()})
        state = {name: part.state_dict() for name, part in parts.items()}
        state["random"] = torch.get_rng_state()
        write(path, lambda temporary, state=state: torch.save(state, temporary))


RUNS = {"meta-training": meta_train, "a user's training": user_train}


def whole_files(folder):
    """Every file under its final name can be read; returns what must not depend on crashes."""
    found = {}
    for path in Path(folder).iterdir():
        if path.name.startswith("."):
            continue  # what a killed process was writing
        if path.suffix == ".safetensors":
            found.update(load_file(path))
        elif path.suffix == ".pt":
            state = torch.load(path, weights_only=True)
            found.update(state["model"], random=state["random"])
            found["settings"] = state["scheduler"]["settings"]
        elif path.suffix == ".jsonl":
            entries = [json.loads(line) for line in path.read_text().splitlines()]
            found["log"] = [{k: v for k, v in e.items() if k != "seconds"} for e in entries]
        else:
            found[path.name] = json.loads(path.read_text())
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        same = torch.equal(found[key], value) if hasattr(value, "shape") else found[key] == value
        assert same, key


def child(run, folder, instruction):
    torch.set_num_threads(1)
    if instruction is not None:
        instruction()
    run(folder)


def start(run, folder, instruction=None):
    process = CONTEXT.Process(target=child, args=(run, str(folder), instruction))
    process.start()
    return process


def finish(run, folder):
    process = start(run, folder)
    process.join(300)
    assert process.exitcode == 0
    return whole_files(folder)


@pytest.fixture(scope="module", params=RUNS.values(), ids=RUNS)
def run(request):
    return request.param


@pytest.fixture(scope="module")
def uninterrupted(run, tmp_path_factory):
    """The run's files, and how long it took."""
    folder = tmp_path_factory.mktemp("whole")
    finish(run, folder)  # the first child also waits for the fork server to import everything
    began = time.monotonic()
    folder = tmp_path_factory.mktemp("again")
    files = finish(run, folder)
    return files, time.monotonic() - began


def kill_at_random(run, folder, kills, duration, seed=0):
    """Kill and start again until the run has been hit so many times; returns the hits."""
    instants, hits = random.Random(seed), 0
    for attempt in range(kills):
        process = start(run, Path(folder) / f"{attempt // 10}", None)
        process.join(instants.uniform(0, duration / 2))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            hits += 1
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        whole_files(Path(folder) / f"{attempt // 10}")
    return hits


def check_random_kills(run, uninterrupted, folder, kills):
    expected, duration = uninterrupted
    # A new run every ten kills, so that all stages of a run are hit.
    for part in range(-(-kills // 10)):
        (folder / f"{part}").mkdir()
    hits = kill_at_random(run, folder, kills, duration)
    assert hits > kills / 2
    for part in range(-(-kills // 10)):
        assert_same(finish(run, folder / f"{part}"), expected)


def test_a_few_kills_at_random_change_nothing(run, uninterrupted, tmp_path):
    check_random_kills(run, uninterrupted, tmp_path, 5)


@pytest.mark.slow
def test_fifty_kills_at_random_change_nothing(run, uninterrupted, tmp_path):
    check_random_kills(run, uninterrupted, tmp_path, 50)


class KillAt:
    """Kill the process itself just before its n-th operation on files of a folder."""

    def __init__(self, folder, number):
        self.folder, self.left = str(folder), number

    def __call__(self):
        sys.addaudithook(self.watch)

    def watch(self, event, args):
        if event in FILE_EVENTS and self.folder in str(args[0]):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


FILE_EVENTS = ("open", "os.rename", "os.remove", "os.chmod", "os.mkdir", "tempfile.mkstemp")


def check_kills_at_file_operations(run, uninterrupted, folder, numbers):
    expected, _ = uninterrupted
    survived = 0
    for number in numbers:
        process = start(run, folder, KillAt(folder, number))
        process.join(300)
        survived += process.exitcode == 0
        assert process.exitcode in (0, -signal.SIGKILL)
        whole_files(folder)
    assert survived < len(numbers)
    assert_same(finish(run, folder), expected)


def test_kills_between_file_operations_change_nothing(run, uninterrupted, tmp_path):
    check_kills_at_file_operations(run, uninterrupted, tmp_path, range(1, 9))


@pytest.mark.slow
def test_a_kill_at_every_file_operation_changes_nothing(run, uninterrupted, tmp_path):
    for number in range(1, 61):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        process = start(run, folder, KillAt(folder, number))
        process.join(300)
        whole_files(folder)
        assert_same(finish(run, folder), uninterrupted[0])
        if process.exitcode == 0:
            break
    assert process.exitcode == 0  # every operation had its turn


# -- disks that are full or read-only


@pytest.fixture
def disk(tmp_path):
    """A file system of 256 KiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.call(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], stderr=subprocess.DEVNULL
    ):
        pytest.skip("a file system cannot be mounted here")
    yield folder
    subprocess.check_call(["umount", "--lazy", str(folder)])


def fill(folder):
    """Leave less than a page."""
    with (folder / ".filler").open("wb", buffering=0) as file:
        try:
            while file.write(b"0" * 4096):
                pass
        except OSError as error:
            assert error.errno == errno.ENOSPC


def remount(folder, how):
    subprocess.check_call(["mount", "-o", f"remount,{how}", str(folder)])


class Failed:
    """Run and tell how it failed; also with a limit of the size of files, which needs no root."""

    def __init__(self, run, largest=None):
        self.run, self.largest = run, largest

    def __call__(self, folder, pipe):
        torch.set_num_threads(1)
        if self.largest is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.largest, self.largest))
        try:
            self.run(folder)
        except Exception as error:
            pipe.send((type(error).__name__, getattr(error, "errno", None), str(error)))
        else:
            pipe.send(None)


def failure(run, folder, largest=None):
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=Failed(run, largest), args=(str(folder), theirs))
    process.start()
    assert ours.poll(300)
    result = ours.recv()
    process.join()
    return result


def start_and_kill(run, folder):
    """A run that has got as far as its first checkpoint."""
    process = start(run, folder, KillAt(folder, 22))
    process.join(300)
    assert process.exitcode == -signal.SIGKILL
    assert any(path.name in ("checkpoint.safetensors", "last.pt") for path in folder.iterdir())
    return whole_files(folder)


def test_a_write_that_is_cut_off_leaves_the_checkpoint_before_it(run, uninterrupted, tmp_path):
    before = start_and_kill(run, tmp_path)
    kind, number, text = failure(run, tmp_path, largest=1000)
    after = whole_files(tmp_path)
    if run is meta_train:
        # The log may be ahead of the checkpoint; it is written again by the run that goes on.
        assert after.pop("log")[: len(before["log"])] == before.pop("log")
    assert_same(after, before)
    if run is meta_train:  # torch.save has an error of its own
        assert (kind, number) == ("OSError", errno.EFBIG)
        assert text.startswith("[Errno 27] File too large: ")
        assert "/." not in text  # names the file, not the temporary one
    assert_same(finish(run, tmp_path), uninterrupted[0])


def test_a_full_disk_is_named_and_leaves_the_checkpoint_before_it(run, uninterrupted, disk):
    before = start_and_kill(run, disk)
    fill(disk)
    kind, number, text = failure(run, disk)
    assert_same(whole_files(disk), before)
    if run is meta_train:
        assert (kind, number) == ("OSError", errno.ENOSPC)
        assert text == f"[Errno 28] No space left on device: '{disk / 'log.jsonl'}'"
    (disk / ".filler").unlink()
    assert_same(finish(run, disk), uninterrupted[0])


def test_a_read_only_disk_is_named_and_leaves_the_checkpoint_before_it(run, uninterrupted, disk):
    before = start_and_kill(run, disk)
    remount(disk, "ro")
    kind, number, text = failure(run, disk)
    assert (kind, number) == ("OSError", errno.EROFS)
    assert str(disk) in text
    assert "/." not in text
    assert_same(whole_files(disk), before)
    remount(disk, "rw")
    assert_same(finish(run, disk), uninterrupted[0])


def artefact(path, seed):
    torch.manual_seed(seed)
    policy = LearnedPolicy(MetaNetwork(6, 4))
    ls.save_artefact(policy, path.with_suffix(".safetensors"), {"seed": seed})


def figure(path, seed):
    run = ls.RunInfo((ls.LayerInfo("fc", 10, 3, 4),), horizon=3 + seed)
    ls.plot_schedule(ls.plan(ls.policies.StraightThrough(), run), path.with_suffix(".png"))


WRITERS = {
    "a text": lambda path, seed: write_text(path.with_suffix(".txt"), f"{seed}" * 9000),
    "an artefact": artefact,
    "a figure": figure,
}


@pytest.mark.parametrize("problem", ["full", "read-only"])
@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_what_the_package_writes_is_whole_or_as_before(writer, problem, disk):
    writer(disk / "name", 1)
    before = {path.name: path.read_bytes() for path in disk.iterdir()}
    if problem == "full":
        fill(disk)
    else:
        remount(disk, "ro")
    with pytest.raises(OSError, match=str(disk / "name")) as caught:
        writer(disk / "name", 2)
    assert caught.value.errno == (errno.ENOSPC if problem == "full" else errno.EROFS)
    remount(disk, "rw")
    (disk / ".filler").unlink(missing_ok=True)
    assert {path.name: path.read_bytes() for path in disk.iterdir()} == before


@contextmanager
def without_privileges():
    """As a user whom permissions bind; root is not."""
    user = os.geteuid()
    os.seteuid(user or 65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_a_folder_without_permission_is_named_and_stays_as_before(writer):
    with tempfile.TemporaryDirectory() as name:  # nobody may enter pytest's own
        folder = Path(name)
        writer(folder / "name", 1)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        folder.chmod(0o555)
        with without_privileges(), pytest.raises(PermissionError, match=str(folder / "name")):
            writer(folder / "name", 2)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        folder.chmod(0o755)
