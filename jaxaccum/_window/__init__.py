"""The window drivers: a batch is split into K micro-batches, in a loop over them in one jitted step.

`value_and_grad` returns the window's loss and gradient, `coupled_value_and_grad` those of a loss that couples the
examples of the window. Knows no optimizer, and keeps no state between two calls.
"""
