"""Two thousand spoiled artefacts, each refused as such, in bounded memory and with nothing executed.

A third of them vouch for themselves: their checksums are right, only what they say is not.
"""

import hashlib
import io
import json
import os
import pickle
import random
import struct
import sys
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

import learnsched as ls
from learnsched.policies import LearnedPolicy, MetaNetwork
from learnsched.pretrained import artefact

FILES = 2000
MEMORY = 64_000_000  # bytes above what a good artefact takes

executed = []


def execute(*arguments):
    executed.append(arguments)


class Harmful:
    def __reduce__(self):
        return execute, ("a pickle was run",)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("artefact") / "good.safetensors"
    ls.save_artefact(LearnedPolicy(MetaNetwork(6, 4)), path, {"name": "good", "limits": "none"})
    return path.read_bytes()


def parts(data):
    """Header and the bytes after it."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header, body):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def vouched(tensors, card):
    """A file whose checksums are right."""
    card = {**card, "sha256": artefact.digest(tensors)}
    text = json.dumps(card)
    return save(tensors, {"card": f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}"})


def card_of(data):
    return json.loads(parts(data)[0]["__metadata__"]["card"].split("\n", 1)[1])


# -- bytes


def truncated(data, dice):
    return data[: dice.randrange(len(data))]


def flipped(data, dice):
    changed = bytearray(data)
    for _ in range(dice.choice((1, 1, 1, 2, 8))):
        changed[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    return bytes(changed)


def overwritten(data, dice):
    at, length = dice.randrange(len(data)), dice.randrange(1, 64)
    return data[:at] + dice.randbytes(length) + data[at + length :]


def inserted(data, dice):
    at = dice.randrange(len(data) + 1)
    return data[:at] + dice.randbytes(dice.randrange(1, 64)) + data[at:]


def doubled(data, dice):
    return data * dice.randrange(2, 5)


def another_length(data, dice):
    length = dice.choice((0, 1, 2**31, 2**62, 2**63, 2**64 - 1, dice.randrange(2**64)))
    return struct.pack("<Q", length) + data[8:]


def noise(data, dice):
    return dice.randbytes(dice.randrange(4096))


def pickled(data, dice):
    bomb = pickle.dumps(Harmful(), protocol=dice.randrange(6))
    return dice.choice((bomb, data + bomb, struct.pack("<Q", len(bomb)) + bomb + data))


def zipped(data, dice):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Harmful()))
        archive.writestr("../../escaped", b"x")
    return file.getvalue()


# -- the header


def retyped(data, dice):
    header, body = parts(data)
    name = dice.choice([n for n in header if n != "__metadata__"])
    change = dice.choice((
        {"dtype": dice.choice(("F64", "I8", "BOOL", "F8_E4M3", "nonsense", None, 3))},
        {"shape": dice.choice(([2**62], [2**31, 2**31], [10**9] * 8, [-1], [], [0], "all", None))},
        {"data_offsets": dice.choice(([0, 2**63], [5, 1], [-8, 8], [0], None, [0, 10**9]))},
    ))  # fmt: skip
    header[name] = {**header[name], **change}
    return joined(header, body)


def renamed(data, dice):
    header, body = parts(data)
    name = dice.choice([n for n in header if n != "__metadata__"])
    path = ("../" * 9 + "etc/passwd", "/etc/passwd", "C:\\x", "a\0b", "", "__class__", "é" * 9999)
    header[dice.choice(path)] = header.pop(name)
    return joined(header, body)


def exchanged(data, dice):
    header, body = parts(data)
    a, b = dice.sample([n for n in header if n != "__metadata__"], 2)
    header[a], header[b] = header[b], header[a]
    return joined(header, body)


def overlapping(data, dice):
    header, body = parts(data)
    a, b = dice.sample([n for n in header if n != "__metadata__"], 2)
    header[a] = header[b]
    return joined(header, body)


def many(data, dice):
    header, body = parts(data)
    header.update(
        {f"x{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(200)}
    )
    return joined(header, body)


def other_metadata(data, dice):
    header, body = parts(data)
    card = header["__metadata__"]["card"]
    header["__metadata__"] = dice.choice((
        {}, None, [card], {"card": 1}, {"card": None}, {"card": ""}, {"card": card[1:]}, {"Card": card},
        {"card": card.replace("good", "evil")}, {"card": card.replace("\n", "\n ", 1)},
        {"card": "\ud800"},
    ))  # fmt: skip
    return joined(header, body)


# -- what is said, with the right checksums


def spoiled_card(data, dice):
    card = card_of(data)
    card[dice.choice(("format", "feature_schema"))] = dice.choice(
        (0, 1, 99, -1, None, "2", [2], 2.5, 1e308, {"a": 1})
    )
    if (card["format"], card["feature_schema"]) == (
        artefact.FORMAT_VERSION,
        artefact.FEATURE_SCHEMA,
    ):
        card["format"] = 3
    return vouched(load(data), card)


def spoiled_config(data, dice):
    card = card_of(data)
    wrong = (
        None,
        -1,
        0,
        10**9,
        10**400,
        1e308,
        float("nan"),
        float("-inf"),
        "x",
        [],
        {},
        True,
        [[]],
    )
    keys = dice.choice((
        ("hidden",), ("embedding",), ("base",), ("domain",), ("base", 0, "curve"),
        ("base", 0, "curve", "weight_hard_from"), ("base", 0, "curve", "weight_backward_std"),
        ("base", 0, "curve", "nothing"), ("base", 0, "fine_tuning"), ("base", 0, "weight_levels"),
        ("base", 0, "nothing"), ("domain", "depth"), ("domain", "../depth"), (),
    ))  # fmt: skip
    place = card
    for key in ("config", *keys)[:-1]:
        place = place[key]
    last = ("config", *keys)[-1]
    allowed = {"weight_backward_std": 10**9, "fine_tuning": True}
    place[last] = dice.choice([w for w in wrong if last not in allowed or w != allowed[last]])
    return vouched(load(data), card)


def spoiled_tensor(data, dice):
    tensors, card = load(data), card_of(data)
    name = dice.choice(sorted(tensors))
    old = tensors.pop(name)
    change = dice.randrange(7)
    if change == 0:
        old.view(-1)[dice.randrange(old.numel())] = dice.choice((torch.nan, torch.inf, -torch.inf))
        tensors[name] = old
    elif change == 1:
        tensors[name] = old.double()
    elif change == 2:
        tensors[name] = torch.cat([old, old])
    elif change == 3:
        tensors[name] = old.view(-1, 1) if old.dim() == 1 else old.flatten()
    elif change == 4:
        tensors[name[1:]] = old
    elif change == 5:
        tensors.update({name: old, f"../{name}": old.clone()})
    return vouched(tensors, card)


MUTATIONS = (
    truncated, flipped, overwritten, inserted, doubled, another_length, noise, pickled, zipped, retyped,
    renamed, exchanged, overlapping, many, other_metadata, spoiled_card, spoiled_config, spoiled_tensor,
)  # fmt: skip


@contextmanager
def bounded_memory():
    """The process's resident size does not grow beyond MEMORY, at any time."""
    if not sys.platform.startswith("linux"):
        yield  # only Linux forgets an earlier peak
        return
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from now
    before = resident("VmRSS")
    yield
    assert resident("VmHWM") - before < MEMORY


