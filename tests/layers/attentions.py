"""Small attention layers with random weights, and what they must give in float64."""

import numpy as np

from keras_moe.layers import CrossAttention, GroupedQueryAttention, LatentAttention
from tests.execution import numpy as to_numpy
from tests.references import attention as reference


def randomize(layer, seed=0, scale=0.5):
    """Gives a built layer random weights; norms scales around 1."""
    rng = np.random.default_rng(seed)
    for variable in layer.trainable_variables:
        values = rng.normal(size=variable.shape) * scale
        if variable.name in ("scale", "gamma"):
            values = 1 + values
        variable.assign(values)


def make(num_query_heads, num_key_value_heads=None, dim=8, seed=0, **settings):
    layer = GroupedQueryAttention(num_query_heads, num_key_value_heads, **settings)
    layer.build((None, None, dim))
    randomize(layer, seed)
    return layer


def named(layer):
    """Weights by the names of their sublayers, float64; biases `..._bias`."""
    weights = {}
    for variable in layer.trainable_variables:
        *_, sublayer, name = variable.path.split("/")
        suffix = "_bias" if name == "bias" else ""
        weights[sublayer + suffix] = to_numpy(variable.value)
    return weights


def relative_bias(embeddings, length, max_distance, bidirectional=False):
    """T5's bias `[H, T, T]`, the bucket of each distance in exact arithmetic.

    Bidirectional, the second half of the buckets is for keys after the query.
    """
    buckets = len(embeddings) // (2 if bidirectional else 1)
    bias = np.zeros((embeddings.shape[1], length, length))
    for t, s in np.ndindex(length, length):
        distance = abs(t - s) if bidirectional else max(t - s, 0)
        row = bucket(distance, buckets, max_distance)
        bias[:, t, s] = embeddings[row + (buckets if bidirectional and s > t else 0)]
    return bias


def bucket(distance, buckets, max_distance):
    """Raffel et al. 2019, section 2.1: half of the buckets exact, half logarithmic."""
    exact = buckets // 2
    rest = buckets - exact
    if distance < exact:
        return distance
    # The largest j with log(d / exact) / log(max / exact) * rest >= j, in integers.
    j = 0
    while (
        j < rest - 1
        and distance**rest * exact ** (j + 1) >= max_distance ** (j + 1) * exact**rest
    ):
        j += 1
    return exact + j


def expected(layer, sequence, source=None, position_bias=None):
    """The layer's output for one sequence `[T, D]` without padding."""
    weights = named(layer)
    sequence = np.asarray(sequence, "float64")
    if isinstance(layer, LatentAttention):
        sizes = layer.head_dim, layer.key_value_rank
        return reference.latent_attention(sequence, weights, *sizes, layer.rope_theta)
    names = ("query", "key", "value", "output_dense")
    if isinstance(layer, CrossAttention):
        theta, bias, window, causal = None, None, None, False
    else:
        theta = layer.rope_theta if layer.positions == "rotary" else None
        bias, window, causal = position_bias, layer.window, layer.causal
        if layer.positions == "relative_bias":
            bias = relative_bias(
                weights["relative_bias"],
                len(sequence),
                layer.relative_max_distance,
                not causal,
            )
    return reference.attention(
        sequence,
        *(weights[n] for n in names),
        theta=theta,
        bias=bias,
        offsets=[weights.get(f"{n}_bias", 0) for n in names],
        scales=layer.query_key_norm and (weights["query_norm"], weights["key_norm"]),
        clip=layer.clip or np.inf,
        soft_cap=layer.soft_cap,
        window=window,
        epsilon=layer.norm_epsilon,
        scale=layer.scale,
        causal=causal,
        source=source,
    )
