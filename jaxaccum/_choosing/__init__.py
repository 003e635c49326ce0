"""Chooses N and K: the micro-batch that fits (`planner`), and the window that the gradient's noise asks for.

`planner` knows drivers, optimizers and devices from the outside, as a script does. `noise_scale` and `adaptive` compute
from norms, sizes and K alone. None of them knows the Trainer.
"""
