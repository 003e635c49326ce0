"""What the Trainer asks of a callback that averages the parameters."""

from typing import Protocol, runtime_checkable

from jaxaccum._types import Tree


@runtime_checkable
class ParamsAverage(Protocol):
    """An average of the parameters, which the Trainer validates with and saves; see `EMA` for the members.

    The Trainer treats a callback with these members as an average.
    """

    average: Tree

    @property
    def params(self) -> Tree: ...
    def begin(self, params: Tree, step: int) -> None: ...
