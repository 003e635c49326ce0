"""optax's own accumulation tests, run from the installed wheel with this package's class in place of theirs."""

import importlib
import unittest

import pytest
from optax.transforms import _accumulation

import jaxaccum

# module: the tests of its that accumulate
CASES = {
    "optax.transforms._accumulation_test": "test_",
    "optax._src.alias_test": "test_gradient_accumulation",
    "optax._src.factorized_test": "test_gradient_accumulation",
    "optax.contrib._common_test": "test_gradient_accumulation",
}
# Those of them that are about something else.
OTHERS = ("test_ema", "test_skip_")


def cases(suite):
    for test in suite:
        if isinstance(test, unittest.TestSuite):
            yield from cases(test)
        else:
            yield test


@pytest.mark.parametrize("module", CASES)
@pytest.mark.filterwarnings("default")  # The tests are optax's; so are their warnings.
def test_optax_own_tests_pass_with_this_class(module, monkeypatch):
    """Catches every difference from the contract that optax itself tests, however many tests that are."""
    made = 0

    class Counted(jaxaccum.MultiSteps):
        def __new__(cls, *args, **kwargs):
            nonlocal made
            made += 1
            return super().__new__(cls, *args, **kwargs)

    monkeypatch.setattr(_accumulation, "MultiSteps", Counted)
    loaded = unittest.defaultTestLoader.loadTestsFromModule(importlib.import_module(module))
    chosen = [test for test in cases(loaded) if test._testMethodName.startswith(CASES[module])]
    print(module, len(chosen))
    assert chosen
    for test in chosen:
        before, result = made, unittest.TestResult()
        unittest.TestSuite([test]).run(result)
        assert not result.failures + result.errors, "\n".join(text for _, text in result.failures + result.errors)
        assert made > before or test._testMethodName.startswith(OTHERS), test.id()
