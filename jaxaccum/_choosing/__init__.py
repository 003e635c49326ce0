"""Chooses N and K: the micro-batch that fits (`planner`).

Knows drivers, optimizers and devices from the outside, as a script does. Knows nothing of the Trainer.
"""
