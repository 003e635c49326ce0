"""The loggers that are built in, and when they write."""

import csv
import json

import pytest
from training import ones, single, slope

import jaxaccum
from jaxaccum.loggers import CSVLogger, JSONLLogger, TensorBoardLogger


def test_a_run_writes_a_json_line_for_each_record(tmp_path):
    """Catches a last record that is never written, and a file that a second run overwrites."""
    for _ in range(2):
        t = single(logger=True, default_root_dir=tmp_path / "new", log_every_n_steps=2, accumulate_grad_batches=2)
        t.fit(slope(), ones(*[2] * 9), ones(2))
    lines = [json.loads(line) for line in (tmp_path / "new/metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["micro_step"]) for line in lines] == [(2, 4), (4, 8), (5, 9)] * 2
    assert ["val_loss" in line for line in lines] == [False, False, True] * 2
    assert lines[0]["train_loss"] == -1


def test_a_table_gets_a_column_for_every_name(tmp_path):
    """Catches values under the wrong heading, and rows lost when a column is added or a file is taken up again."""
    path = tmp_path / "a" / "metrics.csv"
    CSVLogger(path).write_scalars(1, {"a": 1.5})
    logger = CSVLogger(path)
    logger.write_scalars(2, {"b": 2.5, "a": 3.0})
    logger.write_scalars(3, {"b": 4.0})
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [tuple(row.items()) for row in rows] == [
        (("step", "1"), ("a", "1.5"), ("b", "")),
        (("step", "2"), ("a", "3.0"), ("b", "2.5")),
        (("step", "3"), ("a", ""), ("b", "4.0")),
    ]
    assert [file.name for file in path.parent.iterdir()] == ["metrics.csv"]


def test_tensorboard_gets_a_point_for_every_value(tmp_path):
    """Catches a writer that is not flushed at the run's end."""
    pytest.importorskip("tensorboardX")
    single(logger=[TensorBoardLogger(tmp_path / "tb"), JSONLLogger(tmp_path / "m")], log_every_n_steps=1).fit(
        slope(), ones(2, 2)
    )
    (file,) = (tmp_path / "tb").iterdir()
    assert file.read_bytes().count(b"train_loss") == 2
    assert len((tmp_path / "m").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("module", "use", "extra"),
    [
        ("tensorboardX", TensorBoardLogger, "logs"),
        ("matplotlib.figure", lambda folder: fitted().plot(), "plots"),
    ],
)
def test_a_missing_extra_says_what_to_install(module, use, extra, monkeypatch, tmp_path):
    """Catches an ImportError that names a module only."""
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ImportError, match=rf'pip install "jaxaccum\[{extra}\]"'):
        use(tmp_path)


def fitted():
    trainer = jaxaccum.Trainer(enable_progress_bar=False, max_epochs=1, strategy="single")
    trainer.fit(slope(), ones(2))
    return trainer


def test_logging_does_not_wait_for_the_device():
    """Catches a record that is fetched in the step that makes it."""
    written = []

    class Logger:
        def write_scalars(self, step, scalars):
            written.append(step)

    class Reads(jaxaccum.callbacks.Callback):
        seen = ()

        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            self.seen += (tuple(written),)

    reads = Reads()
    single(logger=Logger(), log_every_n_steps=1, callbacks=reads).fit(slope(), ones(2, 2, 2, 2))
    assert reads.seen == ((), (), (1,), (1, 2)) and written == [1, 2, 3, 4]
