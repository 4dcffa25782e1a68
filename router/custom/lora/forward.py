"""The forward pass of a llama in jax, with a low-rank adapter on its linear maps.

It is checked against the engine that serves it: log-probabilities differ by what the engine's own
quantised arithmetic makes of them. The file's query and key weights are permuted for rotation of
neighbouring pairs, so pairs (2i, 2i+1) are rotated here, and an adapter that was trained in this layout
fits the engine as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from chainwax.router.custom.lora.base import LINEAR, Base, Shape

__all__ = ["Adapter", "Weights", "as_weights", "hidden", "new_adapter", "score"]

Weights = Mapping[str, Any]
Adapter = dict[str, tuple[jax.Array, jax.Array]]
"""By linear map: ``a`` as (layers, rank, n_in) and ``b`` as (layers, n_out, rank)."""


def as_weights(base: Base) -> Weights:
    """The base's numbers as jax holds them."""
    embedding = jnp.asarray(base.embedding)
    return {
        "embedding": embedding,
        "output": embedding if base.output is base.embedding else jnp.asarray(base.output),
        "final_norm": jnp.asarray(base.final_norm),
        "layers": {name: jnp.asarray(numbers) for name, numbers in base.layers.items()},
    }


def new_adapter(base: Base, targets: tuple[str, ...], rank: int, seed: int) -> Adapter:
    """An adapter that changes nothing yet: ``b`` is 0, ``a`` is drawn (Hu et al. 2021)."""
    rng = np.random.default_rng(seed)
    adapter: Adapter = {}
    for name in LINEAR:
        if name in targets:
            layers, n_out, n_in = base.layers[name].shape
            a = rng.uniform(-1.0, 1.0, (layers, rank, n_in)) / np.sqrt(n_in)
            adapter[name] = (jnp.asarray(a, jnp.float32), jnp.zeros((layers, n_out, rank), jnp.float32))
    return adapter


def hidden(
    weights: Weights, adapter: Adapter, shape: Shape, tokens: ArrayLike, segments: ArrayLike, scale: float
) -> jax.Array:
    """Last hidden states, (rows, length, width), of rows that hold several texts each.

    ``tokens`` and ``segments`` are (rows, length); a token sees those before it that have its segment. As
    rotation is relative, a text's place in its row does not matter. ``scale`` is alpha / rank.
    """
    tokens, segments = jnp.asarray(tokens), jnp.asarray(segments)
    x = weights["embedding"][tokens]
    rows, length = tokens.shape
    sees = (segments[:, :, None] == segments[:, None, :]) & jnp.tril(jnp.ones((length, length), bool))
    # For each key head, the queries of all heads that share it stand below each other.
    allowed = jnp.tile(jnp.repeat(sees, shape.kv_heads, axis=0), (1, shape.heads // shape.kv_heads, 1))
    per_head = weights["layers"]["attn_q"].shape[1] // shape.heads
    angle = jnp.arange(length)[:, None] / shape.rope_base ** (jnp.arange(0, per_head, 2) / per_head)
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]  # (length, 1, per_head / 2)

    def rotate(v: jax.Array) -> jax.Array:
        even, odd = v[..., ::2], v[..., 1::2]
        return jnp.stack((even * cos - odd * sin, even * sin + odd * cos), axis=-1).reshape(v.shape)

    def norm(v: jax.Array, gain: jax.Array) -> jax.Array:
        return v * jax.lax.rsqrt(jnp.mean(v * v, axis=-1, keepdims=True) + shape.eps) * gain

    def by_head(v: jax.Array) -> jax.Array:
        """From (rows, length, heads, width) to (rows · heads, length, width)."""
        return v.transpose(0, 2, 1, 3).reshape(-1, length, per_head)

    def layer(x: jax.Array, own: tuple[Mapping[str, jax.Array], Adapter]) -> tuple[jax.Array, None]:
        fixed, low = own

        def linear(name: str, v: jax.Array) -> jax.Array:
            out = v @ fixed[name].T
            if name in low:
                a, b = low[name]
                out = out + scale * ((v @ a.T) @ b.T)
            return out

        def heads(name: str, v: jax.Array, count: int) -> jax.Array:
            return linear(name, v).reshape(*v.shape[:2], count, per_head)

        v = norm(x, fixed["attn_norm"])
        q, k = rotate(heads("attn_q", v, shape.heads)), rotate(heads("attn_k", v, shape.kv_heads))
        # As plain batches of matrices, which is what the processor's own multiplication is fast at.
        q = by_head(q).reshape(rows * shape.kv_heads, -1, per_head)
        k, mix = by_head(k), by_head(heads("attn_v", v, shape.kv_heads))
        logits = (q @ k.transpose(0, 2, 1)) / np.sqrt(per_head)
        mixed = jax.nn.softmax(jnp.where(allowed, logits, -1e30), axis=-1) @ mix
        mixed = mixed.reshape(rows, shape.heads, length, per_head).transpose(0, 2, 1, 3)
        x = x + linear("attn_output", mixed.reshape(rows, length, -1))
        v = norm(x, fixed["ffn_norm"])
        return x + linear("ffn_down", jax.nn.silu(linear("ffn_gate", v)) * linear("ffn_up", v)), None

    x, _ = jax.lax.scan(layer, x, (weights["layers"], adapter))
    return norm(x, weights["final_norm"])


def score(weights: Weights, states: jax.Array) -> jax.Array:
    """Log-probabilities of the next token, (…, vocabulary), after states (…, width)."""
    return jax.nn.log_softmax(states @ weights["output"].T, axis=-1)
