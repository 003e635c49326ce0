"""A small part of what `tests/fuzz.py` draws, always the same one: what nobody thought of, beside jax in float64."""

import fuzzing
import pytest

CONFIGURATIONS = fuzzing.configurations(seed=7, count=24)


@pytest.mark.parametrize("config", CONFIGURATIONS, ids=map(str, range(len(CONFIGURATIONS))))
def test_a_random_configuration_is_what_jax_has(config):
    """Catches a driver that fails where two options, a placement and a transform meet."""
    assert not fuzzing.failure(config), fuzzing.report(config)


def test_a_failure_is_told_at_its_smallest(monkeypatch):
    """Catches a report that leaves in what the failure doesn't need."""
    config = next(c for c in fuzzing.configurations(0, 99) if c["kind"] == "stream" and len(c["events"]) > 4)
    wrong = {**config, "nonfinite": "drop", "events": [*config["events"], "flush"]}
    fails = lambda c: "ValueError: planted" if c["nonfinite"] == "drop" and "flush" in c["events"] else None
    monkeypatch.setattr(fuzzing, "failure", fails)
    plain = {name: values[0] for name, values in fuzzing.STREAM.items()}
    small = fuzzing.smallest(wrong)
    assert small["events"] == ["flush"]
    assert {name for name, value in plain.items() if small[name] != value} == {"nonfinite"}
