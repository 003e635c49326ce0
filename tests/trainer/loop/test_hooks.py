"""What the hooks of a run tell of its callbacks."""

from typing import Any

import pytest

from jaxaccum.callbacks import Callback, EarlyStopping, ModelCheckpoint
from jaxaccum.trainer.loop.hooks import Hooks

ANY: Any = None
EARLY = EarlyStopping(monitor="val_loss")


@pytest.mark.parametrize(
    ("callbacks", "warns"),
    [
        ([], False),
        ([EARLY], True),
        ([EARLY, ModelCheckpoint(monitor="train_loss")], True),
        ([ModelCheckpoint(monitor="val_loss"), Callback()], False),
        ([EarlyStopping(monitor="train_loss")], False),
    ],
)
def test_a_missing_validation_is_warned_of_once(callbacks, warns):
    """Catches a second warning beside the callback's own, and none."""
    assert Hooks(ANY, ANY, callbacks).warn_of_no_validation == warns


def test_a_callback_may_set_k():
    """Catches a check of a run's length that believes in a K that a hook changes."""
    assert not Hooks(ANY, ANY, [EARLY, Callback()]).may_set_k
    sets = Callback()
    sets.on_train_epoch_start = lambda trainer, task: None
    assert Hooks(ANY, ANY, [EARLY, sets]).may_set_k
