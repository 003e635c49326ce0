"""What `import jaxaccum` imports, and what it doesn't."""

import functools
import importlib.metadata
import inspect
import json
import pydoc
import subprocess
import sys

import pytest

import jaxaccum

EXTRAS = ["equinox", "flax", "matplotlib", "orbax", "sklearn", "tensorboardX", "tensorflow", "torch", "tqdm"]
PUBLIC = {
    "AccumulationSchedule",
    "AdaptiveAccumulation",
    "HostDriven",
    "MultiSteps",
    "MultiStepsState",
    "NoiseScale",
    "Weighted",
    "cast",
    "collectives",
    "coupled_value_and_grad",
    "from_optax",
    "local_value_and_grad",
    "set_every_k",
    "value_and_grad",
    "zero_sharding",
}
# name: its module
LAZY = {
    "Task": "task",
    "Trainer": "trainer",
    "plan": "_choosing.planner",
    "callbacks": "callbacks",
    "checkpoint": "checkpoint",
    "loggers": "loggers",
    "distributed": "distributed",
    "flax": "flax",
    "equinox": "equinox",
}


@functools.cache
def loaded(statement):
    """The names of the modules that `statement` loads in an interpreter of its own."""
    program = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=120, check=True
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_loads_no_extra():
    """Catches an optional dependency that became a required one."""
    modules = loaded("import jaxaccum")
    assert {"jax", "optax", "jaxaccum"} <= modules
    assert modules.isdisjoint(EXTRAS)


def test_import_loads_nothing_of_many_processes():
    """Catches an import of jax's private distributed API by a program that doesn't need it."""
    modules = loaded("import jaxaccum")
    assert modules.isdisjoint({"jaxaccum.distributed", "jaxaccum.distributed.heartbeat", "jaxaccum._jax.coordination"})
    assert "jaxaccum.distributed" in loaded("import jaxaccum.distributed")


def test_import_starts_no_device():
    """Catches an array made at import: it would take the accelerator before `jax.distributed.initialize` could."""
    loaded("import jaxaccum\nfrom jax._src import xla_bridge\nassert not xla_bridge._backends, xla_bridge._backends")


def test_flax_adapters_import_flax_and_not_themselves():
    """Catches `jaxaccum/flax.py` taking the place of flax, by import or by name."""
    modules = loaded(
        "import jaxaccum.flax, flax, flax.nnx\n"
        "assert flax.__name__ == 'flax' and flax.nnx.Module, flax\n"
        "assert jaxaccum.flax.__name__ == 'jaxaccum.flax' and jaxaccum.flax.TrainState"
    )
    assert {"flax", "flax.nnx", "jaxaccum.flax"} <= modules
    assert modules.isdisjoint(set(EXTRAS) - {"flax", "orbax", "tqdm"})  # flax itself may load the latter two.


def test_without_flax_the_core_works_and_the_adapters_say_what_is_missing():
    """Catches a core that reaches for flax behind an import guard, and an adapter that swallows the import error."""
    loaded(
        "sys.modules['flax'] = None\n"
        "import jaxaccum, optax\n"
        "jaxaccum.MultiSteps(optax.sgd(1.0), 2)\n"
        "try:\n"
        "    import jaxaccum.flax\n"
        "except ImportError as error:\n"
        "    assert 'pip install \"jaxaccum[flax]\"' in str(error)\n"
        "else:\n"
        "    raise AssertionError('imported without flax')"
    )


def test_without_equinox_the_core_works_and_the_adapter_says_what_to_install():
    """Catches a core that imports equinox, and an error, or a `help(jaxaccum)` that fails, without the pip command."""
    loaded(
        "sys.modules['equinox'] = None\n"
        "import jaxaccum, optax, pydoc\n"
        "state = jaxaccum.MultiSteps(optax.sgd(1.0), 2).init({'w': 1.0})\n"
        "assert 'MultiSteps' in pydoc.render_doc(jaxaccum) and 'equinox' not in dir(jaxaccum)\n"
        "try:\n"
        "    jaxaccum.equinox\n"
        "except ImportError as error:\n"
        "    assert 'pip install \"jaxaccum[equinox]\"' in str(error)\n"
        "else:\n"
        "    raise AssertionError('imported without equinox')"
    )


