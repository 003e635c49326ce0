"""The window driver: `value_and_grad` splits a batch into K micro-batches and loops over them in one jitted step.

Returns the window's loss and gradient. Knows no optimizer, and keeps no state between two calls.
"""
