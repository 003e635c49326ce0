"""The pages state only what is tested or measured: code runs, figures are those of records, links lead somewhere."""

import json
import pathlib
import re
import statistics
import sys
from unittest import mock

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
# Folders of a checkout alone: no virtual environment that is made in it.
FOLDERS = (".", "benchmarks", "examples", "jaxaccum", "jaxaccum/trainer", "tests")
PAGES = {
    str(path.relative_to(ROOT)): path.read_text() for folder in FOLDERS for path in (ROOT / folder).glob("README.md")
}
BLOCKS = [
    (page, *block) for page, text in PAGES.items() for block in re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL)
]
PYTHON = [pytest.param(code, id=f"{page}-{i}") for i, (page, kind, code) in enumerate(BLOCKS) if kind == "python"]
LINKS = [
    (page, path, text)
    for page, text in PAGES.items()
    for text, path in re.findall(r"\[([^\]]+)\]\(([^)]+)", text)
    if not path.startswith("http")
]


def stand_ins(monkeypatch):
    """Modules in place of libraries that the blocks adapt and the tests don't require."""
    modules = wandb, mlflow = mock.MagicMock(), mock.MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    wandb.run = mlflow.active_run.return_value = None
    wandb.init.side_effect = lambda **options: setattr(wandb, "run", options)
    mlflow.start_run.side_effect = lambda **options: setattr(mlflow.active_run, "return_value", options)
    return modules


@pytest.mark.parametrize("code", PYTHON)
def test_a_block_runs_alone(code, tmp_path, monkeypatch):
    """Catches an example that a reader can't paste, because it is broken or needs the one before it."""
    stand_ins(monkeypatch)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})


def test_the_adapters_of_the_guide_log(monkeypatch):
    """Catches an adapter that calls its library without a step, or not at all, or whose run has ended at a test."""
    wandb, mlflow = stand_ins(monkeypatch)
    (code,) = (code for _, kind, code in BLOCKS if kind == "python" and "wandb.init" in code)
    exec(compile(code, "README.md", "exec"), names := {})
    names["trainer"].test(names["task"], [np.ones((2, 4), np.float32)])
    wandb.init.assert_called_once_with(project="first")
    mlflow.start_run.assert_called_once_with(run_name="first")
    first, *_, last = logged = [call.args[0] for call in wandb.log.mock_calls]
    assert first["step"] == 1 and first.keys() >= {"train_loss", "micro_step", "epoch"}
    assert last["step"] == names["trainer"].global_step and "test_loss" in last
    assert [call.kwargs | call.args[0] for call in mlflow.log_metrics.mock_calls] == logged


def test_what_the_blocks_compute(capsys, tmp_path, monkeypatch):
    """Catches a comment of the README that says another number than its code gives."""
    monkeypatch.chdir(tmp_path)

    def run(name):
        """The names of the block that contains `name`."""
        (code,) = (code for page, kind, code in BLOCKS if page == "README.md" and kind == "python" and name in code)
        namespace = {}
        exec(compile(code, "README.md", "exec"), namespace)
        return namespace

    run("apply_updates(params, updates), state\n")
    assert "2 optimizer steps" in capsys.readouterr().out
    # On 8 devices an epoch is two micro-steps, and each is a window of its own.
    assert run("max_epochs=")["trainer"].global_step == 4


def test_the_readme_is_short():
    """Catches a block that a reader scrolls through, and a page that grows."""
    assert all(len(code.splitlines()) <= 15 for page, _, code in BLOCKS if page == "README.md")
    assert len(README.splitlines()) <= 305


def test_every_example_is_listed():
    """Catches an example that no reader finds."""
    files = {path.name for path in (ROOT / "examples").iterdir() if path.suffix in (".py", ".md")} - {"README.md"}
    assert {path for page, path, _ in LINKS if page == "examples/README.md"} == files | {"../README.md"}


@pytest.mark.parametrize(("page", "kind", "code"), [block for block in BLOCKS if block[1] == "bash"])
def test_the_files_of_the_commands_exist(page, kind, code):
    """Catches a command that starts a script which was moved."""
    for path in re.findall(r"[\w/]+\.py", code):
        assert (ROOT / path).exists()


@pytest.mark.parametrize(("page", "path"), sorted({link[:2] for link in LINKS}))
def test_links_lead_somewhere(page, path):
    """Catches a file that was moved or renamed, and a section that is not there."""
    path, _, section = path.partition("#")
    target = (ROOT / page).parent.joinpath(path) if path else ROOT / page
    assert target.exists()
    if section:
        headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
        assert section in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize(("page", "path", "name"), [link for link in LINKS if re.fullmatch(r"`test_\w+`", link[2])])
def test_the_tests_exist(page, path, name):
    """Catches a guarantee whose test was renamed, moved or deleted."""
    assert f"def {name.strip('`')}(" in (ROOT / page).parent.joinpath(path).read_text()


