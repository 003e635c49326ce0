"""optax's own accumulation tests, run from the installed wheel with this package's class in the place of theirs."""

import importlib
import unittest

import pytest
from optax.transforms import _accumulation

import jaxaccum

CASES = {
    "optax.transforms._accumulation_test": ("test_", 12),
    "optax._src.alias_test": ("test_gradient_accumulation", 66),
    "optax._src.factorized_test": ("test_gradient_accumulation", 4),
    "optax.contrib._common_test": ("test_gradient_accumulation", 42),
}


def cases(suite):
    for test in suite:
        if isinstance(test, unittest.TestSuite):
            yield from cases(test)
        else:
            yield test


@pytest.mark.parametrize("module", CASES)
@pytest.mark.filterwarnings("default")  # The tests are optax's; so are their warnings.
def test_optax_own_tests_pass_with_this_class(module, monkeypatch):
    """Catches every difference from the contract that optax itself tests."""
    made = 0

    class Counted(jaxaccum.MultiSteps):
        def __new__(cls, *args, **kwargs):
            nonlocal made
            made += 1
            return super().__new__(cls, *args, **kwargs)

    monkeypatch.setattr(_accumulation, "MultiSteps", Counted)
    prefix, count = CASES[module]
    loaded = unittest.defaultTestLoader.loadTestsFromModule(importlib.import_module(module))
    chosen = [test for test in cases(loaded) if test._testMethodName.startswith(prefix)]
    print(module, len(chosen))
    result = unittest.TestResult()
    unittest.TestSuite(chosen).run(result)
    assert not result.failures + result.errors, "\n".join(text for _, text in result.failures + result.errors)
    assert len(chosen) == count
    assert made
