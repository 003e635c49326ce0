"""From a loader to micro-steps on devices: limits, groups, prefetching and strategies; the run's options and counters.

Knows no loss, no optimizer and no compiled program.
"""