def test_each_guarantee_has_a_test():
    """Catches a row of the tables that names none."""
    rows = re.findall(r"^\| guarantee \| test \|\n\|---\|---\|\n((?:\|.*\n)+)", PAGES["tests/README.md"], re.M)
    assert rows and all("(" in row.rsplit(" | ", 1)[1] for table in rows for row in table.splitlines())


def test_the_first_block_is_the_two_commands():
    """Catches a set-up that takes more than two commands, one a line."""
    first = re.search(r"```bash\n(.*?)```", README, re.DOTALL).group(1).strip().splitlines()
    assert README.index("```bash") == README.index("```")
    assert len(first) == 2 and first[0].endswith("examples/train_lm.py") and "pytest" in first[1]


def record(name):
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())


def ratio(name, side, other="floor", *, case="N = 1", times="seconds"):
    """The median time of one side of a record over that of another, as a table writes it."""
    (seconds,) = (part[times] for part in record(name)["cases"] if part["name"] == case)
    return f"{statistics.median(seconds[side]) / statistics.median(seconds[other]):.2f}"


def microseconds(side):
    """Beyond the bare loop's, for a micro-step of the Trainer."""
    seconds = record("trainer_overhead-cpu")["seconds"]
    return 1e6 * (statistics.median(seconds[side]) - statistics.median(seconds["bare loop"]))


def gibibytes(side):
    (case,) = (case for case in record("memory-weighted-1.3B-h100")["cases"] if case["side"] == side)
    return f"{case['temp'] / 1024:.1f}"


def planned(trial):
    kinds = ("parameters", "optimizer", "sums", "activations", "peak")
    figures = [f"{trial[kind] / 2**30:.2f}" for kind in kinds]
    return f"| {' | '.join([str(trial['n']), str(trial['k']), *figures, 'yes' if trial['fits'] else 'no'])} |"


def temporary(name, side, k, other, other_k):
    cases = {(case["side"], case["k"]): case["temp"] for case in record(name)["cases"]}
    return f"{cases[side, k] / cases[other, other_k]:.2f}"


def saved(policy):
    """Samples and steps of the adaptive runs to the end of this policy, from the table of the record."""
    (line,) = re.findall(rf"^\| {policy} \| adaptive \|.*$", PAGES["benchmarks/README.md"], re.M)
    return [cell.split()[0] for cell in line.split(" | ")[3:]]


def peak(name):
    peaks = {case["side"]: case["peak"] for case in record(f"memory-{name}-1.3B-h100")["cases"]}
    return f"{peaks['training, Trainer'] / peaks['training, window']:.2f}"


ALONE, LOOP, DRIVERS = "window-unrolled-h100", "window-drivers-loop-h100", "window-drivers-unrolled-h100"
FOUR, MEMORY = "window-unrolled-n4-h100", "memory-1.3B-h100"
BESIDE, TRAINERS = "beside_lightning-h100", "beside_lightning-trainer-h100"
SYNC = "sync in every micro-step"
TWO_CARDS = ("devices-unrolled-h200", "devices-2-unrolled-h200", "devices-unrolled-h100")


def beside_lightning(record, ours):
    return [ratio(record, "Lightning, default", ours, case=case) for case in ("N = 1", "N = 4")]


@pytest.mark.parametrize(
    ("start", "numbers"),
    [
        (
            "| time, N = 1 |",
            [
                *(ratio(ALONE, x) for x in ("window", "window, auto", "host driven", "counter", "optax.MultiSteps")),
                ratio(ALONE, "optax.microbatch"),
                beside_lightning(TRAINERS, "jaxaccum, Trainer")[0],
                ratio(ALONE, "hand-written scan"),
            ],
        ),
        (
            "| time, N = 4 |",
            [
                *(ratio(FOUR, x, case="N = 4") for x in ("window", "window, auto", "host driven", "optax.MultiSteps")),
                beside_lightning(TRAINERS, "jaxaccum, Trainer")[1],
            ],
        ),
        ("| temporary memory |", [*map(gibibytes, ("window", "window, auto", "hand-written scan"))]),
        (
            '"Yours" means',
            [
                *(ratio("devices-4-unrolled-h200", side, "no sync") for side in ("window", SYNC)),
            ],
        ),
        ("- The speed comes from", [ratio(DRIVERS, "host driven, drop")]),
        ("- `coupled_value_and_grad` runs", [ratio("coupled-h100", "coupled", "plain window", case="K = 8, N = 8")]),
        (
            "![Time over the floor",
            [
                *(ratio(ALONE, x) for x in ("window", "host driven", "hand-written scan", "optax.microbatch")),
                ratio(ALONE, "optax.MultiSteps"),
                beside_lightning(TRAINERS, "jaxaccum, Trainer")[0],
                *map(gibibytes, ("window", "hand-written scan")),
            ],
        ),
    ],
)
def test_the_figures_of_the_readme_are_those_of_records(start, numbers):
    """Catches a number that no record has."""
    (paragraph,) = (part for part in re.split(r"\n(?=\||- |\n)", README) if part.strip().startswith(start))
    written = re.findall(r"(?<![.\d])\d+\.\d+\b(?!\.\d)", paragraph)
    assert [x for x in written if x != "1.3"] == numbers


