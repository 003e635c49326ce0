"""The gradient of one micro-batch, added to its sums: every driver uses this one.

Holds the roles of a loss's arguments, their split into micro-batches, in-place addition in the backward pass, weight
gradients in float32, and what is hoisted out of the micro-batches to run once a window. Knows no optimizer, and not
where a window ends.
"""
