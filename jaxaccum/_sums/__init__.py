"""The weighted sum `(Σ w·g, Σ w)`: to add to it, to merge two, to divide once; and what a loss may return.

Knows no device, no loop and no optimizer.
"""
