"""The GPT of examples/pytorch/gpt.py in Keras: no biases, pre-norm blocks of causal attention and a GELU network, a head."""

from __future__ import annotations

from typing import Any

import keras
from keras import layers, ops


def dense(width: int, name: str, std: float = 0.02) -> Any:
    return layers.Dense(
        width, use_bias=False, kernel_initializer=keras.initializers.RandomNormal(stddev=std), name=name
    )


def norm(name: str) -> Any:
    return layers.LayerNormalization(epsilon=1e-5, center=False, name=name)


def block(x: Any, width: int, heads: int, std: float, name: str) -> Any:
    """x + attention(norm(x)), then x + network(norm(x)), of shape (batch, time, width); `std` of what ends in the sum."""
    split = layers.Reshape((-1, 3, heads, width // heads))(dense(3 * width, f"{name}_qkv")(norm(f"{name}_norm1")(x)))
    query, key, value = (split[:, :, i] for i in range(3))
    seen = ops.dot_product_attention(query, key, value, is_causal=True)
    x = x + dense(width, f"{name}_out", std)(layers.Reshape((-1, width))(seen))
    inner = layers.Activation("gelu")(dense(4 * width, f"{name}_up")(norm(f"{name}_norm2")(x)))
    return x + dense(width, f"{name}_down", std)(inner)


def gpt(vocabulary: int, context: int, width: int, depth: int, heads: int) -> Any:
    """Scores of the next token at each place, (batch, time, vocabulary), from tokens of shape (batch, time)."""
    start = keras.initializers.RandomNormal(stddev=0.02)
    tokens = keras.Input((context,), dtype="int32")
    x = layers.Embedding(vocabulary, width, embeddings_initializer=start, name="token_embedding")(tokens)
    places = ops.zeros_like(tokens) + ops.arange(context, dtype="int32")
    x = x + layers.Embedding(context, width, embeddings_initializer=start, name="position_embedding")(places)
    for i in range(depth):
        x = block(x, width, heads, 0.02 / (2 * depth) ** 0.5, f"block{i}")
    return keras.Model(tokens, dense(vocabulary, "head")(norm("norm")(x)))
