"""The command line: what each verb prints, its exit codes, and that no mistake shows a traceback."""

import configparser
import json
import math
import os
import pty
import re
import subprocess
import sys
import types
from importlib import import_module
from pathlib import Path

import pytest
import torch

import learnsched as ls
from learnsched import cli
from learnsched.history import History
from learnsched.pretrained.card import render_card

PNG = b"\x89PNG"


def record(task="digits", method="learned", **changes):
    return {"task": task, "cell": "mlp", "method": method, "test": [0.5, 0.6], **changes}


def results(path, *records):
    path.write_text(json.dumps({"records": list(records)}))
    return str(path)


@pytest.fixture
def history():
    model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU())
    ls.quantize_(model, ls.ternary(), ls.unsigned(2))
    scheduler = ls.QuantizationScheduler(model, ls.policies.StraightThrough(), 3)
    for loss in (2.0, float("nan"), 0.5):
        scheduler.step({"train_loss": loss})
    return scheduler.history


# -- what the verbs do


def test_list_shows_every_artefact_in_a_row(capsys):
    assert cli.main(["list"]) == 0
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == ["name", *ls.list_pretrained()]
    assert err == ""


def test_list_prints_the_cards_of_named_artefacts(capsys, tmp_path):
    policy = ls.load_pretrained("default")
    path = ls.save_artefact(
        policy, tmp_path / "mine.safetensors", {"name": "mine", "limits": "few"}
    )
    assert cli.main(["list", "default", str(path)]) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("# ")] == ["# default", "# mine"]
    assert "**Limits.** few" in out
    assert cli.main(["list", "--json", "default"]) == 0
    assert json.loads(capsys.readouterr().out) == {"default": ls.pretrained_card("default")}


def test_a_card_cannot_steer_the_terminal():
    text = render_card({"name": "\x1b[2Jx", "limits": "a\x07\x9bb", "other": {"k\x1b": ["\x1b"]}})
    assert all(c.isprintable() or c == "\n" for c in text)


@pytest.mark.parametrize("levels", [("2", "2"), ("3", "0")])
@pytest.mark.parametrize("source", ["default", "StraightThrough", "AdditiveNoiseAnnealing"])
def test_plot_draws_what_a_policy_makes(source, levels, capsys, tmp_path):
    out = tmp_path / "s.png"
    options = ["--layers", "3", "--epochs", "8", "--steps", "20", "--levels", *levels]
    assert cli.main(["plot", source, "--out", str(out), *options]) == 0
    assert capsys.readouterr().out == f"wrote {out}\n"
    assert out.read_bytes().startswith(PNG)


def test_plot_draws_a_history(history, tmp_path):
    path, out = tmp_path / "history.json", tmp_path / "s.png"
    history.save(path)
    assert cli.main(["plot", str(path), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(PNG)


def test_a_warning_is_one_line_without_source(capsys, tmp_path):
    assert cli.main(["plot", "default", "--epochs", "500", "--out", str(tmp_path / "s.png")]) == 0
    err = capsys.readouterr().err
    assert err.startswith("learnsched: warning: outside of what the schedule was trained on")
    assert err.count("\n") == 1


def test_compare_prints_a_table_and_draws(capsys, tmp_path):
    first = results(tmp_path / "a.json", record(method="learned"), record(method="ANA, normal"))
    second = results(
        tmp_path / "b.json",
        record(task="mnist1d", test=[0.4]), record(task="mnist1d", method="ANA, normal", test=[0.5]),
    )  # fmt: skip
    out = tmp_path / "c.png"
    assert cli.main(["compare", first, second, "--out", str(out), "--baseline", "learned"]) == 0
    text, err = capsys.readouterr()
    assert "| method | digits | mnist1d |" in text
    assert "| ANA, normal | 55.0 [-8.5, 118.5] | 50.0 |" in text
    assert out.read_bytes().startswith(PNG)
    assert err == ""


def test_inspect_prints_what_the_export_says(monkeypatch, capsys, tmp_path):
    module = types.ModuleType("learnsched.export.inspect")
    module.inspect = lambda path: f"inspected {path.name}"
    monkeypatch.setitem(sys.modules, "learnsched.export", types.ModuleType("learnsched.export"))
    monkeypatch.setitem(sys.modules, "learnsched.export.inspect", module)
    (tmp_path / "net.onnx").write_bytes(b"")
    assert cli.main(["inspect", str(tmp_path / "net.onnx")]) == 0
    assert capsys.readouterr().out == "inspected net.onnx\n"


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("learnsched.export.inspect", "has no learnsched.export.inspect"),
        ("onnx", "learnsched[export]"),
    ],
)
def test_inspect_says_what_is_missing(monkeypatch, capsys, tmp_path, missing, message):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr(cli.importlib, "import_module", absent)
    assert cli.main(["inspect", str(tmp_path)]) == cli.MISTAKE
    assert message in capsys.readouterr().err