def test_the_host_side_is_loaded_when_it_is_asked_for():
    """Catches a Trainer that `import jaxaccum` loads, one that needs an extra, and a name that `dir` hides."""
    assert loaded("import jaxaccum").isdisjoint({f"jaxaccum.{module}" for module in LAZY.values()})
    modules = loaded(
        f"for name, module in {LAZY}.items():\n"
        "    import jaxaccum\n"
        "    assert getattr(jaxaccum, name) and name in dir(jaxaccum)\n"
        "    assert f'jaxaccum.{module}' in sys.modules\n"
        "    assert all((name == extra) == (extra in sys.modules) for extra in ('equinox', 'flax')), name\n"
        "    for own in [name for name in sys.modules if name.partition('.')[0] in ('jaxaccum', 'flax')]:\n"
        "        del sys.modules[own]"
    )
    assert modules.isdisjoint(
        set(EXTRAS) - {"equinox", "flax", "orbax", "tqdm"}
    )  # flax itself may load the latter two.
    with pytest.raises(AttributeError, match="'jaxaccum' has no attribute 'Trainr'"):
        _ = jaxaccum.Trainr


def test_help_shows_the_public_names():
    """Catches names that are reached only as attributes, and so are missing from help and from `import *`."""
    text = pydoc.plain(pydoc.render_doc(jaxaccum))
    contents = text.partition("PACKAGE CONTENTS")[2]
    assert all(name in contents for name in ("callbacks", "checkpoint", "distributed", "equinox", "flax", "loggers"))
    assert all(f"class {name}" in text or f"{name}(" in text for name in {*PUBLIC, "Task", "Trainer", "plan"})
    scope = {}
    exec("from jaxaccum import *", scope)
    assert scope.keys() - {"__builtins__"} == {*PUBLIC, "Task", "Trainer", "plan"}


def test_without_flax_its_adapters_are_no_attribute_to_list():
    """Catches `help(jaxaccum)` that fails because flax is not installed."""
    loaded(
        "sys.modules['flax'] = None\n"
        "import jaxaccum, pydoc\n"
        "assert 'MultiSteps' in pydoc.render_doc(jaxaccum)\n"
        "try:\n"
        "    jaxaccum.flax\n"
        "except ImportError as error:\n"
        "    assert 'flax' in str(error)\n"
        "else:\n"
        "    raise AssertionError('imported without flax')"
    )


def test_the_version_is_that_of_the_installed_distribution():
    """Catches a number written twice, and a source tree that can't be imported because it isn't installed."""
    assert jaxaccum.__version__ == importlib.metadata.version("jaxaccum")
    loaded(
        "import importlib.metadata\n"
        "def missing(name): raise importlib.metadata.PackageNotFoundError(name)\n"
        "importlib.metadata.version = missing\n"
        "import jaxaccum\n"
        "assert jaxaccum.__version__ == '0+unknown', jaxaccum.__version__"
    )


@pytest.mark.parametrize("name", sorted({*PUBLIC, *LAZY}))
def test_the_public_name_is_there_and_documented(name):
    """Catches a name lost from `__init__`, and one without a docstring of its own."""
    public = getattr(jaxaccum, name)
    assert public.__doc__ and "Alias for field" not in public.__doc__
    assert getattr(public, "__module__", public.__name__).startswith("jaxaccum")


@pytest.mark.parametrize("name", sorted({*PUBLIC, "Task", "Trainer", "plan"} - {"MultiStepsState"}))
def test_an_example_comes_before_the_arguments(name):
    """Catches a reference that shows how a name is used after a page of arguments, or not at all."""
    summary, _, rest = inspect.getdoc(getattr(jaxaccum, name)).partition("\n")
    assert summary.endswith(".") and "Example:" in rest
    assert "Args:" not in rest.partition("Example:")[0]


def test_no_other_name_is_public():
    """Catches a helper or a third-party module that slips into the public namespace."""
    modules = {name for name, value in vars(jaxaccum).items() if type(value) is type(sys)}
    public = {name for name in vars(jaxaccum) if not name.startswith("_")}
    assert public - modules - set(LAZY) == PUBLIC
    assert all(vars(jaxaccum)[name].__name__ == f"jaxaccum.{name}" for name in modules & public)
