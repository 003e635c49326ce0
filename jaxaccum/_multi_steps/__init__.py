"""The streaming drivers: the optax transformation `MultiSteps`, its state, and `HostDriven`.

They take one micro-batch per call, decide where a window ends, and run the inner optimizer there. They know no loader
and no `Trainer`.
"""
