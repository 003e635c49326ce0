"""Beside PyTorch Lightning itself, where it is installed: the same weights after every epoch."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxaccum
from jaxaccum.callbacks import Callback

torch = pytest.importorskip("torch")
lightning = pytest.importorskip("lightning")

SCHEDULING, EPOCHS, BATCHES = {0: 2, 2: 1}, 4, 7
RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((BATCHES, 4, 3)).astype(np.float32), RNG.standard_normal((BATCHES, 4)).astype(np.float32)


def by_lightning(clip):
    """The weights after each epoch."""
    weights = []

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(3))

        def training_step(self, batch, batch_idx):
            x, y = batch
            return torch.mean((x @ self.weight - y) ** 2)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

        def on_train_epoch_end(self):
            weights.append(self.weight.detach().numpy().copy())

    data = torch.utils.data.TensorDataset(torch.from_numpy(X.reshape(-1, 3)), torch.from_numpy(Y.reshape(-1)))
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = lightning.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        gradient_clip_val=clip,
        callbacks=lightning.pytorch.callbacks.GradientAccumulationScheduler(dict(SCHEDULING)),
        **dict.fromkeys(quiet, False),
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(data, batch_size=4))
    return weights, trainer.global_step


def by_jaxaccum(clip):
    """The same."""
    weights = []

    class Keeps(Callback):
        def on_train_epoch_end(self, trainer, task):
            weights.append(np.array(trainer.state.params))

    task = jaxaccum.Task(
        init=lambda key, batch: jnp.zeros(3),
        loss=lambda w, batch, key: jnp.mean((batch[0] @ w - batch[1]) ** 2),
        optimizer=optax.sgd(0.1, momentum=0.9),
    )
    trainer = jaxaccum.Trainer(
        max_epochs=EPOCHS,
        accumulate_grad_batches=SCHEDULING,
        partial_window="divide_by_k",
        gradient_clip_val=clip,
        callbacks=Keeps(),
        strategy="single",
        enable_progress_bar=False,
    )
    trainer.fit(task, list(zip(X, Y, strict=True)))
    return weights, trainer.global_step


@pytest.mark.filterwarnings("default")  # Lightning's warnings are its own.
@pytest.mark.parametrize("clip", [None, 0.5])
def test_lightning_itself_ends_every_epoch_with_the_same_weights(clip):
    """Catches any difference from the arithmetic of Lightning that `divide_by_k` promises."""
    theirs, their_steps = by_lightning(clip)
    ours, our_steps = by_jaxaccum(clip)
    assert len(ours) == EPOCHS and our_steps == their_steps == 4 + 4 + 7 + 7
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
    assert abs(ours[-1]).max() > 0.01
