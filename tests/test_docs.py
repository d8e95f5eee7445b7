"""Every public name has an example in its docstring, which ``pytest --doctest-modules`` runs."""

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import learnsched

ROOT = Path(__file__).parent.parent
# What is run, not imported.
PROGRAMS = ("learnsched.benchmarks", "learnsched.guides")


def exported():
    """The names that a package lists in ``__all__``."""
    names = [f"learnsched.{name}" for name in learnsched.__all__]
    for module in pkgutil.iter_modules(learnsched.__path__, "learnsched."):
        if module.ispkg:
            package = importlib.import_module(module.name)
            names += [f"{module.name}.{name}" for name in getattr(package, "__all__", ())]
    return names


def shown():
    """The names that the README, a guide or ``meta_train.py`` imports from a module."""
    readme = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    programs = [*ROOT.glob("learnsched/guides/*.py"), ROOT / "meta_train.py"]
    for text in [*readme, *(path.read_text() for path in programs)]:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("learnsched"):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def others():
    """The callbacks, what users meet as an attribute or a result, and the estimators."""
    yield from (
        f"learnsched.integrations.{framework}.QuantizationCallback"
        for framework in ("lightning", "transformers", "skorch")
    )
    yield from (
        "learnsched.conversion_report.Report", "learnsched.layers.quantized_layers",
        "learnsched.finalize.IntegerWeights", "learnsched.meta.unrolled.Unrolled",
        "learnsched.meta.evolution.EvolutionStrategies", "learnsched.meta.hybrid.Hybrid",
        "learnsched.meta.guarded.Guarded", "learnsched.meta.parameter_evolution.ParameterEvolution",
        "learnsched.scales.ScaleRule", "learnsched.schedule.Policy", "learnsched.history.History",
    )  # fmt: skip


NAMES = sorted(
    name
    for name in {*exported(), *shown(), *others()}
    if not name.startswith(PROGRAMS)
    and ("integrations" in name or callable(pkgutil.resolve_name(name)))
)


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_has_an_example(name):
    if "integrations" in name:
        pytest.importorskip(name.split(".")[2])
    found = inspect.unwrap(pkgutil.resolve_name(name))
    tests = doctest.DocTestFinder(recurse=False).find(found, name, module=False)
    assert any(test.examples for test in tests)


def test_the_examples_are_run_by_pytest(pytestconfig):
    assert "learnsched" in pytestconfig.getini("testpaths")
    assert "--doctest-modules" in pytestconfig.getini("addopts")


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("learnsched/*/__init__.py")), ids=lambda p: p.parent.name
)
def test_a_package_exports_what_it_imports(path):
    package = importlib.import_module(f"learnsched.{path.parent.name}")
    imported = {
        alias.asname or alias.name
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("learnsched")
        for alias in node.names
    }
    names = {n for n in imported if not inspect.ismodule(getattr(package, n))}
    assert names <= set(getattr(package, "__all__", ()))


def test_the_names_are_found():
    for found in (exported(), list(shown()), list(others())):
        assert len(found) >= 10
    assert {"learnsched.ternary", "learnsched.policies.LearnedPolicy"} <= set(NAMES)


def test_the_readme_names_every_preset():
    from learnsched.meta.presets import PRESETS

    [listed] = re.findall(
        r"^Presets: (.*?)\n\n", (ROOT / "README.md").read_text(), re.DOTALL | re.M
    )
    assert set(PRESETS) <= set(re.findall(r"`([a-z-]+)`", listed))
