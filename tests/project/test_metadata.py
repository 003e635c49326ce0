"""What the package requires, and that it is what is installed beside it: pip found versions that accept each other."""

import importlib.metadata
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]
METADATA = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = METADATA["project"]
BESIDE = ["jax", "jaxlib", "optax", "flax", "equinox", "orbax-checkpoint", "numpy"]


def refused(requirements):
    """Those of the requirements, for this Python and without extras, that the installed versions don't meet."""
    for requirement in map(Requirement, requirements):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            version = importlib.metadata.version(requirement.name)
            if not requirement.specifier.contains(version, prereleases=True):
                yield f"{requirement}, not {version}"


def test_the_installed_versions_are_accepted():
    """Catches a lower bound above what a supported environment can have."""
    extras = PROJECT["optional-dependencies"]
    every = [*PROJECT["dependencies"], *extras["flax"], *extras["training"]]
    assert not list(refused(x for x in every if not x.startswith("jaxaccum")))


@pytest.mark.parametrize("package", BESIDE)
def test_a_package_beside_it_accepts_the_others(package):
    """Catches an environment that pip would not have made, in which the other tests would prove nothing."""
    assert not list(refused(importlib.metadata.requires(package) or ()))
    python = importlib.metadata.metadata(package)["Requires-Python"]
    assert SpecifierSet(python).contains(".".join(map(str, sys.version_info[:3])))


@pytest.mark.parametrize("python", ["3.11.0", "3.12.0", "3.13.0"])
def test_the_supported_pythons(python):
    """Catches a bound that leaves out a Python whose environments the tests run in."""
    assert SpecifierSet(PROJECT["requires-python"]).contains(python)


def test_the_oldest_jax():
    """Catches a bound that is not the version that .ci/run tests."""
    (jax,) = (x for x in map(Requirement, PROJECT["dependencies"]) if x.name == "jax")
    script = (ROOT / ".ci/run").read_text()
    oldest = str(jax.specifier).removeprefix(">=")
    assert f"'jax=={oldest}'" in script
    assert jax.specifier.contains(oldest) and not jax.specifier.contains("0.9.1")


def test_what_is_packed():
    """Catches a wheel with more than the package, a guide or a type marker left out, and a folder that was renamed."""
    targets = METADATA["tool"]["hatch"]["build"]["targets"]
    assert targets["wheel"] == {"packages": ["jaxaccum"]}
    assert all((ROOT / path).exists() for path in targets["sdist"]["include"])
    assert all((ROOT / "jaxaccum" / path).exists() for path in ("py.typed", "README.md", "trainer/README.md"))
