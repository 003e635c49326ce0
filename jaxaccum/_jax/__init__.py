"""What jax may change under us: jaxprs, keys, eager calls, the coordination service.

Only modules of this package import `jax.extend` and `jax._src`; ruff refuses it elsewhere. Knows no sum, no loss and no
driver.
"""
