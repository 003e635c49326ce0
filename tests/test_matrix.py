"""Every driver in every context with every loss, beside jax alone in float64: all pairs, with prepare and in_place."""

import matrix_cases
import pytest


def parameters():
    for case in matrix_cases.chosen():
        numbers = matrix_cases.known(case)
        marks = [pytest.mark.xfail(strict=True, reason=", ".join(numbers))] if numbers else []
        yield pytest.param(case, id=case.id, marks=marks)


@pytest.mark.parametrize("case", list(parameters()))
def test_a_window_is_what_jax_alone_gives(case):
    """Catches an error where jax has none, and a wrong number."""
    want = matrix_cases.expected(case)
    errors = matrix_cases.error(matrix_cases.run(case), want)
    worst = max(errors, key=errors.get)
    assert errors[worst] <= matrix_cases.tolerance(case), f"{case.id}: {worst} is off by {errors[worst]:.1e} of its size"
