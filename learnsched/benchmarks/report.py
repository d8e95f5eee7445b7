"""Tables and figures of an accuracy benchmark, from its records.

    python -m learnsched.benchmarks.report FOLDER [--into figures]

FOLDER is what ``learnsched.benchmarks.accuracy --out`` wrote, or a file of JSON lines. The report is
``methods.md``, its figures ``methods_*.png``, and ``methods.jsonl`` has all records.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from learnsched.benchmarks import report_figures, transfer
from learnsched.benchmarks.methods import WARM_UP_SUFFIX, rivals
from learnsched.benchmarks.records import PARAMETRIC, PEER, START, read
from learnsched.benchmarks.report_tables import (
    accuracy_table,
    chosen_table,
    claims_table,
    knobs,
    knobs_table,
    learned_names,
    learned_table,
    margins,
    method_table,
    names,
    network_table,
    rates_line,
    search_table,
)
from learnsched.benchmarks.statistics import (
    Cells,
    Comparison,
    Record,
    against_best,
    best,
    best_validated,
    by_cell,
    compare,
    overall_gap_closed,
    search_curve,
)
from learnsched.files import write_text


def _without_warm_up(rows: Mapping[str, Record]) -> dict[str, Record]:
    return {name: record for name, record in rows.items() if not name.endswith(WARM_UP_SUFFIX)}


def _named(rows: Mapping[str, Record], names: Sequence[str]) -> dict[str, Record]:
    return {name: record for name, record in rows.items() if name in names}


# Against whom a learned method is compared, besides the best hand-coded one of each cell.
RIVALS: dict[str, Callable[[Mapping[str, Record]], Record | None]] = {
    "the hand-coded method of best validation accuracy": best_validated,
    "the same of those without a warm-up": lambda rows: best_validated(_without_warm_up(rows)),
    "the best hand-coded method without a warm-up": lambda rows: best(_without_warm_up(rows)),
    "its closed form, before meta-training": lambda rows: best(rows, START),
    "a search over the closed form": lambda rows: best(rows, PARAMETRIC),
    "the better public peer": lambda rows: best(rows, PEER),
    "PARQ of torchao": lambda rows: rows.get("PARQ (torchao)"),
    "Brevitas": lambda rows: rows.get("Brevitas"),
    f"the best of the {len(transfer.RIVALS)} methods that are carried over": lambda rows: best(
        _named(rows, transfer.RIVALS)
    ),
    f"the best of the {len(rivals())} methods of the held-out tasks": lambda rows: best(
        _named(rows, [method.name for method in rivals()])
    ),
}


def verdict(found: Comparison, first: str, second: str) -> str:
    """A comparison in one sentence."""
    return (
        f"{first} against {second}: ahead in {found.wins} of {len(found.margins)} cells "
        f"(interval above 0 in {found.clear_wins}, below 0 in {found.clear_losses}), "
        f"mean margin {found.interval.text('+')} points; Wilcoxon's signed-rank test over cells "
        f"p = {found.p_signed_rank:.3g}, sign test p = {found.p_sign:.3g}."
    )


def by_data(found: Comparison, cells: Cells) -> str:
    """The mean margin over the cells of each data set, in one sentence."""
    groups: dict[str, list[float]] = {}
    for cell, margin in found.margins.items():
        data = next(iter(cells[cell].values()))["description"].split()[0]
        groups.setdefault(data, []).append(100 * margin)
    means = (f"{data} {fmean(group):+.1f} ({len(group)})" for data, group in groups.items())
    return f"Mean margin by data set (cells): {', '.join(means)}."


def _trials(records: Sequence[Record]) -> int:
    """Runs of one method's search."""
    budget = records[0]["budget"]
    return int(budget["rounds"] * budget["trials"] * budget["trial_runs"])


def conditions(records: Sequence[Record]) -> str:
    """Budget, seeds, machine and cost, as a list."""
    environments = [r["environment"] for r in records]

    def every(key: str) -> str:
        return ", ".join(sorted({str(e[key]) for e in environments}))

    budgets = {json.dumps(r["budget"], sort_keys=True): r["budget"] for r in records}.values()
    seeds = sorted({len(r["test"]) for r in records})
    hours = sum(r["cpu_seconds"] for r in records) / 3600
    lines = [
        f"- {len({r['cell'] for r in records})} cells, {len({r['method'] for r in records})} methods, "
        f"{len(records)} records; {', '.join(map(str, seeds))} seeds each; {hours:.2f} CPU hours",
        *(
            f"- {b['rounds'] * b['trials']} trials of each method with {b['trial_runs']} seed(s), in "
            f"{b['rounds']} rounds; the learning rate is among the parameters; chosen on validation data"
            for b in budgets
        ),
        f"- {every('processor')}; python {every('python')}, torch {every('torch')}; "
        f"{every('date')}; commit {every('commit')}",
    ]
    return "\n".join(lines)


