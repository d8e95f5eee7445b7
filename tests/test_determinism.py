"""Every command, run twice in separate processes, gives the same to the bit; times apart."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from learnsched.pretrained import pretrained_card

ROOT = Path(__file__).parent.parent


def module(name, *arguments):
    return ["-m", name, *arguments]


def without_times(path):
    """The content of a file, without the seconds that its making took."""
    if path.suffix == ".safetensors" and path.stem == "schedule":
        card = pretrained_card(path)
        return json.dumps([card["sha256"], card["config"]]).encode()
    if path.suffix in (".json", ".jsonl"):
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        return json.dumps([_stripped(json.loads(line)) for line in lines]).encode()
    return path.read_bytes()


def _stripped(value):
    if isinstance(value, dict):
        return {k: _stripped(v) for k, v in value.items() if k not in TIMES}
    return [_stripped(v) for v in value] if isinstance(value, list) else value


TIMES = ("seconds", "milliseconds", "date", "cpu_seconds")

# Files whose bytes hold times or the order of processes: checkpoints carry the seconds.
LEFT_OUT = ("checkpoint.safetensors", "last.pt")

EXPORT = """
import sys, torch, learnsched as ls
from learnsched import cli
from learnsched.export import QuantizedInput
torch.manual_seed(0)
net = torch.nn.Sequential(QuantizedInput(0.05), torch.nn.Linear(8, 4))
ls.export_ternary(ls.finalize_(ls.quantize_(net, ls.ternary())), torch.randn(20, 8), "net")
sys.exit(cli.main(["inspect", "net"]))
"""


EMBED = """
import shutil, sys, learnsched
from pathlib import Path
from learnsched.pretrained import embed_card
for suffix in (".safetensors", ".json"):
    shutil.copy(Path(learnsched.__file__).with_name("pretrained") / ("default" + suffix), ".")
embed_card.main(["default.safetensors"])
"""


def benchmark(name):
    return module(f"learnsched.benchmarks.{name}", "--quick", "--json", "rows.json")


COMMANDS = {
    "list": module("learnsched.cli", "list", "--json", "default"),
    "plot": module("learnsched.cli", "plot", "default", "--out", "schedule.png"),
    "inspect": ["-c", EXPORT],
}
SLOW = {
    "compare": module("learnsched.cli", "compare", "figures/held_out.json", "--out", "c.png"),
    "meta_train": ["meta_train.py", "--steps", "1", "--no-report", "--out", "run"],
    "meta_train_from": [
        "meta_train.py",
        "--steps",
        "1",
        "--no-report",
        "--from",
        "default",
        "--out",
        "run",
    ],
    "held_out": module(
        "learnsched.benchmarks.held_out",
        "--quick",
        "--tasks",
        "other seeds, mlp",
        "--json",
        "r.json",
    ),
    "use_in_your_loop": module("learnsched.guides.use_in_your_loop", "--quick", "--out", "run"),
    "train_your_own": module("learnsched.guides.train_your_own", "--quick", "--out", "run"),
    "add_your_own": module("learnsched.guides.add_your_own", "--quick", "--out", "run"),
    "figures": ["figures/make.py"],
    "gradient": benchmark("gradient"),
    "curve_search": benchmark("curve_search"),
    "export": benchmark("export"),
    "accuracy": [*benchmark("accuracy"), "--methods", "straight-through", "learned"],
    "report": module("learnsched.benchmarks.report", "figures/methods.jsonl", "--into", "pages"),
    "ablation": benchmark("ablation"),
    "room": benchmark("room"),
    "transfer": benchmark("transfer"),
    "full_size": benchmark("full_size"),
    "first_layer": benchmark("first_layer"),
    "follow_loss": benchmark("follow_loss"),
    "activation_width": benchmark("activation_width"),
    "weight_noise": benchmark("weight_noise"),
    "warm_up": benchmark("warm_up"),
    "stability": benchmark("stability"),
    "selection": benchmark("selection"),
    "without_batch_norm": benchmark("without_batch_norm"),
    "other_problems": benchmark("other_problems"),
    "tuned_once": benchmark("tuned_once"),
    "learning_rates": benchmark("learning_rates"),
    "random_networks": benchmark("random_networks"),
    "payback": module("learnsched.benchmarks.payback"),
    "embed_card": ["-c", EMBED],
}
# What they print holds seconds.
TIMED = ("gradient", "export", "curve_search", "accuracy", "stability")
# They measure nothing else than times and memory; peers is `accuracy` with packages that are not ours.
TIMES_ALONE = ("unroll", "speed", "outer_steps", "population")
ELSEWHERE = ("peers",)
EVERY = [
    *COMMANDS.items(),
    *(pytest.param(*item, marks=pytest.mark.slow) for item in SLOW.items()),
]


def test_every_program_is_listed_here():
    programs = {
        path.stem
        for path in ROOT.glob("learnsched/**/*.py")
        if '__name__ == "__main__"' in path.read_text()
    }
    verbs = {"cli", "__main__"}  # list, plot, inspect and compare
    assert programs - verbs <= {*COMMANDS, *SLOW, *TIMES_ALONE, *ELSEWHERE}


def hashes(command, folder, timed):
    """Of every file that the command leaves, and of the standard output, unless that holds times."""
    folder.mkdir()
    shutil.copytree(ROOT / "figures", folder / "figures")
    shutil.copy(ROOT / "meta_train.py", folder)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": folder.name[-1]}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        cwd=folder, env=environment, capture_output=True, check=True, timeout=900,
    )  # fmt: skip
    found = {} if timed else {"output": result.stdout}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in LEFT_OUT and "tensorboard" not in path.parts:
            found[str(path.relative_to(folder))] = without_times(path)
    return {name: hashlib.sha256(content).hexdigest() for name, content in found.items()}


@pytest.mark.parametrize(("name", "command"), EVERY)
def test_a_command_run_twice_gives_the_same(name, command, tmp_path):
    first, second = (hashes(command, tmp_path / f"run{n}", name in TIMED) for n in (1, 2))
    assert first == second
    assert len(first) > 2
