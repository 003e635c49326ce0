"""From a loader to micro-steps on devices: limits, groups, prefetching and strategies.

It knows no loss, no optimizer and no compiled program.
"""
