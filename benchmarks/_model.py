"""A GPT-2-shaped language model in plain jax: float32 parameters, bfloat16 compute."""

import argparse
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

import jaxaccum

Tree = Any


@dataclasses.dataclass(frozen=True)
class Model:
    """The sizes of a model, its parameters and its loss; by default GPT-2's, with 124M parameters.

    Attributes:
      layers: how many.
      width: of the residual stream.
      heads: of the attention; they divide the width.
      vocabulary: tokens that occur. The embedding has rows up to the next multiple of 128, as a matrix product wants.
      length: T, the tokens that a loss predicts from.
      unrolled: whether each layer has leaves and code of its own; else leaves are stacked, and layers are a loop.
      remat: whether the backward pass computes a layer's activations anew; else it keeps them.
    """

    layers: int = 12
    width: int = 768
    heads: int = 12
    vocabulary: int = 50257
    length: int = 1024
    unrolled: bool = False
    remat: bool = False

    def init(self, key: jax.Array) -> Tree:
        """Parameters, float32: matrices normal with a deviation of 0.02, scales 1, biases 0."""
        embedding, positions, *layers = jax.random.split(key, 2 + self.layers)
        normal = lambda key, *shape: 0.02 * jax.random.normal(key, shape, jnp.float32)
        norm = {"scale": jnp.ones(self.width, jnp.float32), "bias": jnp.zeros(self.width, jnp.float32)}

        def layer(key):
            qkv, out, up, down = jax.random.split(key, 4)
            dense = lambda key, inputs, outputs: {
                "kernel": normal(key, inputs * self.width, outputs * self.width),
                "bias": jnp.zeros(outputs * self.width, jnp.float32),
            }
            attention = {"norm": norm, "qkv": dense(qkv, 1, 3), "out": dense(out, 1, 1)}
            return {"attention": attention, "mlp": {"norm": norm, "up": dense(up, 1, 4), "down": dense(down, 4, 1)}}

        stack = list if self.unrolled else lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
        return {
            "embedding": normal(embedding, -(-self.vocabulary // 128) * 128, self.width),
            "positions": normal(positions, self.length, self.width),
            "layers": stack([layer(key) for key in layers]),
            "norm": norm,
        }

    def loss(self, params: Tree, tokens: jax.Array) -> jax.Array:
        """The mean cross-entropy of the next token, float32; `tokens` is (N, T + 1), int32."""
        return jnp.mean(self._losses(params, tokens))

    def weighted(self, params: Tree, tokens: jax.Array) -> jaxaccum.Weighted:
        """The same, weighted by tokens: negative ones are padding, and don't count."""
        is_real = tokens[:, 1:] >= 0
        losses = self._losses(params, jnp.maximum(tokens, 0))
        return jaxaccum.Weighted(jnp.sum(jnp.where(is_real, losses, 0)), jnp.sum(is_real))

    def _losses(self, params: Tree, tokens: jax.Array) -> jax.Array:
        """The cross-entropy of each next token, (N, T) float32."""
        x = self.hidden(params, tokens[:, :-1])
        logits = (x @ params["embedding"].astype(jnp.bfloat16).T).astype(jnp.float32)
        # By comparison, which fuses with the sum and whose transpose is elementwise; that of indexing is a scatter.
        targets = tokens[:, 1:, None] == jnp.arange(logits.shape[-1])
        return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(targets, logits, 0), axis=-1)

    def hidden(self, params: Tree, tokens: jax.Array) -> jax.Array:
        """The normalised residual stream after all layers, (N, T, width) bfloat16; `tokens` is (N, T)."""
        x = (params["embedding"][tokens] + params["positions"]).astype(jnp.bfloat16)
        forward = jax.checkpoint(self._layer, prevent_cse=self.unrolled) if self.remat else self._layer
        if self.unrolled:
            for layer in params["layers"]:
                x = forward(layer, x)
        else:
            x, _ = jax.lax.scan(lambda x, layer: (forward(layer, x), None), x, params["layers"])
        return _normalised(params["norm"], x)

    def _layer(self, layer: Tree, x: jax.Array) -> jax.Array:
        """Attention and MLP on a residual stream (N, T, width), bfloat16."""
        attention, mlp = layer["attention"], layer["mlp"]
        qkv = _dense(attention["qkv"], _normalised(attention["norm"], x))
        query, key, value = jnp.split(qkv.reshape(*x.shape[:2], 3 * self.heads, -1), 3, axis=2)
        implementation = "cudnn" if jax.default_backend() == "gpu" else None
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation=implementation)
        x = x + _dense(attention["out"], mixed.reshape(x.shape))
        return x + _dense(mlp["down"], jax.nn.gelu(_dense(mlp["up"], _normalised(mlp["norm"], x))))


SIZES = {
    "124M": {"layers": 12, "width": 768, "heads": 12},
    "758M": {"layers": 24, "width": 1536, "heads": 24},
    "1.3B": {"layers": 24, "width": 2048, "heads": 32},
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that `chosen` reads: one of SIZES, and each field of `Model`, which has the last word."""
    parser.add_argument("--size", default="124M", choices=SIZES, help="of the model, at GPT-2's vocabulary")
    for field in dataclasses.fields(Model):
        kind = {"action": "store_true"} if field.type is bool else {"type": int}
        parser.add_argument(f"--{field.name}", default=None, help="of the model", **kind)


def chosen(args: argparse.Namespace) -> Model:
    """The model that the command line asks for."""
    fields = {field.name: getattr(args, field.name) for field in dataclasses.fields(Model)}
    return Model(**SIZES[args.size] | {name: value for name, value in fields.items() if value is not None})


def parameters(tree: Tree) -> str:
    """How many, in words."""
    count = sum(leaf.size for leaf in jax.tree.leaves(tree))
    return f"{count / 1e6:.3g}M" if count < 1e9 else f"{count / 1e9:.3g}B"


def _dense(dense: Tree, x: jax.Array) -> jax.Array:
    return x @ dense["kernel"].astype(x.dtype) + dense["bias"].astype(x.dtype)


def _normalised(norm: Tree, x: jax.Array) -> jax.Array:
    """Layer normalisation, in float32 on the inside."""
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    deviation = jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + 1e-5)
    return (centred * deviation * norm["scale"] + norm["bias"]).astype(x.dtype)