def missing(cells: Cells) -> str:
    """What the cells do not have of the methods of other cells of their bits."""
    by_bits: dict[str, set[str]] = {}
    for rows in cells.values():
        by_bits.setdefault(_bits(rows), set()).update(rows)
    gaps = {cell: sorted(by_bits[_bits(rows)] - set(rows)) for cell, rows in cells.items()}
    lines = [f"- {cell}: {', '.join(absent)}" for cell, absent in gaps.items() if absent]
    return "\n".join(lines) or "Nothing."


def _bits(rows: Mapping[str, Record]) -> str:
    return str(next(iter(rows.values()))["bits"])


def _of_learned(cells: Cells, name: str, trials: int) -> list[str]:
    """What the page says of a learned method."""
    parts = [
        f"## {name.capitalize()} against the best hand-coded method",
        learned_table(cells, name),
        rates_line(cells, name),
    ]
    found = against_best(cells, name)
    if found is not None:
        parts += [verdict(found, name, "the best hand-coded method"), by_data(found, cells)]
    gap = overall_gap_closed(cells, name)
    if gap is not None:
        parts.append(f"Gap closed over all cells, as the ratio of sums: {100 * gap:.0f} %.")
    for text, choose in RIVALS.items():
        pairs = {
            cell: (rows[name], rival)
            for cell, rows in cells.items()
            if name in rows and (rival := choose(rows)) is not None
        }
        if pairs:
            found = compare(pairs)
            parts += [verdict(found, name, text), by_data(found, cells)]
    if any(name in rows and best(rows, START) for rows in cells.values()):
        parts += [
            "What the network adds to its closed form, where it is applied: validation accuracy at "
            "the learning rates that both have tried, and test accuracy at those chosen:",
            network_table(cells, name),
        ]
    parts += [
        "Searching among hand-coded methods, drawn at random and judged on validation data:",
        search_table(cells, name, trials),
        "![search](methods_search.png)",
        "![margins](methods_margins.png)",
    ]
    if any(rows.get(name, {}).get("shorter") for rows in cells.values()):
        parts.append("![epochs](methods_epochs.png)")
    return parts


def page(records: Sequence[Record], shares: Mapping[str, Mapping[str, float]]) -> str:
    """The whole page in Markdown.

    Args:
        records: of all cells and methods.
        shares: what :func:`knobs` gives.

    Raises:
        ValueError: there are no records.
    """
    if not records:
        raise ValueError("no records; run python -m learnsched.benchmarks.accuracy first")
    cells = by_cell(records)
    parts = [
        "# Methods by hand, and learned", conditions(records),
        "## Test accuracy", "In %, mean over seeds and 95 % interval; the best hand-coded "
        "method of a cell in bold, chosen on test data, which favours it.", accuracy_table(cells),
    ]  # fmt: skip
    for name in learned_names(cells):
        parts += _of_learned(cells, name, _trials(records))
    parts += [
        "## Methods over all cells", "Margins are to the best hand-coded method of each cell, so a "
        "hand-coded method has 0 at most; rank among the hand-coded methods.",
        method_table(cells), "![ranking](methods_ranking.png)",
        "## Claims", claims_table(cells),
    ]  # fmt: skip
    if shares:
        parts += [
            "## Which parameter matters",
            "Functional ANOVA of the searches of all cells that have all of a method's parameters "
            "(where activations are real, none of theirs is searched), each cell's accuracies "
            "standardised.",
            knobs_table(shares), "![parameters](methods_parameters.png)",
        ]  # fmt: skip
    parts += ["## What was chosen", chosen_table(cells), "## Missing", missing(cells)]
    return "\n\n".join(parts) + "\n"


def write(records: Sequence[Record], into: Path) -> None:
    """Write the page, its figures and the records."""
    cells = by_cell(records)
    shares = knobs(cells)
    text = page(records, shares)
    into.mkdir(parents=True, exist_ok=True)
    report_figures.margins(cells, into / "methods_margins.png")
    report_figures.ranking(
        {n: margins(cells, n) for n in names(cells)}, into / "methods_ranking.png"
    )
    report_figures.epochs(cells, into / "methods_epochs.png")
    for name in learned_names(cells)[:1]:
        curve = search_curve(cells, name)
        report_figures.search_cost(curve, _trials(records), into / "methods_search.png")
    if shares:
        report_figures.parameters(shares, into / "methods_parameters.png")
    write_text(into / "methods.jsonl", "".join(json.dumps(r) + "\n" for r in records))
    write_text(into / "methods.md", text)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of the benchmark, or a file of JSON lines")
    parser.add_argument("--into", type=Path, help="folder of the report; FOLDER/report if omitted")
    options = parser.parse_args(arguments)
    into = (
        options.into
        or (options.folder if options.folder.is_dir() else options.folder.parent) / "report"
    )
    records = read(options.folder)
    if not records:
        raise SystemExit(
            f"no records in {options.folder}; run learnsched.benchmarks.accuracy first"
        )
    write(records, into)
    print(f"{len(records)} records: {into / 'methods.md'}")


if __name__ == "__main__":
    main()