def test_the_plan_of_the_readme_is_that_of_the_record():
    """Catches a table of a plan that no device made."""
    (rows,) = re.findall(r"^\| N \| K \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", README, re.M)
    assert rows.splitlines() == [planned(trial) for trial in record("plan-1.3B-h100")["plan"]["trials"]]


@pytest.mark.parametrize(
    ("start", "numbers"),
    [
        ("window / floor, H100, 124M", [ratio(ALONE, "window"), ratio(DRIVERS, "window")]),
        ("the same, in a loop", [ratio(LOOP, "window")]),
        ("the same, 758M", [ratio("window-758M-h100", "window")]),
        ("`Weighted` window / floor", [ratio(LOOP, "Weighted")]),
        ('window with `prepare="auto"`', [ratio(x, "window, auto") for x in (ALONE, "window-758M-h100")]),
        ("`HostDriven` / floor", [ratio(ALONE, "host driven"), ratio(FOUR, "host driven", case="N = 4")]),
        (
            "`HostDriven` with a cast",
            [ratio(ALONE, "host driven, cast"), ratio(FOUR, "host driven, cast", case="N = 4")],
        ),
        ("counter", [ratio(ALONE, "counter"), ratio(DRIVERS, "counter")]),
        ("`Trainer` / floor", [ratio(DRIVERS, "Trainer"), ratio("window-drivers-loop-trainer-h100", "Trainer")]),
        ("`Trainer(fuse_windows=True)`", [ratio(DRIVERS, "Trainer, fused")]),
        ('`nonfinite="drop"`', [ratio(DRIVERS, "host driven, drop"), ratio(DRIVERS, "Trainer, drop")]),
        (
            "`optax.MultiSteps` / window",
            [
                *(ratio(ALONE, "optax.MultiSteps", side) for side in ("window", "window, auto")),
                ratio("window-muon-h100", "optax.MultiSteps", "window"),
            ],
        ),
        ("window / the same without", [ratio(name, "window", "no sync") for name in TWO_CARDS]),
        ("the same, four H200", [ratio("devices-4-unrolled-h200", "window", "no sync")]),
        (f"{SYNC} / window", [ratio(name, SYNC, "window") for name in (*TWO_CARDS, "devices-4-unrolled-h200")]),
        (
            "`apply`, static boundary / floor",
            [
                ratio("transform-h200", "apply, static boundary", case=f"adamw, {size} leaves")
                for size in ("50M parameters in 12", "50.6M parameters in 144")
            ],
        ),
        (
            "a micro-step at K = 1,024",
            [ratio("scaling-h100", "1024", "8", case="window", times=x) for x in ("seconds", "compile_seconds")],
        ),
        ("temporary memory of a window", [temporary(MEMORY, "window", 64, "window", 2)]),
        (
            "temporary memory, window / gradient",
            [temporary(x, "window", 8, "gradient", 1) for x in (MEMORY, "memory-weighted-1.3B-h100")],
        ),
        ("peak memory of training", [peak(x) for x in ("training", "training-untuned")]),
        ("window with the norms", [ratio("window-noise-h100", "window, noise scale", "window")]),
        ("a K that follows the noise scale / ", saved("K = 16, 8, 4, 2 by epoch")),
        ("Lightning's Trainer / ours", beside_lightning(TRAINERS, "jaxaccum, Trainer")),
        (
            "Lightning's Trainer / our window",
            [*beside_lightning(TRAINERS, "jaxaccum"), *beside_lightning(BESIDE, "jaxaccum")],
        ),
        ("`coupled_value_and_grad`", [ratio("coupled-h100", "coupled", "plain window", case="K = 8, N = 8")]),
    ],
)
def test_the_table_of_targets_is_that_of_records(start, numbers):
    """Catches a target that is said to be met, by a number that no record has."""
    rows = PAGES["benchmarks/README.md"].split("## Targets")[1].split("## Options")[0].splitlines()
    (row,) = (row for row in rows if row.startswith(f"| {start}"))
    measured = row.split(" | ")[2]
    assert re.findall(r"\d+\.\d\d", measured) == numbers


def test_the_figure_of_the_readme_is_drawn_from_the_records(tmp_path, monkeypatch):
    """Catches a picture that was not drawn again."""
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    plots = __import__("plots")
    plots.summary().savefig(tmp_path / "summary.svg")
    labels = lambda path: re.findall("<!-- (.*) -->", path.read_text())
    drawn = ROOT / "benchmarks/results/summary.svg"
    assert labels(drawn) == labels(tmp_path / "summary.svg") and "prefers-color-scheme: dark" in drawn.read_text()


def test_the_cost_of_the_trainer_is_that_of_the_record():
    """Catches a number that no record has."""
    assert f"| {microseconds('Trainer, with bar'):.1f} µs |" in PAGES["benchmarks/README.md"]
    assert f"costs {microseconds('Trainer, with bar'):.0f} µs beyond" in PAGES["jaxaccum/trainer/README.md"]
