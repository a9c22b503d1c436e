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
from keras_moe.layers.rotary import (
    check_scaling,
    rotary_frequencies,
    rotate,
    rotation_scale,
    rotations,
)

POSITIONS = ("rotary", "relative_bias")
BIASES = (None, "query_key_value", "all")
QUERY_KEY_NORMS = (None, "head", "full")


class CausalSelfAttention(keras.layers.Layer):
    """What every attention of a decoder has: projections, positions, a causal mask.

    A subclass defines `build`, `empty_cache`, and `call` with the arguments and
    results of `GroupedQueryAttention`.
    """

    def __init__(
        self,
        rope_theta=10000.0,
        rope_scaling=None,
        bias=None,
        soft_cap=None,
        window=None,
        dropout=0.0,
        norm_epsilon=1e-6,
        kernel_initializer="glorot_uniform",
        **kwargs,
    ):
        super().__init__(**kwargs)
        checks.positive("rope_theta", rope_theta)
        check_scaling(rope_scaling)
        checks.one_of("bias", bias, BIASES)
        if soft_cap is not None:
            checks.positive("soft_cap", soft_cap)
        if window is not None:
            checks.at_least("window", window, 1)
        checks.fraction("dropout", dropout)
        checks.positive("norm_epsilon", norm_epsilon)
        self.supports_masking = True
        self.rope_theta = rope_theta
        self.rope_scaling = rope_scaling
        self.bias = bias
        self.soft_cap = soft_cap
        self.window = window
        self.dropout = dropout
        self.norm_epsilon = norm_epsilon
        self.kernel_initializer = keras.initializers.get(kernel_initializer)

    def _build_rotary(self, dim, name):
        if dim % 2:
            raise ValueError(
                f"`{name}` must be even with rotary positions. Received: {name}={dim}"
            )
        self._frequencies = rotary_frequencies(dim, self.rope_theta, self.rope_scaling)

    def _build_output(self, heads, dim, index):
        self.output_dense = self._dense(
            "output_dense",
            "bthk,hkd->btd",
            (dim,),
            heads,
            index,
            bias=self.bias == "all",
        )
        self.output_dropout = keras.layers.Dropout(
            self.dropout, dtype=self.dtype_policy, name="output_dropout"
        )

    def _dense(self, name, equation, output_shape, input_features, index, bias=False):
        layer = keras.layers.EinsumDense(
            equation,
            output_shape=(None, *output_shape),
            bias_axes=equation.split("->bt")[1] if bias else None,
            kernel_initializer=fresh(self.kernel_initializer, index),
            dtype=self.dtype_policy,
            name=name,
        )
        # A mask that Keras attached passes through, or each warns that it is lost.
        layer.supports_masking = True
        layer.build((None, None, *input_features))
        return layer

    def _norm(self, name, shape):
        layer = keras.layers.RMSNormalization(
            axis=list(range(-len(shape), 0)),
            epsilon=self.norm_epsilon,
            dtype=self.dtype_policy,
            name=name,
        )
        layer.supports_masking = True
        layer.build((None, None, *shape))
        return layer

    def _query_index(self, inputs, cache, cache_index):
        index = ops.arange(ops.shape(inputs)[1], dtype="int32")
        if cache is not None:
            index = index + ops.cast(cache_index, "int32")
        return index

    def _rotations(self, query_index, mask):
        # Left padding must not shift the tokens after it.
        positions = query_index if mask is None else _count_tokens(mask)
        scale = rotation_scale(self.rope_scaling)
        return rotations(positions, self._frequencies, self.compute_dtype, scale)

    def _visible(self, query_index, key_index, mask):
        """Which keys a query attends to, bool `[1 or B, 1, T, S]`."""
        distance = query_index[:, None] - key_index[None, :]
        visible = distance >= 0
        if self.window is not None:
            visible = ops.logical_and(visible, distance < self.window)
        visible = visible[None, None]
        if mask is not None:
            mask = ops.cast(mask, "bool")
            visible = ops.logical_and(visible, mask[:, None, None, :])
        return visible

    def _weigh(self, logits, visible, bias=None):
        """Attention weights `[B, ..., T, S]` of scaled logits, by a softmax."""
        logits = ops.cast(logits, "float32")
        if self.soft_cap is not None:
            logits = self.soft_cap * ops.tanh(logits / self.soft_cap)
        if bias is not None:
            logits = logits + ops.cast(bias, "float32")
        logits = ops.where(visible, logits, large_negative("float32"))
        return ops.cast(ops.softmax(logits, axis=-1), self.compute_dtype)

    def _output(self, heads, training):
        outputs = self.output_dense(heads)
        if self.dropout:  # a call of a layer costs more than a token's arithmetic
            outputs = self.output_dropout(outputs, training=training)
        return outputs

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
            "rope_theta": self.rope_theta,
            "rope_scaling": self.rope_scaling,
            "bias": self.bias,
            "soft_cap": self.soft_cap,
            "window": self.window,
            "dropout": self.dropout,
            "norm_epsilon": self.norm_epsilon,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
        }