def resident(name):
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return 1024 * int(line.split()[1])


def test_the_bound_of_memory_is_felt():
    if sys.platform.startswith("linux"):
        with pytest.raises(AssertionError), bounded_memory():
            bytearray(2 * MEMORY)


def test_two_thousand_spoiled_artefacts_are_refused(good, tmp_path):
    path = tmp_path / "spoiled.safetensors"
    path.write_bytes(good)
    ls.load_pretrained(path)
    with bounded_memory():
        kinds = refusals(good, path)
    assert not executed
    assert os.listdir(tmp_path) == [path.name]
    assert len(kinds) > 5


def refusals(good, path):
    """The kinds of errors that spoiled files meet."""
    dice, kinds = random.Random(0), {}
    for number in range(FILES):
        mutation = MUTATIONS[number % len(MUTATIONS)]
        data = mutation(good, dice)
        assert data != good
        path.write_bytes(data)
        for read in (ls.load_pretrained, ls.pretrained_card):
            try:
                read(path)
            except ls.ArtefactError as error:
                assert str(path) in str(error)
                kinds[str(error)[:40]] = mutation.__name__
            else:
                # A card may be read whose tensors or configuration are of no use.
                assert read is ls.pretrained_card, (number, mutation.__name__)
                assert mutation in (spoiled_config, spoiled_tensor), (number, mutation.__name__)
    return kinds


