"""The course of a run: epochs, windows, validations, hooks, checkpoints, signals.

Counts on the host where a window ends, calls the compiled programs, and calls callbacks and loggers between them. Forms
no gradient.
"""