# -- mistakes


def mistakes(folder):
    spoiled = folder / "spoiled.safetensors"
    spoiled.write_bytes(b"x" * 100)
    text = folder / "text.json"
    text.write_text("{")
    good = results(folder / "good.json", record())
    twice = results(folder / "twice.json", record(), record())
    fewer = results(folder / "fewer.json", record(), record(method="ANA, normal", test=[0.5]))
    wrong = results(folder / "wrong.json", record(test=[1.5]))
    history = folder / "other.json"
    history.write_text(json.dumps({"learnsched_history": 9}))
    missing = str(folder / "missing" / "s.png")
    deep, null = folder / "deep.json", folder / "null.json"
    deep.write_text("[" * 100_000)
    null.write_text("null")
    return [
        (["list", "nothing"], "no pretrained schedule 'nothing'"),
        (["list", str(spoiled)], "is not a safetensors file"),
        (["plot", "nothing"], "no pretrained schedule 'nothing'"),
        (["plot", "MetaNetwork"], "MetaNetwork is not a policy"),
        (["plot", "LearnedPolicy"], "LearnedPolicy is not a policy"),
        (["plot", str(folder / "none.json")], "No such file"),
        (["plot", str(text)], "is not the history of a run"),
        (["plot", str(history)], "another version of learnsched"),
        (["plot", "default", "--out", missing], "folder .* does not exist"),
        (["plot", "default", "--out", str(folder / "s.xyz")], "xyz"),
        (["compare", str(folder / "none.json")], "No such file"),
        (["compare", str(text)], "is not a JSON file"),
        (["compare", str(history)], "holds no records"),
        (["compare", wrong], "holds no records"),
        (["compare", twice], "more than once"),
        (["compare", fewer], "unlike numbers of runs on 'digits': {'learned': 2, 'ANA, normal': 1}"),
        (["compare", str(folder)], "Is a directory"),
        (
            ["compare", good, "--baseline", "x", "--out", str(folder / "c.png")], "no results of"),
        (["compare", good, "--baseline", "learned"], "name the figure with --out"),
        (["inspect", str(folder / "none")], "there is no"),
        (["inspect", good], "is no ONNX file"),
        (["inspect", str(folder)], "manifest.json is missing"),
        (["plot", str(deep)], "is not the history of a run"),
        (["plot", str(null)], "scheduler.history.save\\(\\) did not write it"),
        (["plot", "default", "--out", str(folder)], "Is a directory"),
        (["plot", "default", "--out", os.devnull], "not a regular file"),
        (["plot", "default", "--layers", "1001", "--epochs", "1000"], "is not drawn"),
        (["plot", ""], "no pretrained schedule ''"),
        (["plot", str(text), "--layers", "3", "--fan-in", "9"], "leave --layers, --fan-in out"),
        (["list", str(text)], "is no artefact: their names end in .safetensors"),
    ]  # fmt: skip


MISTAKES = 30


def test_every_mistake_is_tried(tmp_path):
    assert len(mistakes(tmp_path)) == MISTAKES


@pytest.mark.parametrize("number", range(MISTAKES))
def test_a_mistake_is_one_line_and_exit_code_1(number, capsys, tmp_path):
    arguments, message = mistakes(tmp_path)[number]
    before = sorted(os.listdir(tmp_path))
    assert cli.main(arguments) == cli.MISTAKE
    out, err = capsys.readouterr()
    assert re.search(message, err), err
    assert err.startswith("learnsched: error: ")
    assert err.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == before
    assert arguments[0] == "compare" or out == ""


@pytest.mark.parametrize(
    "arguments",
    [[], ["unknown"], ["plot"], ["plot", "default", "--layers", "0"],
     ["plot", "default", "--epochs", "x"], ["plot", "default", "--layers", "1.5"],
     ["plot", "default", "--levels", "1", "2"], ["plot", "default", "--levels", "3"],
     ["compare"], ["inspect"], ["list", "--unknown"]],
)  # fmt: skip
def test_wrong_options_are_exit_code_2_with_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: learnsched" in capsys.readouterr().err


