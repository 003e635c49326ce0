"""What jax may change under us: jaxprs, keys, eager calls, the coordination service.

Only here are `jax.extend` and private parts of jax touched. Knows nothing of gradients or sums.
"""
