"""Artefacts: what is saved comes back, and anything else is refused before it is used."""

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

import learnsched as ls
from learnsched.policies import BaseCurve, Domain, LearnedPolicy, MetaNetwork
from learnsched.pretrained import artefact
from learnsched.schedule import LayerInfo, RunInfo, plan

RUN = RunInfo((LayerInfo("a", 9, 3, 4), LayerInfo("b", 20, 3, 0)), 6, 20)


def trained(open_loop=False):
    torch.manual_seed(0)
    network = MetaNetwork(5, 4)
    with torch.no_grad():
        network.out.weight.normal_()
        network.out.bias.normal_()
    base, domain = BaseCurve(0.25, 0.5), Domain(horizon=(2, 30), fan_in=(5, 600))
    return LearnedPolicy(network, base, domain, open_loop=open_loop)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("artefact") / "policy.safetensors"
    return ls.save_artefact(trained(), path, {"reached": {"digits": 0.9}})


@pytest.fixture
def path(made, tmp_path):
    """A pair of files to spoil."""
    for suffix in (".safetensors", ".json"):
        shutil.copy(made.with_suffix(suffix), tmp_path)
    return tmp_path / made.name


def rewrite(path, **changes):
    """Change the card; what is None leaves it."""
    card = json.loads(path.with_suffix(".json").read_text())
    card = {k: v for k, v in {**card, **changes}.items() if v is not None}
    path.with_suffix(".json").write_text(json.dumps(card))


def replace_data(path, data):
    """Other tensors, with a card that vouches for them."""
    path.write_bytes(data)
    rewrite(path, sha256=hashlib.sha256(data).hexdigest())


@pytest.mark.parametrize("open_loop", [False, True])
def test_a_saved_policy_comes_back_to_the_bit(tmp_path, open_loop):
    policy = trained(open_loop)
    card = {"preset": "quick", "steps": 12, "notes": "größer"}
    path = ls.save_artefact(policy, str(tmp_path / "new" / "p.safetensors"), card)
    assert path == tmp_path / "new" / "p.safetensors"
    assert sorted(os.listdir(path.parent)) == ["p.json", "p.safetensors"]
    twin = ls.load_pretrained(path)
    assert twin.config() == policy.config()
    assert twin.metrics == policy.metrics
    state = policy.network.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in twin.network.state_dict().items())
    assert torch.equal(plan(twin, RUN).table, plan(policy, RUN).table)
    assert not any(p.requires_grad for p in twin.network.parameters())
    assert all(p.requires_grad for p in policy.network.parameters())
    found = ls.pretrained_card(str(path))
    assert card.items() <= found.items()
    assert found["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_saving_is_reproducible_and_replaces(tmp_path):
    path = tmp_path / "p.safetensors"
    ls.save_artefact(trained(), path, {"run": 1})
    before = path.read_bytes()
    ls.save_artefact(trained(), path, {"run": 2})
    assert path.read_bytes() == before
    assert ls.pretrained_card(path)["run"] == 2


def test_the_card_of_another_artefact_may_be_handed_on(made, tmp_path):
    policy = trained()
    with torch.no_grad():
        policy.network.out.bias.add_(1)
    path = ls.save_artefact(policy, tmp_path / "p.safetensors", ls.pretrained_card(made))
    assert torch.equal(ls.load_pretrained(path).network.out.bias, policy.network.out.bias)
    assert ls.pretrained_card(path)["reached"] == {"digits": 0.9}


def test_a_loaded_policy_schedules_a_network(made):
    model = ls.quantize_(
        torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU()),
        ls.ternary(), ls.unsigned(2),
    )  # fmt: skip
    scheduler = ls.QuantizationScheduler(model, ls.load_pretrained(made), epochs=3)
    for loss in (1.0, 0.5, 0.4):
        scheduler.step({"train_loss": loss})
    ls.integer_weights(ls.finalize_(model))


def truncated(path):
    path.write_bytes(path.read_bytes()[:-20])


