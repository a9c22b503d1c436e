"""Self-attention of the decoder.

B  batch                T  queries              S  keys (S = T without a cache)
H  query heads          G  key-value heads      d  head size
D  model features
"""

import keras
from keras import ops

from keras_moe import checks
from keras_moe.layers.initializers import fresh
from keras_moe.layers.relative_bias import RelativeBias
from keras_moe.layers.rotary import rotary_frequencies, rotate, rotations

POSITIONS = ("rotary", "relative_bias")


@keras.saving.register_keras_serializable(package="keras_moe")
class GroupedQueryAttention(keras.layers.Layer):
    """Causal self-attention whose key-value heads serve groups of query heads.

    `y = concat_h(softmax(q_h k_g^T / sqrt(d) + bias) v_g) W_o`, `g` the
    key-value head of query head `h`
    ([Ainslie et al., 2023](https://arxiv.org/abs/2305.13245), section 2.2); one
    key-value head a query head is ordinary multi-head attention. Positions enter
    either by rotating queries and keys
    ([Su et al., 2021](https://arxiv.org/abs/2104.09864), eq. 34) or as a learned
    bias per head and distance (T5, [Raffel et al.,
    2019](https://arxiv.org/abs/1910.10683), section 2.1).

    Args:
        num_query_heads: int, H.
        num_key_value_heads: int or None for H; must divide H.
        head_dim: int or None for `D / H`. Even with rotary positions.
        positions: `"rotary"` or `"relative_bias"`.
        rope_theta: float, the longest rotary wavelength over `2 pi`.
        relative_buckets: int, of the relative bias.
        relative_max_distance: int, in tokens, of the relative bias.
        dropout: float in `[0, 1)`, of the output.
        kernel_initializer: initializer of the projections.
        **kwargs: `name`, `trainable`, `dtype`.

    Call arguments:
        inputs: float tensor `[B, T, D]`.
        mask: bool tensor `[B, T]`, False for padding, at either end, or None.
            Without a cache only.
        cache: None, or keys and values so far, both `[B, S, G, d]`.
        cache_index: int or scalar int tensor: where in the cache `inputs` start.
        training: bool.

    Returns:
        A tensor `[B, T, D]`; with a cache `(tensor, cache)`, the cache holding
        the new keys and values at `cache_index .. cache_index + T - 1`.

    Raises:
        ValueError: where sizes do not divide.

    Example:

    ```python
    attention = keras_moe.layers.GroupedQueryAttention(8, num_key_value_heads=2)
    y = attention(keras.random.normal((2, 16, 64)))
    ```
    """

    def __init__(
        self,
        num_query_heads,
        num_key_value_heads=None,
        head_dim=None,
        positions="rotary",
        rope_theta=10000.0,
        relative_buckets=32,
        relative_max_distance=128,
        dropout=0.0,
        kernel_initializer="glorot_uniform",
        **kwargs,
    ):
        super().__init__(**kwargs)
        if num_key_value_heads is None:
            num_key_value_heads = num_query_heads
        checks.at_least("num_query_heads", num_query_heads, 1)
        checks.at_least("num_key_value_heads", num_key_value_heads, 1)
        checks.divides(
            "num_query_heads",
            num_query_heads,
            "num_key_value_heads",
            num_key_value_heads,
        )
        if head_dim is not None:
            checks.at_least("head_dim", head_dim, 1)
        checks.one_of("positions", positions, POSITIONS)
        checks.positive("rope_theta", rope_theta)
        if positions == "relative_bias":
            checks.at_least("relative_buckets", relative_buckets, 2)
            checks.at_least(
                "relative_max_distance",
                relative_max_distance,
                relative_buckets // 2 + 1,
            )
        checks.fraction("dropout", dropout)
        self.supports_masking = True
        self.num_query_heads = num_query_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.positions = positions
        self.rope_theta = rope_theta
        self.relative_buckets = relative_buckets
        self.relative_max_distance = relative_max_distance
        self.dropout = dropout
        self.kernel_initializer = keras.initializers.get(kernel_initializer)

    def build(self, input_shape):
        dim = input_shape[-1]
        if self.head_dim is None:
            checks.divides("hidden_dim", dim, "num_query_heads", self.num_query_heads)
            self.head_dim = dim // self.num_query_heads
        if self.positions == "rotary":
            if self.head_dim % 2:
                raise ValueError(
                    "`head_dim` must be even with rotary positions. "
                    f"Received: head_dim={self.head_dim}"
                )
            self._frequencies = rotary_frequencies(self.head_dim, self.rope_theta)
        else:
            self.relative_bias = RelativeBias(
                self.num_query_heads,
                self.relative_buckets,
                self.relative_max_distance,
                dtype=self.dtype_policy,
                name="relative_bias",
            )
            self.relative_bias.build(None)
        heads = (self.num_query_heads, self.head_dim)
        key_value_heads = (self.num_key_value_heads, self.head_dim)
        self.query = self._dense("query", "btd,dhk->bthk", heads, (dim,), 0)
        self.key = self._dense("key", "btd,dhk->bthk", key_value_heads, (dim,), 1)
        self.value = self._dense("value", "btd,dhk->bthk", key_value_heads, (dim,), 2)
        self.output_dense = self._dense(
            "output_dense", "bthk,hkd->btd", (dim,), heads, 3
        )
        self.output_dropout = keras.layers.Dropout(
            self.dropout, dtype=self.dtype_policy, name="output_dropout"
        )

    def _dense(self, name, equation, output_shape, input_features, index):
        layer = keras.layers.EinsumDense(
            equation,
            output_shape=(None, *output_shape),
            kernel_initializer=fresh(self.kernel_initializer, index),
            dtype=self.dtype_policy,
            name=name,
        )
        # A mask that Keras attached passes through, or each warns that it is lost.
        layer.supports_masking = True
        layer.build((None, None, *input_features))
        return layer

    def call(self, inputs, mask=None, cache=None, cache_index=0, training=None):
        query, key, value = self.query(inputs), self.key(inputs), self.value(inputs)
        length = ops.shape(inputs)[1]
        query_index = ops.arange(length, dtype="int32")
        if cache is not None:
            query_index = query_index + ops.cast(cache_index, "int32")
        if self.positions == "rotary":
            # Left padding must not shift the tokens after it.
            positions = query_index if mask is None else _count_tokens(mask)
            turns = rotations(positions, self._frequencies, query.dtype)
            query, key = rotate(query, *turns), rotate(key, *turns)
        if cache is not None:
            start = (0, cache_index, 0, 0)
            key = ops.slice_update(cache[0], start, ops.cast(key, cache[0].dtype))
            value = ops.slice_update(cache[1], start, ops.cast(value, cache[1].dtype))
            cache = (key, value)
        key_index = ops.arange(ops.shape(key)[1], dtype="int32")
        visible = (key_index[None, :] <= query_index[:, None])[None, None]
        if mask is not None:
            mask = ops.cast(mask, "bool")
            visible = ops.logical_and(visible, mask[:, None, None, :])
        outputs = self._attend(query, key, value, query_index, key_index, visible)
        outputs = self.output_dense(outputs)
        if self.dropout:  # a call of a layer costs more than a token's arithmetic
            outputs = self.output_dropout(outputs, training=training)
        return outputs if cache is None else (outputs, cache)

    def _attend(self, query, key, value, query_index, key_index, visible):
        if self.num_key_value_heads == 1:
            # `dot_product_attention` spreads several of them, on TensorFlow not one.
            key, value = (ops.repeat(t, self.num_query_heads, 2) for t in (key, value))
        if self.positions == "rotary":
            return ops.dot_product_attention(query, key, value, mask=visible)
        bias = self.relative_bias(query_index, key_index)
        # Not every backend takes a bias and a mask together.
        bias = ops.where(visible, bias, _large_negative(bias.dtype))
        return ops.dot_product_attention(query, key, value, bias=bias)

    def compute_output_shape(self, input_shape):
        return input_shape

    def compute_output_spec(
        self, inputs, mask=None, cache=None, cache_index=0, training=None
    ):
        outputs = keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)
        return outputs if cache is None else (outputs, cache_spec(cache))

    def get_config(self):
        return {
            **super().get_config(),
            "num_query_heads": self.num_query_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "positions": self.positions,
            "rope_theta": self.rope_theta,
            "relative_buckets": self.relative_buckets,
            "relative_max_distance": self.relative_max_distance,
            "dropout": self.dropout,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
        }


def cache_spec(cache):
    """The symbolic keys and values that a call returns for `cache`."""
    return tuple(keras.KerasTensor(part.shape, dtype=part.dtype) for part in cache)


def _count_tokens(mask):
    """Each token's position among the tokens that are not padding, `[B, T]`."""
    mask = ops.cast(mask, "int32")
    return ops.maximum(ops.cumsum(mask, axis=1) - 1, 0)


def _large_negative(dtype):
    # Finite, so that a row with nothing visible gives an average and not NaN.
    return -3e4 if keras.backend.standardize_dtype(dtype) == "float16" else -1e9
