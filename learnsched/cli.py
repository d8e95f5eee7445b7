"""The command ``learnsched``: look at artefacts, schedules, results and exported networks.

Training a schedule is ``meta_train.py``'s business.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from learnsched import __version__

MISTAKE = 1
INTERRUPTED = 130

_LARGEST_PLAN = 1_000_000  # settings, far more than a figure shows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        arguments: those of the command line if None.

    Returns:
        the exit code: 0; 1 after a mistake, which is told in one line on the standard error; 2 after
        wrong options; 130 after an interruption.
    """
    options = _parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: _say(f"warning: {message}")
            options.verb(options)
            sys.stdout.flush()
    except BrokenPipeError:
        sys.stdout = None  # whoever read has gone; nothing is to be flushed at the end
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ValueError, OSError, ImportError) as error:
        _say(f"error: {error}")
        return MISTAKE
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="learnsched",
        description="Learned schedules for training 1- and 2-bit networks.",
        epilog="Train a schedule of your own with meta_train.py.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    verb = verbs.add_parser(
        "list",
        help="artefacts and their cards",
        description="List the artefacts of the package, or print the cards of those that are named.",
    )
    verb.add_argument("artefacts", nargs="*", metavar="ARTEFACT", help="name or .safetensors file")
    verb.add_argument("--json", action="store_true", help="cards as JSON")
    verb.set_defaults(verb=_list)

    verb = verbs.add_parser(
        "plot",
        help="draw a schedule",
        description="Draw the schedule that a policy makes for a network, with telemetry at rest, or "
        "the one that a run had, from its history file.",
        epilog="Example: learnsched plot default --layers 5 --epochs 30 --steps 200 --out mine.png",
    )
    verb.add_argument(
        "source",
        help="an artefact's name or file, a hand-coded policy such as StraightThrough, or the .json "
        "file of scheduler.history.save()",
    )
    verb.add_argument("--layers", type=_count, default=4, help="layers of the network (4)")
    verb.add_argument("--epochs", type=_count, default=12, help="epochs of the run (12)")
    verb.add_argument("--steps", type=_count, help="optimizer steps an epoch; unknown if omitted")
    verb.add_argument("--fan-in", type=_count, default=50, help="weights of one output unit (50)")
    verb.add_argument(
        "--spatial-dims",
        type=int,
        choices=range(4),
        default=0,
        help="along which weights slide: 1 for signals, 2 for images, 0 for vectors (0)",
    )
    verb.add_argument("--levels", type=_levels, nargs=2, default=(3, 4), metavar=("W", "A"),
                      help="number of levels of weights and of activations, 0: real (3 4)")  # fmt: skip
    verb.add_argument("--fine-tuning", action="store_true", help="start from a float network")
    verb.add_argument("--out", type=Path, default=Path("schedule.png"), help="file (schedule.png)")
    of_run = ("layers", "epochs", "steps", "fan_in", "spatial_dims", "levels", "fine_tuning")
    verb.set_defaults(verb=_plot, usual={name: verb.get_default(name) for name in of_run})

    verb = verbs.add_parser(
        "compare",
        help="table and figure of measured accuracies",
        description="Print the table of comparisons that learnsched.benchmarks.held_out or "
        "meta_train.py has measured, and draw them with --out.",
    )
    verb.add_argument("results", type=Path, nargs="+", help="JSON files of records")
    verb.add_argument("--baseline", help="method whose mean is drawn through the figure")
    verb.add_argument("--out", type=Path, help="file of the figure")
    verb.set_defaults(verb=_compare)

    verb = verbs.add_parser(
        "inspect",
        help="what an exported network holds",
        description="Describe an exported network: layers, bits, sizes, operations, sparsity, memory.",
    )
    verb.add_argument("path", type=Path, help="what an export function has written")
    verb.set_defaults(verb=_inspect)
    return parser


def _list(options: argparse.Namespace) -> None:
    from learnsched.pretrained import list_pretrained, pretrained_card
    from learnsched.pretrained.card import render_card
    from learnsched.tables import aligned

    names = options.artefacts or list_pretrained()
    cards = {name: pretrained_card(name) for name in names}
    if options.json:
        print(json.dumps(cards, indent=2, ensure_ascii=False))
    elif options.artefacts:
        print("\n\n".join(render_card(card) for card in cards.values()))
    else:
        rows = [("name", "made", "epochs", "layers", "optimizer steps", "validation error")]
        for name, card in cards.items():
            made, domain = card.get("made", {}), card["config"]["domain"]
            seen = ["{:g} to {:g}".format(*domain[key]) for key in ("horizon", "depth", "steps")]
            error = made.get("validation_error")
            rows.append(
                (name, made.get("date", "?"), *seen, "?" if error is None else f"{error:.1%}")
            )
        print(aligned(rows))


