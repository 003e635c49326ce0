"""The smallest example: logistic regression on handwritten digits, 8 micro-batches to an optimizer step."""

import jax
import optax
from sklearn.datasets import load_digits

import jaxaccum


@jax.jit
def train_step(params, state, x, y):
    """Plain optax: with the line below, it runs the optimizer in every eighth call."""
    loss = lambda params: optax.softmax_cross_entropy_with_integer_labels(x @ params, y).mean()
    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state


images, labels = load_digits(return_X_y=True)
params = jax.numpy.zeros((64, 10))
tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
tx = jaxaccum.MultiSteps(tx, every_k_schedule=8)  # The one line that accumulation adds.
state = tx.init(params)
for i in range(3600):
    params, state = train_step(params, state, images[i % 180 : 1440 : 180], labels[i % 180 : 1440 : 180])
print(f"held-out accuracy {((images[1440:] @ params).argmax(-1) == labels[1440:]).mean():.3f}")
