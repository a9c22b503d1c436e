"""Attention and the decoder block in float64 NumPy, from the papers."""

import math

import numpy as np

from tests.references.mixture import softmax


def rotate(x, positions, theta=10000.0, frequency=None):
    """RoFormer eq. 34, the features paired as (i, i + d/2); `x [T, H, d]`.

    Which features make a pair only permutes those of queries and keys alike.
    """
    half = x.shape[-1] // 2
    if frequency is None:
        frequency = theta ** (-2.0 * np.arange(half) / x.shape[-1])
    angle = np.asarray(positions)[:, None, None] * frequency
    a, b = x[..., :half], x[..., half:]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attention(
    x,
    query,
    key,
    value,
    output,
    theta=None,
    bias=None,
    offsets=None,
    scales=None,
    clip=np.inf,
    soft_cap=None,
    window=None,
    epsilon=1e-6,
    scale=None,
    causal=True,
    source=None,
):
    """One sequence without padding: Ainslie et al. 2023, section 2.2.

    `x [T, D]`, `query [D, H, d]`, `key` and `value [D, G, d]`, `output [H, d, D]`,
    `bias [H, T, T]` or None. Rotary positions unless `theta` is None. `offsets` are
    the biases of the four projections, 0 for none; `scales` those of the norms of
    queries and keys, `[d]` or `[H, d]`. Keys and values of a `source [S, D]`, if one
    is given, all of which is seen (Vaswani et al. 2017, section 3.2.3).
    """
    offsets = offsets or (0, 0, 0, 0)
    inputs = (x, x, x) if source is None else (x, source, source)
    q, k, v = (
        np.einsum("td,dhk->thk", t, w) + b
        for t, w, b in zip(inputs, (query, key, value), offsets, strict=False)
    )
    if scales:
        q, k = (
            t
            / np.sqrt((t**2).mean(tuple(range(-s.ndim, 0)), keepdims=True) + epsilon)
            * s
            for t, s in zip((q, k), scales, strict=True)
        )
    q, k, v = (np.clip(t, -clip, clip) for t in (q, k, v))
    length, heads, width = q.shape
    if theta is not None:
        q, k = (rotate(t, np.arange(length), theta) for t in (q, k))
    group = heads // k.shape[1]
    y = np.zeros(x.shape) + offsets[3]
    for h in range(heads):
        logits = q[:, h] @ k[:, h // group].T / math.sqrt(width)
        if scale is not None:
            logits = logits * math.sqrt(width) * scale
        if soft_cap:
            logits = soft_cap * np.tanh(logits / soft_cap)
        if bias is not None:
            logits = logits + bias[h]
        for t in range(length):
            seen = slice(max(0, t + 1 - (window or length)), t + 1)
            if source is not None:
                seen = slice(None)
            elif not causal:
                seen = slice(max(0, t + 1 - (window or length)), t + (window or length))
            weight = softmax(logits[t, seen])
            y[t] += weight @ v[seen, h // group] @ output[h]
    return y


def latent_attention(x, weights, head, rank, theta=10000.0, epsilon=1e-6):
    """DeepSeek-V2 eq. 9-19, head by head, for one sequence `[T, D]`.

    `weights` by the names of the projections; `head` features without positions.
    """
    positions = np.arange(len(x))
    down = x @ weights["key_value_down"] + weights.get("key_value_down_bias", 0)
    latent = rms_norm(down[:, :rank], weights["key_value_down_norm"], epsilon)
    turned_key = rotate(down[:, None, rank:], positions, theta)[:, 0]
    if "query" in weights:
        query = np.einsum("td,dhk->thk", x, weights["query"])
    else:
        query = x @ weights["query_down"] + weights.get("query_down_bias", 0)
        query = rms_norm(query, weights["query_down_norm"], epsilon)
        query = np.einsum("tr,rhk->thk", query, weights["query_up"])
    turned_query = rotate(query[..., head:], positions, theta)
    y = np.zeros(x.shape) + weights.get("output_dense_bias", 0)
    for h in range(query.shape[1]):
        key = latent @ weights["key_value_up"][:, h, :head]
        value = latent @ weights["key_value_up"][:, h, head:]
        for t in range(len(x)):
            logits = key[: t + 1] @ query[t, h, :head]
            logits += turned_key[: t + 1] @ turned_query[t, h]
            weight = softmax(logits / math.sqrt(query.shape[-1]))
            y[t] += weight @ value[: t + 1] @ weights["output_dense"][h]
    return y


def rms_norm(x, scale, epsilon):
    """Zhang and Sennrich 2019, eq. 4."""
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon) * scale


def layer_norm(x, scale, offset, epsilon):
    """Ba et al. 2016, eq. 3."""
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = np.mean(centred**2, axis=-1, keepdims=True)
    return centred / np.sqrt(variance + epsilon) * scale + offset
