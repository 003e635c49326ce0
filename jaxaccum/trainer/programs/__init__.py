"""The compiled programs of a run (accumulate, step, flush, window, validation) and what they return.

They take arrays and micro-steps. They know no epoch, no callback, no logger and no checkpoint.
"""