# -- what hypothesis thinks of

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
LAYERS = tuple(ls.LayerInfo(f"{i}", 50, 3, 4) for i in range(2))
fuzzed = settings(
    deadline=None, max_examples=100, derandomize=True, suppress_health_check=list(HealthCheck)
)


def places(value, here=()):
    """The keys that lead to every entry of nested dictionaries."""
    for key, inner in value.items():
        yield (*here, key)
        if isinstance(inner, dict):
            yield from places(inner, (*here, key))


def refused_or_sound(data, path):
    path.write_bytes(data)
    try:
        policy = ls.load_pretrained(path)
    except ls.ArtefactError as error:
        assert str(path) in str(error)
        return
    run = ls.RunInfo(LAYERS, 3, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run may lie outside of what it was trained on
        found = ls.plan(policy, run)
    assert found.table.isfinite().all()
    assert all(setting.is_terminal for setting in found.settings(2))


@fuzzed
@given(data=st.data())
def test_any_value_at_any_place_of_a_card_that_vouches_for_itself(good, tmp_path_factory, data):
    card = card_of(good)
    *before, last = data.draw(st.sampled_from(sorted(places(card))))
    place = card
    for key in before:
        place = place[key]
    place[last] = data.draw(JSON)
    refused_or_sound(vouched(load(good), card), tmp_path_factory.getbasetemp() / "f.safetensors")


@fuzzed
@given(at=st.integers(0, 10_000), removed=st.integers(0, 100), put=st.binary(max_size=100))
def test_any_bytes_in_the_place_of_any_others(good, tmp_path_factory, at, removed, put):
    at %= len(good)
    spoiled = good[:at] + put + good[at + removed :]
    path = tmp_path_factory.getbasetemp() / "f.safetensors"
    path.write_bytes(spoiled)
    if spoiled == good:
        ls.load_pretrained(path)
    else:
        with pytest.raises(ls.ArtefactError, match=str(path)):
            ls.load_pretrained(path)


@pytest.mark.parametrize("size", [4_000_001, 10**11])
def test_a_huge_file_is_refused_without_being_read(tmp_path, size):
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.truncate(size)  # sparse
    with bounded_memory(), pytest.raises(ls.ArtefactError, match="larger than 4000000 bytes"):
        ls.load_pretrained(path)


@pytest.mark.parametrize(
    "name",
    [
        "../default",
        "default.safetensors",
        "default\0",
        "/dev/zero",
        "~",
        ".",
        "%s",
        "a" * 5000,
        "a" * 5000 + ".safetensors",
        "\ud800",
    ],
)
def test_names_reach_nothing_but_the_registry_and_given_paths(name):
    with pytest.raises(ls.ArtefactError, match="no pretrained schedule"):
        ls.load_pretrained(name)


def test_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(ls.ArtefactError, match="no pretrained schedule"):
        ls.load_pretrained(tmp_path / "pipe.safetensors")


def test_a_link_to_a_device_is_refused(tmp_path):
    (tmp_path / "zero.safetensors").symlink_to("/dev/zero")
    with pytest.raises(ls.ArtefactError, match="no pretrained schedule"):
        ls.load_pretrained(tmp_path / "zero.safetensors")
