"""Runs that start from given parameters, and parameters out of a checkpoint."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training import Recorder, assert_same, loader, ones, single, slope, task, trainer

import jaxaccum
from jaxaccum.callbacks import ModelCheckpoint

BIAS = np.zeros(2, np.float32)
PLACES = [("single", 1), ("ddp", 4), ("zero", 4), ("dp", 4)]


def test_a_run_starts_at_given_parameters():
    """Catches parameters of `Task.init`, and a momentum of another run: from 5, by 1 a window, then by 1 + 0.5."""
    the_task = slope(optax.sgd(1.0, momentum=0.5))
    moved = Recorder(lambda t: (t.global_step, float(t.state.params)))
    t = single(callbacks=moved, accumulate_grad_batches=2)
    first = t.fit(the_task, ones(2, 2, 2, 2))
    assert moved.seen == [(0, 0.0), (1, -1.0), (1, -1.0), (2, -2.5)]
    moved.seen.clear()
    t.fit(the_task, ones(2, 2, 2, 2), init_from=5.0 + first.params * 0)
    assert moved.seen == [(0, 5.0), (1, 4.0), (1, 4.0), (2, 2.5)]
    moved.seen.clear()  # The momentum is 1.5, so the next steps are 1.75 and 1.875.
    t.fit(the_task, ones(2, 2, 2, 2), init_from=first)
    assert moved.seen == [(0, -2.5), (1, -4.25), (1, -4.25), (2, -6.125)]
    assert float(first.params) == -2.5  # A copy was donated.


@pytest.mark.parametrize(("strategy", "devices"), PLACES)
def test_two_runs_are_one(tmp_path, strategy, devices):
    """Catches an optimizer or model state that is lost on the way, or a placement that compiles another program."""
    the_task, batches = task(model_state=True), loader(*[8] * 8 * devices)
    make = lambda **options: trainer(strategy=strategy, devices=devices, accumulate_grad_batches=2, **options)
    want = make(max_epochs=2).fit(the_task, batches)
    t = make(callbacks=ModelCheckpoint(tmp_path, every_n_micro_steps=3, save_top_k=-1))
    half = t.fit(the_task, batches)
    got = t.fit(the_task, batches, init_from=half)
    for name in ("params", "opt_state", "model_state"):
        assert_same(getattr(got, name), getattr(want, name))
    assert (t.current_epoch, t.micro_step, t.global_step) == (1, len(batches) // t._strategy.group, t.global_step)
    # In mid-window, a resume doesn't need to know where the run came from.
    resumed = make().fit(the_task, batches, ckpt_path=tmp_path / "epoch=0-micro_step=3-v1")
    assert_same((resumed.params, resumed.opt_state), (got.params, got.opt_state))


def test_parameters_come_out_of_a_checkpoint_as_a_tree(tmp_path):
    """Catches another tree, a dtype that is lost, and parameters that can't be trained on."""
    dense = {"w": jnp.ones((2, 3), jnp.bfloat16), "layers": [jnp.zeros(2), {"empty": jnp.zeros((0, 4))}]}
    loss = lambda params, batch, key: (
        sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(params)) + batch.mean()
    )
    the_task = jaxaccum.Task(lambda key, batch: dense, loss, optax.sgd(0.5))
    saves = ModelCheckpoint(tmp_path)
    state = single(callbacks=saves).fit(the_task, ones(2, 2))
    for like in (dense, jax.eval_shape(lambda: dense)):
        got = jaxaccum.checkpoint.load(saves.last_model_path, like=like)
        assert jax.tree.structure(got) == jax.tree.structure(dense)
        assert_same(got, state.params)
        assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(got)) and got["w"].dtype == jnp.bfloat16
    bare = single(callbacks=ModelCheckpoint(tmp_path / "bare"))
    want = bare.fit(slope(), ones(2))
    (path,) = (tmp_path / "bare").iterdir()
    assert jaxaccum.checkpoint.load(path, like=want.params) == want.params == -1
    assert single().fit(slope(), ones(2), init_from=jaxaccum.checkpoint.load(path, like=want.params)).params == -2


@pytest.mark.parametrize(
    ("like", "words"),
    [
        ({"w": np.zeros((3, 2), np.float32)}, r"\['b'\] is float32\[2\] there and missing here"),
        ({"w": np.zeros((3, 2), np.float16), "b": BIAS}, r"\['w'\] is float32\[3, 2\] there and float16\[3, 2\] here"),
        ({"w": np.zeros((3, 9), np.float32), "b": BIAS}, r"\['w'\] is .* there and float32\[3, 9\] here"),
    ],
)
def test_parameters_of_another_task_are_refused_by_name(tmp_path, like, words):
    """Catches a tree that is filled with what doesn't belong there."""
    state = single(callbacks=ModelCheckpoint(tmp_path)).fit(task(), loader(4))
    (path,) = tmp_path.iterdir()
    with pytest.raises(ValueError, match=f"{path} is not of this task: .*{words}.*like"):
        jaxaccum.checkpoint.load(path, like=like)
    with pytest.raises(ValueError, match=r"init_from is not of this task: \.params\['[wb]'\] is "):
        single().fit(task(), loader(4), init_from=like)
    with pytest.raises(ValueError, match=r"init_from is not of this task: \.opt_state.* is .*optimizer"):
        single().fit(task(optax.sgd(1.0)), loader(4), init_from=state)


def test_init_from_and_a_checkpoint(tmp_path):
    """Catches one of the two that is silently ignored."""
    batches, start = ones(2, 2), jnp.float32(5)
    make = lambda: single(callbacks=ModelCheckpoint(tmp_path), max_epochs=1)
    with pytest.raises(ValueError, match=r"init_from starts a fresh run, and ckpt_path='best' resumes one"):
        make().fit(slope(), batches, ckpt_path="best", init_from=start)
    with pytest.warns(UserWarning, match="finds no checkpoint"):
        assert make().fit(slope(), batches, ckpt_path="last", init_from=start).params == 3
    assert make().fit(slope(), batches, ckpt_path="last", init_from=start).params == 3  # The end of that run.
    (path,) = tmp_path.iterdir()
    for given in (path, str(path), jaxaccum.checkpoint.load(path)):
        with pytest.raises(
            TypeError, match=r"init_from must be .*, got .*: pass jaxaccum\.checkpoint\.load\(path, like="
        ):
            single().fit(slope(), batches, init_from=given)