@keras.saving.register_keras_serializable(package="keras_moe")
class GroupedQueryAttention(CausalSelfAttention):
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
        rope_scaling: None or a dict, see
            `keras_moe.layers.rotary.rotary_frequencies`.
        bias: None, `"query_key_value"` or `"all"`: the projections with a bias.
        query_key_norm: None; `"head"`, an RMS norm of each head of queries and of
            keys before they are rotated (Qwen3); `"full"`, one of all heads
            together (OLMoE).
        clip: float or None: queries, keys and values are kept within it, before
            the rotation (DBRX).
        soft_cap: float or None: c in `c tanh(logits / c)` (Grok-1).
        window: int or None, in tokens: a query sees the keys at a distance below
            it ([Beltagy et al., 2020](https://arxiv.org/abs/2004.05150), section
            3.1).
        norm_epsilon: float, of `query_key_norm`.
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
        ValueError: where sizes do not divide, or a setting is out of range.

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
        query_key_norm=None,
        clip=None,
        **kwargs,
    ):
        super().__init__(
            rope_theta=rope_theta,
            dropout=dropout,
            kernel_initializer=kernel_initializer,
            **kwargs,
        )
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
        if positions == "relative_bias":
            checks.at_least("relative_buckets", relative_buckets, 2)
            checks.at_least(
                "relative_max_distance",
                relative_max_distance,
                relative_buckets // 2 + 1,
            )
        checks.one_of("query_key_norm", query_key_norm, QUERY_KEY_NORMS)
        if clip is not None:
            checks.positive("clip", clip)
        self.num_query_heads = num_query_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.positions = positions
        self.relative_buckets = relative_buckets
        self.relative_max_distance = relative_max_distance
        self.query_key_norm = query_key_norm
        self.clip = clip

    def build(self, input_shape):
        dim = input_shape[-1]
        if self.head_dim is None:
            checks.divides("hidden_dim", dim, "num_query_heads", self.num_query_heads)
            self.head_dim = dim // self.num_query_heads
        if self.positions == "rotary":
            self._build_rotary(self.head_dim, "head_dim")
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
        self.query = self._project("query", dim, heads, 0)
        self.key = self._project("key", dim, key_value_heads, 1)
        self.value = self._project("value", dim, key_value_heads, 2)
        self._build_output(heads, dim, 3)
        if self.query_key_norm:
            first = 0 if self.query_key_norm == "full" else 1
            self.query_norm = self._norm("query_norm", heads[first:])
            self.key_norm = self._norm("key_norm", key_value_heads[first:])

    def _project(self, name, dim, heads, index):
        bias = self.bias is not None
        return self._dense(name, "btd,dhk->bthk", heads, (dim,), index, bias=bias)

    def empty_cache(self, batch_size, length):
        """Zeros in the shape of the cache of a call: two of `[B, S, G, d]`."""
        shape = (batch_size, length, self.num_key_value_heads, self.head_dim)
        return tuple(ops.zeros(shape, dtype=self.compute_dtype) for _ in range(2))

    def call(self, inputs, mask=None, cache=None, cache_index=0, training=None):
        query, key, value = self.query(inputs), self.key(inputs), self.value(inputs)
        if self.query_key_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.clip is not None:
            query, key, value = (
                ops.clip(t, -self.clip, self.clip) for t in (query, key, value)
            )
        query_index = self._query_index(inputs, cache, cache_index)
        if self.positions == "rotary":
            turns = self._rotations(query_index, mask)
            query, key = rotate(query, *turns), rotate(key, *turns)
        if cache is not None:
            cache = write_cache(cache, (key, value), cache_index)
            key, value = cache
        key_index = ops.arange(ops.shape(key)[1], dtype="int32")
        visible = self._visible(query_index, key_index, mask)
        outputs = self._attend(query, key, value, query_index, key_index, visible)
        outputs = self._output(outputs, training)
        return outputs if cache is None else (outputs, cache)

    def _attend(self, query, key, value, query_index, key_index, visible):
        bias = None
        if self.positions == "relative_bias":
            bias = self.relative_bias(query_index, key_index)
        if self.soft_cap is not None:
            return self._attend_capped(query, key, value, visible, bias)
        if self.num_key_value_heads == 1:
            # `dot_product_attention` spreads several of them, on TensorFlow not one.
            key, value = (ops.repeat(t, self.num_query_heads, 2) for t in (key, value))
        if bias is None:
            return ops.dot_product_attention(query, key, value, mask=visible)
        # Not every backend takes a bias and a mask together.
        bias = ops.where(visible, bias, large_negative(bias.dtype))
        return ops.dot_product_attention(query, key, value, bias=bias)

    def _attend_capped(self, query, key, value, visible, bias):
        group = self.num_query_heads // self.num_key_value_heads
        key, value = (ops.repeat(t, group, axis=2) for t in (key, value))
        logits = ops.einsum("bthk,bshk->bhts", query, key) * self.head_dim**-0.5
        weights = self._weigh(logits, visible, bias)
        return ops.einsum("bhts,bshk->bthk", weights, value)

    def get_config(self):
        return {
            **super().get_config(),
            "num_query_heads": self.num_query_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "positions": self.positions,
            "relative_buckets": self.relative_buckets,
            "relative_max_distance": self.relative_max_distance,
            "query_key_norm": self.query_key_norm,
            "clip": self.clip,
        }


def write_cache(cache, new, index):
    """`cache` with the tensors `new` written at `index` along its second axis."""
    return tuple(
        ops.slice_update(
            part,
            (0, index, *[0] * (len(part.shape) - 2)),
            ops.cast(t, part.dtype),
        )
        for part, t in zip(cache, new, strict=True)
    )


def cache_spec(cache):
    """The symbolic tensors that a call returns for `cache`."""
    return tuple(keras.KerasTensor(part.shape, dtype=part.dtype) for part in cache)


def _count_tokens(mask):
    """Each token's position among the tokens that are not padding, `[B, T]`."""
    mask = ops.cast(mask, "int32")
    return ops.maximum(ops.cumsum(mask, axis=1) - 1, 0)


def large_negative(dtype):
    """A bias that hides a key."""
    # Finite, so that a row with nothing visible gives an average and not NaN.
    return -3e4 if keras.backend.standardize_dtype(dtype) == "float16" else -1e9