def _plot(options: argparse.Namespace) -> None:
    from learnsched.history import History
    from learnsched.plotting import plot_schedule
    from learnsched.schedule import LayerInfo, RunInfo, plan

    if options.source.endswith(".json"):
        given = [name for name, usual in options.usual.items() if getattr(options, name) != usual]
        if given:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ValueError(f"{options.source} says itself what was applied; leave {names} out")
        schedule, title = History.load(options.source).schedule, f"History {options.source}"
    else:
        if options.layers * options.epochs > _LARGEST_PLAN:
            raise ValueError(f"a schedule of more than {_LARGEST_PLAN:,} settings is not drawn")
        weights, activations = options.levels
        layers = tuple(
            LayerInfo(f"layer {i + 1}", options.fan_in, weights, activations, options.spatial_dims)
            for i in range(options.layers)
        )
        run = RunInfo(layers, options.epochs, options.steps, options.fine_tuning)
        schedule = plan(_policy(options.source), run, progress=_percentage(options.epochs))
        title = f"{options.source}, {options.layers} layers, {options.epochs} epochs"
    plot_schedule(schedule, options.out, title=title)
    print(f"wrote {options.out}")


def _policy(source: str) -> Any:
    """A policy from its class's name, or a learned one from its artefact."""
    from learnsched import policies
    from learnsched.pretrained import load_pretrained
    from learnsched.schedule import Policy

    kind = getattr(policies, source, None) if source in policies.__all__ else None
    if kind is None:
        return load_pretrained(source)
    try:
        policy = kind()
    except TypeError:
        policy = None
    if not isinstance(policy, Policy):
        raise ValueError(f"{source} is not a policy that can be made without arguments")
    return policy


def _compare(options: argparse.Namespace) -> None:
    from learnsched.plotting import plot_comparison

    if options.baseline is not None and options.out is None:
        raise ValueError("--baseline is drawn through the figure; name the figure with --out")
    comparison = _optional("learnsched.benchmarks.comparison", "metatrain")

    records = [record for path in options.results for record in _records(path)]
    _check_grid(records)
    print(comparison.table(records))
    if options.out is not None:
        plot_comparison(comparison.by_task(records), options.out, baseline=options.baseline)
        print(f"\nwrote {options.out}")


def _records(path: Path) -> list[dict[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    records = content.get("records") if isinstance(content, dict) else content
    if not isinstance(records, list) or not records or not all(map(_is_record, records)):
        raise ValueError(
            f"{path} holds no records of a comparison; python -m learnsched.benchmarks.held_out "
            "--json FILE writes them"
        )
    return records


def _check_grid(records: Sequence[dict[str, Any]]) -> None:
    """Methods can be compared where each has the same runs of the same tasks."""
    runs = {(r["task"], r["method"]): len(r["test"]) for r in records}
    if len(runs) < len(records):
        raise ValueError("the files hold results of the same task and method more than once")
    for task in dict.fromkeys(r["task"] for r in records):
        counts = {r["method"]: runs.get((task, r["method"]), 0) for r in records}
        if len(set(counts.values())) > 1:
            raise ValueError(f"the methods have unlike numbers of runs on {task!r}: {counts}")


def _is_record(record: Any) -> bool:
    return (
        isinstance(record, dict)
        and all(isinstance(record.get(key), str) for key in ("task", "cell", "method"))
        and isinstance(record.get("test"), list)
        and bool(record["test"])
        and all(type(value) in (int, float) and 0 <= value <= 1 for value in record["test"])
    )


def _inspect(options: argparse.Namespace) -> None:
    if not options.path.exists():
        raise FileNotFoundError(f"there is no {options.path}")
    print(_optional("learnsched.export.inspect", "export").inspect(options.path))


def _optional(module: str, extra: str) -> Any:
    """A module of the package that needs an extra."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("learnsched."):
            raise ImportError(f"this version of learnsched has no {module}") from error
        raise ImportError(f"{error.name} is missing; pip install 'learnsched[{extra}]'") from error


def _count(text: str, least: int = 1) -> int:
    """A whole number, for argparse."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(
            f"must be a whole number of at least {least}, got {text!r}"
        )
    return int(text)


def _levels(text: str) -> int:
    """A number of levels, or 0 for what stays real, for argparse."""
    return 0 if text == "0" else _count(text, least=2)


def _percentage(total: int) -> Callable[[int], None] | None:
    """Shows on a terminal how far a count has got, in per cent."""
    if not sys.stderr.isatty():
        return None

    def show(count: int) -> None:
        if count == total or 100 * count // total > 100 * (count - 1) // total:
            end = "\n" if count == total else ""
            print(f"\rlearnsched: {100 * count // total:3} %", end=end, file=sys.stderr, flush=True)

    return show


def _say(text: str) -> None:
    """Tell the user beside the output."""
    print(f"learnsched: {text}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
