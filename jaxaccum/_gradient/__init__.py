"""The gradient of one micro-batch, added to its sums: the one that every driver uses.

Its arguments' roles, their split into micro-batches, in-place addition, weight gradients in float32, and what runs once
a window. Knows no optimizer, and not where a window ends.
"""
