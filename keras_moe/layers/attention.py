"""Attention of a sequence to itself, and what it shares with every other.

B  batch                T  queries              S  keys (S = T without a cache)
H  query heads          G  key-value heads      d  head size
D  model features
"""

import keras
from keras import ops

from keras_moe import checks
from keras_moe.layers.initializers import fresh, fresh_share
from keras_moe.layers.relative_bias import RelativeBias, check_buckets
from keras_moe.layers.rotary import (
    check_scaling,
    rotary_frequencies,
    rotate,
    rotation_scale,
    rotations,
)

POSITIONS = ("rotary", "relative_bias", None)
BIASES = (None, "query_key_value", "all")
QUERY_KEY_NORMS = (None, "head", "full")


class Attention(keras.layers.Layer):
    """What every attention has: projections, a softmax, an output.

    A subclass defines `build` and `call`.
    """

    def __init__(
        self,
        bias=None,
        soft_cap=None,
        dropout=0.0,
        weight_dropout=0.0,
        norm_epsilon=1e-6,
        kernel_initializer="glorot_uniform",
        **kwargs,
    ):
        super().__init__(**kwargs)
        checks.one_of("bias", bias, BIASES)
        if soft_cap is not None:
            checks.positive("soft_cap", soft_cap)
        checks.fraction("dropout", dropout)
        checks.fraction("weight_dropout", weight_dropout)
        checks.positive("norm_epsilon", norm_epsilon)
        self.supports_masking = True
        self.bias = bias
        self.soft_cap = soft_cap
        self.dropout = dropout
        self.weight_dropout = weight_dropout
        self.norm_epsilon = norm_epsilon
        self.kernel_initializer = keras.initializers.get(kernel_initializer)

    def _build_output(self, heads, dim, index):
        self.output_dense = self._dense(
            "output_dense",
            "bthk,hkd->btd",
            (dim,),
            heads,
            index,
            bias=self.bias == "all",
        )
        self.output_dropout = self._dropout("output_dropout", self.dropout)
        self.weights_dropout = self._dropout("weights_dropout", self.weight_dropout)

    def _dropout(self, name, rate):
        return keras.layers.Dropout(rate, dtype=self.dtype_policy, name=name)

    def _dense(
        self,
        name,
        equation,
        output_shape,
        input_features,
        index,
        bias=False,
        share=None,
    ):
        initializer = fresh(self.kernel_initializer, index)
        if share is not None:
            initializer = fresh_share(self.kernel_initializer, share, index)
        layer = keras.layers.EinsumDense(
            equation,
            output_shape=(None, *output_shape),
            bias_axes=equation.split("->bt")[1] if bias else None,
            kernel_initializer=initializer,
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

    def _weigh(self, logits, visible, bias=None, training=None):
        """Attention weights `[B, ..., T, S]` of scaled logits, by a softmax."""
        logits = ops.cast(logits, "float32")
        if self.soft_cap is not None:
            logits = self.soft_cap * ops.tanh(logits / self.soft_cap)
        if bias is not None:
            logits = logits + ops.cast(bias, "float32")
        logits = ops.where(visible, logits, large_negative("float32"))
        weights = ops.cast(ops.softmax(logits, axis=-1), self.compute_dtype)
        if self.weight_dropout:
            weights = self.weights_dropout(weights, training=training)
        return weights

    def _output(self, heads, training):
        outputs = self.output_dense(heads)
        if self.dropout:  # a call of a layer costs more than a token's arithmetic
            outputs = self.output_dropout(outputs, training=training)
        return outputs

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {
            **super().get_config(),
            "bias": self.bias,
            "soft_cap": self.soft_cap,
            "dropout": self.dropout,
            "weight_dropout": self.weight_dropout,
            "norm_epsilon": self.norm_epsilon,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
        }


class SelfAttention(Attention):
    """What every attention of a sequence to itself has: positions, and a mask.

    A subclass defines `empty_cache` as well, and `call` with the arguments and
    results of `GroupedQueryAttention`.
    """

    def __init__(
        self,
        rope_theta=10000.0,
        rope_scaling=None,
        causal=True,
        window=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        checks.positive("rope_theta", rope_theta)
        check_scaling(rope_scaling)
        if window is not None:
            checks.at_least("window", window, 1)
        self.rope_theta = rope_theta
        self.rope_scaling = rope_scaling
        self.causal = causal
        self.window = window

    def _build_rotary(self, dim, name):
        checks.even(name, dim)
        self._frequencies = rotary_frequencies(dim, self.rope_theta, self.rope_scaling)

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
        """Which keys a query attends to, bool `[1 or B, 1, T or 1, S]`."""
        distance = query_index[:, None] - key_index[None, :]
        visible = distance >= 0 if self.causal else ops.ones_like(distance, "bool")
        if self.window is not None:
            near = ops.abs(distance) < self.window
            visible = ops.logical_and(visible, near)
        visible = visible[None, None]
        if mask is not None:
            visible = ops.logical_and(visible, as_keys(mask))
        return visible

    def compute_output_spec(
        self,
        inputs,
        mask=None,
        cache=None,
        cache_index=0,
        training=None,
        position_bias=None,
    ):
        outputs = keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)
        return outputs if cache is None else (outputs, cache_spec(cache))

    def get_config(self):
        return {
            **super().get_config(),
            "rope_theta": self.rope_theta,
            "rope_scaling": self.rope_scaling,
            "causal": self.causal,
            "window": self.window,
        }


class GroupedHeads(Attention):
    """Queries, keys and values of heads, a key-value head to a group of queries'.

    `concat_h(softmax(s q_h k_g^T + bias) v_g) W_o`, `g` the key-value head of query
    head `h` ([Ainslie et al., 2023](https://arxiv.org/abs/2305.13245), section 2.2)
    and `s` the scale.
    """

    def __init__(
        self,
        num_query_heads,
        num_key_value_heads=None,
        head_dim=None,
        query_key_norm=None,
        clip=None,
        scale=None,
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
        checks.one_of("query_key_norm", query_key_norm, QUERY_KEY_NORMS)
        for name, value in (("clip", clip), ("scale", scale)):
            if value is not None:
                checks.positive(name, value)
        self.num_query_heads = num_query_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.query_key_norm = query_key_norm
        self.clip = clip
        self.scale = scale

    def build(self, input_shape):
        dim = input_shape[-1]
        if self.head_dim is None:
            checks.divides("hidden_dim", dim, "num_query_heads", self.num_query_heads)
            self.head_dim = dim // self.num_query_heads
        heads = (self.num_query_heads, self.head_dim)
        key_value_heads = (self.num_key_value_heads, self.head_dim)
        # Where logits are not scaled down, queries begin smaller, as in T5.
        share = None if self.scale is None else 1 / (self.scale**2 * self.head_dim)
        self.query = self._project("query", dim, heads, 0, share)
        self.key = self._project("key", dim, key_value_heads, 1)
        self.value = self._project("value", dim, key_value_heads, 2)
        self._build_output(heads, dim, 3)
        if self.query_key_norm:
            first = 0 if self.query_key_norm == "full" else 1
            self.query_norm = self._norm("query_norm", heads[first:])
            self.key_norm = self._norm("key_norm", key_value_heads[first:])

    def _project(self, name, dim, heads, index, share=None):
        bias = self.bias is not None
        return self._dense(
            name, "btd,dhk->bthk", heads, (dim,), index, bias=bias, share=share
        )

    def _queries(self, inputs):
        """`[B, T, H, d]`."""
        query = self.query(inputs)
        if self.query_key_norm:
            query = self.query_norm(query)
        return self._clipped(query)

    def _keys_and_values(self, inputs):
        """Both `[B, S, G, d]`."""
        key, value = self.key(inputs), self.value(inputs)
        if self.query_key_norm:
            key = self.key_norm(key)
        return self._clipped(key), self._clipped(value)

    def _clipped(self, x):
        return x if self.clip is None else ops.clip(x, -self.clip, self.clip)

    def _attend(self, query, key, value, visible, bias, training):
        """`[B, T, H, d]`; `visible` may be None where nothing is hidden."""
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        dropped = self.weight_dropout and training
        if self.soft_cap is not None or dropped:
            return self._attend_in_steps(
                query, key, value, scale, visible, bias, training
            )
        if self.num_key_value_heads == 1:
            # `dot_product_attention` spreads several of them, on TensorFlow not one.
            key, value = (ops.repeat(t, self.num_query_heads, 2) for t in (key, value))
        if bias is not None and visible is not None:
            # Not every backend takes a bias and a mask together.
            bias = ops.where(visible, bias, large_negative(bias.dtype))
            visible = None
        return ops.dot_product_attention(
            query, key, value, bias=bias, mask=visible, scale=scale
        )

    def _attend_in_steps(self, query, key, value, scale, visible, bias, training):
        group = self.num_query_heads // self.num_key_value_heads
        key, value = (ops.repeat(t, group, axis=2) for t in (key, value))
        logits = ops.einsum("bthk,bshk->bhts", query, key) * scale
        if visible is None:
            visible = True
        weights = self._weigh(logits, visible, bias, training)
        return ops.einsum("bhts,bshk->bthk", weights, value)

    def get_config(self):
        return {
            **super().get_config(),
            "num_query_heads": self.num_query_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "query_key_norm": self.query_key_norm,
            "clip": self.clip,
            "scale": self.scale,
        }


@keras.saving.register_keras_serializable(package="keras_moe")
class GroupedQueryAttention(GroupedHeads, SelfAttention):
    """Self-attention whose key-value heads serve groups of query heads.

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
        positions: `"rotary"`; `"relative_bias"`, a table of the layer's own; or
            None, and a `position_bias` may come with the call.
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
        causal: bool: a query sees no later keys, as in a decoder. False sees all,
            as in an encoder.
        scale: float or None for `1 / sqrt(d)`: what logits are multiplied by
            before a bias is added. 1 in T5.
        weight_dropout: float in `[0, 1)`, of the attention weights.
        **kwargs: `name`, `trainable`, `dtype`.

    Call arguments:
        inputs: float tensor `[B, T, D]`.
        mask: bool tensor `[B, T]`, False for padding, at either end, or None.
            Without a cache only.
        cache: None, or keys and values so far, both `[B, S, G, d]`.
        cache_index: int or scalar int tensor: where in the cache `inputs` start.
        training: bool.
        position_bias: None, or a tensor `[1 or B, H, T, S]` that is added to the
            logits, such as a `RelativeBias` that several layers share.

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
            num_query_heads,
            num_key_value_heads,
            head_dim,
            query_key_norm=query_key_norm,
            clip=clip,
            rope_theta=rope_theta,
            dropout=dropout,
            kernel_initializer=kernel_initializer,
            **kwargs,
        )
        checks.one_of("positions", positions, POSITIONS)
        if positions == "relative_bias":
            check_buckets(
                relative_buckets,
                relative_max_distance,
                not self.causal,
                names=("relative_buckets", "relative_max_distance"),
            )
        self.positions = positions
        self.relative_buckets = relative_buckets
        self.relative_max_distance = relative_max_distance

    def build(self, input_shape):
        if self.positions == "relative_bias":
            self.relative_bias = RelativeBias(
                self.num_query_heads,
                self.relative_buckets,
                self.relative_max_distance,
                bidirectional=not self.causal,
                dtype=self.dtype_policy,
                name="relative_bias",
            )
            self.relative_bias.build(None)
        super().build(input_shape)
        if self.positions == "rotary":
            self._build_rotary(self.head_dim, "head_dim")

    def empty_cache(self, batch_size, length):
        """Zeros in the shape of the cache of a call: two of `[B, S, G, d]`."""
        shape = (batch_size, length, self.num_key_value_heads, self.head_dim)
        return tuple(ops.zeros(shape, dtype=self.compute_dtype) for _ in range(2))

    def call(
        self,
        inputs,
        mask=None,
        cache=None,
        cache_index=0,
        training=None,
        position_bias=None,
    ):
        query = self._queries(inputs)
        key, value = self._keys_and_values(inputs)
        query_index = self._query_index(inputs, cache, cache_index)
        if self.positions == "rotary":
            turns = self._rotations(query_index, mask)
            query, key = rotate(query, *turns), rotate(key, *turns)
        if cache is not None:
            cache = write_cache(cache, (key, value), cache_index)
            key, value = cache
        key_index = ops.arange(ops.shape(key)[1], dtype="int32")
        visible = self._visible(query_index, key_index, mask)
        if self.positions == "relative_bias":
            bias = self.relative_bias(query_index, key_index)
            position_bias = bias if position_bias is None else position_bias + bias
        outputs = self._attend(query, key, value, visible, position_bias, training)
        outputs = self._output(outputs, training)
        return outputs if cache is None else (outputs, cache)

    def get_config(self):
        return {
            **super().get_config(),
            "positions": self.positions,
            "relative_buckets": self.relative_buckets,
            "relative_max_distance": self.relative_max_distance,
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
    return keras.tree.map_structure(
        lambda part: keras.KerasTensor(part.shape, dtype=part.dtype), cache
    )


def as_keys(mask):
    """A mask `[B, S]` of keys as one of attention, `[B, 1, 1, S]`."""
    return ops.cast(mask, "bool")[:, None, None, :]


def _count_tokens(mask):
    """Each token's position among the tokens that are not padding, `[B, T]`."""
    mask = ops.cast(mask, "int32")
    return ops.maximum(ops.cumsum(mask, axis=1) - 1, 0)


def large_negative(dtype):
    """A bias that hides a key."""
    # Finite, so that a row with nothing visible gives an average and not NaN.
    return -3e4 if keras.backend.standardize_dtype(dtype) == "float16" else -1e9
