"""Starts a run from given parameters."""

import os
from typing import Any

import jax

from jaxaccum._types import Tree
from jaxaccum.checkpoint import Checkpoint, named_arrays
from jaxaccum.trainer.input.strategies import Strategy
from jaxaccum.trainer.programs.compiled import FitState


class WarmStart:
    """What `init_from` provides: parameters, or a `FitState`'s parameters, model state and optimizer state.

    Each method raises ValueError if the given arrays differ from those that the task makes.

    Raises:
      TypeError: for a path or a whole checkpoint.
    """

    def __init__(self, init_from: Tree | FitState):
        if isinstance(init_from, (str, os.PathLike, Checkpoint)):
            raise TypeError(
                f"init_from must be parameters or a FitState, got a {type(init_from).__name__}: pass "
                "jaxaccum.checkpoint.load(path, like=params)."
            )
        self._has_state = isinstance(init_from, FitState)
        self._given = init_from if isinstance(init_from, FitState) else _state(params=init_from)

    def weights(self, params: Tree, model_state: Tree) -> tuple[Tree, Tree]:
        """Returns the given parameters and model state in place of those that `Task.init` returned."""
        given = self._given if self._has_state else self._given._replace(model_state=model_state)
        _check_same(_state(given.params, model_state=given.model_state), _state(params, model_state=model_state))
        return given.params, given.model_state

    def opt_state(self, fresh: Tree, strategy: Strategy) -> Tree:
        """Returns a copy of the given optimizer state on the devices of `fresh`, or `fresh` if none is given."""
        if not self._has_state:
            return fresh
        given = self._given.opt_state
        _check_same(_state(opt_state=given), _state(opt_state=fresh))
        return jax.tree.map(lambda x, like: strategy.placed(x, like.sharding), given, fresh)


def _state(params: Tree = None, opt_state: Tree = None, model_state: Tree = None) -> FitState:
    pending: Any = None
    return FitState(params, opt_state, model_state, pending)


def _check_same(given: FitState, wanted: FitState) -> None:
    remedy = "Pass parameters, or a state, of the same task, optimizer and clipping; or parameters alone."
    kinds = lambda state: named_arrays.kinds(named_arrays.arrays(state))
    named_arrays.check_same(kinds(given), kinds(wanted), "init_from", remedy)