def flipped(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def emptied(path):
    path.write_bytes(b"")


def with_tensors(change):
    def spoil(path):
        tensors = load(path.read_bytes())
        change(tensors)
        replace_data(path, save(tensors))

    return spoil


def huge(path):
    with path.open("ab") as file:
        file.truncate(10**8)


def card_bytes(data):
    return lambda path: path.with_suffix(".json").write_bytes(data)


def config(**changes):
    def spoil(path):
        card = json.loads(path.with_suffix(".json").read_text())
        rewrite(path, config={k: v for k, v in {**card["config"], **changes}.items() if v != ""})

    return spoil


def in_base(**changes):
    return lambda path: config(base={**trained().config()["base"], **changes})(path)


class Harmful:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was run",))


SPOILED = {
    "truncated": (truncated, "not the file that its card describes.*damaged or was altered"),
    "a flipped bit": (flipped, "not the file that its card describes"),
    "empty": (emptied, "not the file that its card describes"),
    "truncated, card vouches": (
        lambda p: replace_data(p, p.read_bytes()[:-20]), "does not hold a learned policy"),
    "empty, card vouches": (lambda p: replace_data(p, b""), "does not hold a learned policy"),
    "a pickle": (
        lambda p: replace_data(p, pickle.dumps(Harmful())), "does not hold a learned policy"),
    "too large": (huge, "larger than 4000000 bytes"),
    "no card": (lambda p: p.with_suffix(".json").unlink(), "the card .*json is missing"),
    "a card without hash": (lambda p: rewrite(p, sha256=None), "not the file that"),
    "a card with another hash": (lambda p: rewrite(p, sha256="0" * 64), "the card says 000000000000"),
    "another schema": (lambda p: rewrite(p, feature_schema=99),
                       "has feature_schema 99, this version of learnsched reads 1; install"),
    "no schema": (lambda p: rewrite(p, feature_schema=None), "has feature_schema None"),
    "another format": (lambda p: rewrite(p, format=2), "has format 2, this version"),
    "an empty card": (card_bytes(b""), "is not a card"),
    "a truncated card": (card_bytes(b'{"format": 1, "feat'), "is not a card"),
    "a card of a list": (card_bytes(b"[1]"), "is not a card: it holds a list"),
    "a binary card": (card_bytes(b"\xff\xfe\x00"), "is not a card"),
    "a deep card": (card_bytes(b"[" * 200_000), "is not a card"),
    "no configuration": (lambda p: rewrite(p, config=None), "does not hold a learned policy"),
    "a listed configuration": (lambda p: rewrite(p, config=[1]), "does not hold"),
    "huge units": (config(hidden=10**9), "1 to 1024 units, not 1000000000"),
    "no units": (config(embedding=0), "1 to 1024 units, not 0"),
    "units in words": (config(hidden="six"), "1 to 1024 units, not 'six'"),
    "other units": (config(hidden=6), r"expected torch\.float32 \(\d+"),
    "no base": (config(base=""), "does not hold a learned policy"),
    "a base in words": (in_base(hard_from="0.5"), "finite numbers"),
    "a base out of range": (in_base(hard_from=0), "out of its range"),
    "an unknown base": (in_base(colour=1), "colour"),
    "a base without end": (in_base(weight_backward_std=float("inf")), "finite numbers"),
    "a reversed domain": (config(domain={"depth": [5, 3]}), "depth must go from"),
    "a domain of one": (config(domain={"depth": [5]}), "does not hold a learned policy"),
    "a missing tensor": (with_tensors(lambda t: t.pop("out.bias")), r"expected \['cell"),
    "a tensor too many": (with_tensors(lambda t: t.update(x=torch.zeros(1))), "has tensors"),
    "another shape": (with_tensors(lambda t: t.update({"out.bias": torch.zeros(6)})),
                      r"out\.bias in .* is torch\.float32 \(6,\), expected torch\.float32 \(5,\)"),
    "another dtype": (with_tensors(lambda t: t.update({"out.bias": torch.zeros(5).double()})),
                      r"is torch\.float64"),
    "NaN": (with_tensors(lambda t: t["out.bias"].fill_(torch.nan)), r"out\.bias in .* not finite"),
    "infinity": (with_tensors(lambda t: t["out.bias"].fill_(torch.inf)), "not finite"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "message"), SPOILED.values(), ids=SPOILED)
def test_a_spoiled_artefact_is_refused(path, spoil, message):
    spoil(path)
    with pytest.raises(ls.ArtefactError, match=message):
        ls.load_pretrained(path)


def test_an_artefact_error_is_a_value_error():
    assert issubclass(ls.ArtefactError, ValueError)


@pytest.mark.parametrize("call", [ls.load_pretrained, ls.pretrained_card])
@pytest.mark.parametrize(
    "name", ["no such name", "", "../default", "missing.safetensors", Path("missing.safetensors")]
)
def test_an_unknown_name_is_refused_with_the_choices(call, name):
    with pytest.raises(ls.ArtefactError, match=r"no pretrained schedule .*; give one of \["):
        call(name)


def test_a_folder_or_another_file_is_no_artefact(path):
    folder = path.parent / "folder.safetensors"
    folder.mkdir()
    for wrong in (folder, path.with_suffix(".json"), path.parent):
        with pytest.raises(ls.ArtefactError, match="no pretrained schedule"):
            ls.load_pretrained(wrong)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    position=st.integers(0, 1400), bit=st.integers(0, 7), cut=st.none() | st.integers(0, 1400),
    vouched=st.booleans(),
)  # fmt: skip
def test_no_alteration_does_worse_than_an_artefact_error(made, position, bit, cut, vouched):
    data = bytearray(made.read_bytes())
    data[position] ^= 1 << bit
    path = made.parent / "altered.safetensors"
    shutil.copy(made.with_suffix(".json"), path.with_suffix(".json"))
    if vouched:
        replace_data(path, bytes(data[:cut]))
    else:
        path.write_bytes(data[:cut])
    try:
        policy = ls.load_pretrained(path)
    except ls.ArtefactError:
        return
    assert vouched
    assert cut is None
    assert plan(policy, RUN).table.isfinite().all()


