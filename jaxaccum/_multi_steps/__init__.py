"""A driver: the optax transformation `MultiSteps`, its state, and `HostDriven`.

Decides where a window ends, and runs the inner optimizer there.
"""
