"""The course of a run: epochs, windows, validations, checkpoints, signals."""