@pytest.mark.parametrize("name", ["policy", "policy.pt", "policy.json", "policy.safetensors.bak"])
def test_artefacts_have_one_ending(tmp_path, name):
    with pytest.raises(ValueError, match=r"ending in \.safetensors"):
        ls.save_artefact(trained(), tmp_path / name, {})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("where", ["tensors", "card", "disk", "json"])
def test_a_failed_save_leaves_nothing_half_written(path, monkeypatch, where, existing):
    if not existing:
        path = path.parent / "other" / "policy.safetensors"
        path.parent.mkdir()
    before = {p.name: p.read_bytes() for p in path.parent.iterdir() if p.is_file()}

    def fail(*_, **__):
        raise OSError("no space left on device")

    card = {"fine": 1}
    if where == "tensors":
        monkeypatch.setattr(Path, "write_bytes", fail)
    elif where == "card":
        monkeypatch.setattr(Path, "write_text", fail)
    elif where == "disk":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        card = {"tensor": torch.zeros(1)}
    policy = trained()
    with torch.no_grad():
        policy.network.out.bias.add_(1)
    with pytest.raises((OSError, TypeError)):
        ls.save_artefact(policy, path, card)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in path.parent.iterdir() if p.is_file()} == before
    if existing:
        ls.load_pretrained(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_an_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match="denied"):
        ls.save_artefact(trained(), tmp_path / "p.safetensors", {})


def test_names_are_those_of_the_folder(monkeypatch, made):
    folder = made.parent / "registry"
    folder.mkdir()
    monkeypatch.setattr(artefact, "_HERE", folder)
    assert ls.list_pretrained() == []
    for name in ("later", "early"):
        ls.save_artefact(trained(), folder / f"{name}.safetensors", {"name": name})
    (folder / ".early.safetensors.tmp.safetensors").write_bytes(b"")
    assert ls.list_pretrained() == ["early", "later"]
    assert ls.load_pretrained("early").config() == trained().config()
    assert ls.pretrained_card("later")["name"] == "later"


@pytest.mark.parametrize("name", ls.list_pretrained())
def test_every_artefact_of_the_package_loads_with_a_card_of_its_making(name):
    policy = ls.load_pretrained(name)
    found = plan(policy, RunInfo(RUN.layers, 12, 20))
    assert found.table.isfinite().all()
    assert all(s.is_terminal for s in found.settings(11))
    assert set(ls.pretrained_card(name)) > {"format", "feature_schema", "sha256", "config"}


@pytest.mark.skipif(not ls.list_pretrained(), reason="no artefact has been trained yet")
def test_the_default_is_there():
    assert "default" in ls.list_pretrained()
