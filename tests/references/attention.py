"""Attention and the decoder block in float64 NumPy, from the papers."""

import math

import numpy as np

from tests.references.mixture import softmax


def rotate(x, positions, theta=10000.0):
    """RoFormer eq. 34, the features paired as (i, i + d/2); `x [T, H, d]`.

    Which features make a pair only permutes those of queries and keys alike.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-2.0 * np.arange(half) / x.shape[-1])
    angle = np.asarray(positions)[:, None, None] * frequency
    a, b = x[..., :half], x[..., half:]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attention(x, query, key, value, output, theta=None, bias=None):
    """One sequence without padding: Ainslie et al. 2023, section 2.2.

    `x [T, D]`, `query [D, H, d]`, `key` and `value [D, G, d]`, `output [H, d, D]`,
    `bias [H, T, T]` or None. Rotary positions unless `theta` is None.
    """
    q, k, v = (np.einsum("td,dhk->thk", x, w) for w in (query, key, value))
    length, heads, width = q.shape
    if theta is not None:
        q, k = (rotate(t, np.arange(length), theta) for t in (q, k))
    group = heads // k.shape[1]
    y = np.zeros(x.shape)
    for h in range(heads):
        logits = q[:, h] @ k[:, h // group].T / math.sqrt(width)
        if bias is not None:
            logits = logits + bias[h]
        for t in range(length):
            weight = softmax(logits[t, : t + 1])
            y[t] += weight @ v[: t + 1, h // group] @ output[h]
    return y


def rms_norm(x, scale, epsilon):
    """Zhang and Sennrich 2019, eq. 4."""
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon) * scale


def layer_norm(x, scale, offset, epsilon):
    """Ba et al. 2016, eq. 3."""
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = np.mean(centred**2, axis=-1, keepdims=True)
    return centred / np.sqrt(variance + epsilon) * scale + offset