@pytest.mark.parametrize("verb", [[], ["list"], ["plot"], ["compare"], ["inspect"]])
def test_help_explains_every_verb(verb, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([*verb, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "usage: learnsched" in out
    if not verb:
        assert all(name in out for name in ("list", "plot", "compare", "inspect", "meta_train.py"))


def test_a_whole_number_is_asked_for_by_name(capsys):
    with pytest.raises(SystemExit):
        cli.main(["plot", "default", "--layers", "1.5"])
    assert "must be a whole number of at least 1, got '1.5'" in capsys.readouterr().err


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"learnsched {ls.__version__}\n"


def test_an_interruption_has_its_exit_code(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("learnsched.pretrained.list_pretrained", interrupted)
    assert cli.main(["list"]) == 130


# -- as a process


def test_the_installed_command_is_this_one():
    config = configparser.ConfigParser()
    config.read(Path(__file__).parent.parent / "setup.cfg")
    entry = config["options.entry_points"]["console_scripts"].strip()
    name, target = (part.strip() for part in entry.split("="))
    assert name == "learnsched"
    module, function = target.split(":")
    assert getattr(import_module(module), function) is cli.main


def command(*arguments):
    return [sys.executable, "-W", "error", "-m", "learnsched.cli", *arguments]


def test_a_reader_that_leaves_is_no_error():
    process = subprocess.Popen(
        command("list", "default"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 0


@pytest.mark.slow
def test_progress_is_shown_on_a_terminal_and_nowhere_else(tmp_path):
    arguments = command("plot", "StraightThrough", "--out", str(tmp_path / "s.png"))
    quiet = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert quiet.stderr == ""
    ours, theirs = pty.openpty()
    subprocess.run(arguments, stderr=theirs, check=True)
    os.close(theirs)
    assert b"100 %" in os.read(ours, 4096)
    os.close(ours)


# -- histories


def test_a_history_comes_back(history, tmp_path):
    path = tmp_path / "h.json"
    history.save(path)
    twin = History.load(path)
    assert twin.layers == history.layers
    assert torch.equal(twin.schedule.table, history.schedule.table)
    assert repr(twin.metrics) == repr(history.metrics)


def test_a_history_with_losses_that_are_not_finite_is_strict_json_and_comes_back(history, tmp_path):
    path = tmp_path / "h.json"
    history.metrics = [{"a": math.nan, "b": -math.inf}, {"a": 1.5, "b": math.inf}]
    history.save(path)

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    assert repr(History.load(path).metrics) == repr(history.metrics)


SPOILED = {
    "a list": lambda c: [c],
    "no layers": lambda c: {k: v for k, v in c.items() if k != "layers"},
    "layers of numbers": lambda c: {**c, "layers": 3},
    "another layer": lambda c: {**c, "layers": ["a", "b", "c"]},
    "other fields": lambda c: {**c, "fields": c["fields"][::-1]},
    "a negative std": lambda c: {**c, "settings": [[[-1.0] * 7]]},
    "words": lambda c: {**c, "settings": [[["x"] * 7]]},
    "a ragged table": lambda c: {**c, "settings": [c["settings"][0], []]},
    "a layer without a name": lambda c: {**c, "layers": [1, 2]},
    "a number of 400 digits": lambda c: {**c, "settings": [[[10**400] * 7] * 2]},
    "no settings": lambda c: {**c, "settings": None},
    "metrics in words": lambda c: {**c, "metrics": [{"train_loss": "low"}]},
    "too many metrics": lambda c: {**c, "metrics": [{}] * 9},
}  # fmt: skip


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_what_is_no_history_is_refused(history, tmp_path, spoil):
    path = tmp_path / "h.json"
    history.save(path)
    path.write_text(json.dumps(spoil(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=r"h\.json is not the history of a run"):
        History.load(path)


def test_the_package_runs_as_a_module():
    shown = subprocess.run(
        [sys.executable, "-m", "learnsched", "list"], capture_output=True, text=True, check=True
    )
    assert "default" in shown.stdout
    wrong = [sys.executable, "-m", "learnsched", "plot", "missing"]
    assert subprocess.run(wrong, capture_output=True, check=False).returncode == 1
