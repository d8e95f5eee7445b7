"""Every public name has a docstring with an example, and the example runs."""

import doctest
import inspect

import pytest

import learnsched
from learnsched import policies, pretrained

NAMES = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in (learnsched, policies, pretrained)
    for name in module.__all__
    if not inspect.ismodule(getattr(module, name))
}
MISSING = {"learnsched.level_probabilities"}


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_has_an_example_that_runs(name):
    thing = inspect.unwrap(NAMES[name])
    found = doctest.DocTestFinder(recurse=False).find(
        thing, name, globs=dict(vars(inspect.getmodule(thing)))
    )
    examples = [test for test in found if test.examples]
    assert bool(examples) != (name in MISSING)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in examples:
        assert runner.run(test).failed == 0, name
