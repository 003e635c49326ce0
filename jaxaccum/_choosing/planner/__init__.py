"""`plan`: the largest micro-batch that fits in memory, from compiled steps that are never run.

`step` compiles the step of one size, `search` decides which sizes are compiled, `result` is what the caller gets.
"""

from jaxaccum._choosing.planner.api import check_loader, plan

__all__ = ["check_loader", "plan"]
