"""Every driver in every context with every loss, beside jax alone in float64: all pairs, with prepare and in_place."""

import collections

import matrix_cases
import pytest
from matrix_cases import FAILED, TABLES, Case, covering, entries, impossible, in_part, known, pairs, possible, product
from matrix_drivers import ALONE


def cases():
    """All pairs of the tables' entries that are possible; those that are known to fail are expected to."""
    for case in in_part({*covering(possible()), *FAILED}):
        numbers = known(case)
        marks = [pytest.mark.xfail(strict=True, reason=", ".join(numbers))] if numbers else []
        yield pytest.param(case, id=case.id, marks=marks)


def impossible_cases():
    """For each rule, cases that hold each of the entries that it applies to."""
    applied = collections.defaultdict(list)
    for case in product():
        rule = impossible(case)
        if rule and rule.error and not known(case):
            applied[rule].append(case)
    for rule, of_rule in applied.items():
        for case in in_part(covering(of_rule, entries)):
            yield pytest.param(case, rule, id=case.id)


@pytest.mark.parametrize("case", list(cases()))
def test_a_window_is_what_jax_alone_gives(case):
    """Catches an error where jax has none, and a wrong number."""
    want = matrix_cases.expected(case)
    for name, error in matrix_cases.errors(matrix_cases.run(case), want).items():
        message = f"{case.id}: {name} is off by {error:.1e} of its largest entry"
        assert error <= matrix_cases.tolerance(case), message


@pytest.mark.parametrize(("case", "rule"), list(impossible_cases()))
def test_what_is_impossible_raises(case, rule):
    """Catches a number where there can be none, and a rule that excludes what jax can do."""
    with pytest.raises(rule.error, match=rule.match):
        matrix_cases.run(case, ALONE if rule.alone else None)


def covered(cases):
    return set().union(*map(pairs, cases))


def test_all_possible_pairs_are_covered():
    """Catches an entry that some other is never together with."""
    assert covered(covering(possible())) == covered(possible())


@pytest.mark.parametrize("table", Case._fields)
def test_a_new_entry_is_crossed_with_all_others(table, monkeypatch):
    """Catches a table that the cases are not made of."""
    names = getattr(TABLES, table)
    like = next(iter(names))
    monkeypatch.setitem(names, "new", names[like])
    renamed = [case._replace(**{table: "new"}) for case in possible() if getattr(case, table) == like]
    assert renamed and covered(renamed) <= covered(covering(possible()))
