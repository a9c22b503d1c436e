"""The decoder block: attention, then a feed-forward block or a mixture.

B  batch        T  tokens       D  model features
"""

import functools

import keras

from keras_moe import checks
from keras_moe.layers import routing_statistics
from keras_moe.layers.attention import cache_spec
from keras_moe.layers.mixture_of_experts import MixtureOfExperts

NORMS = {
    "rms": keras.layers.RMSNormalization,
    "layer": keras.layers.LayerNormalization,
    "layer_no_bias": functools.partial(keras.layers.LayerNormalization, center=False),
}


def normalization(kind, epsilon, **kwargs):
    """An RMS norm (`"rms"`) or a layer norm, with an offset (`"layer"`) or without."""
    checks.one_of("norm", kind, NORMS)
    layer = NORMS[kind](epsilon=epsilon, **kwargs)
    layer.supports_masking = True  # Keras's RMS norm warns of masks otherwise
    return layer


@keras.saving.register_keras_serializable(package="keras_moe")
class DecoderBlock(keras.layers.Layer):
    """A pre-norm Transformer decoder block over given sublayers.

        x = x + attention(norm(x))
        x = x + feed_forward(norm(x))

    ([Vaswani et al., 2017](https://arxiv.org/abs/1706.03762), with the norm
    before each sublayer). The second sublayer is a `FeedForward` or a
    `MixtureOfExperts`: nothing else tells a dense block from a sparse one.

    Args:
        attention: a layer such as `GroupedQueryAttention`.
        feed_forward: a `FeedForward` or a `MixtureOfExperts`.
        norm: `"rms"` ([Zhang and Sennrich,
            2019](https://arxiv.org/abs/1910.07467), eq. 4), `"layer"` or
            `"layer_no_bias"`.
        norm_epsilon: float, positive.
        output_norms: bool: each sublayer's output is normalised as well, before it
            is added (Grok-1).
        dropout: float in `[0, 1)`, of the second sublayer's output.
        recompute: bool: in training, keep the inputs alone for the gradient and
            compute the block anew on the way back (`keras.remat`): less memory
            for about a third more time.
        **kwargs: `name`, `trainable`, `dtype`.

    Call arguments:
        inputs: float tensor `[B, T, D]`.
        padding_mask: bool or int tensor `[B, T]`, 0 for padding, or None.
        cache: None, or the attention's cache.
        cache_index: int or scalar int tensor: where in the cache `inputs` start.
        training: bool.
        return_statistics: bool; a mixture's statistics are returned, and not
            recorded.
        mask: the mask that Keras attached to `inputs`, which it passes by itself;
            `padding_mask` goes before it.

    Returns:
        A tensor `[B, T, D]`, followed by the cache where one was given, followed
        by the mixture's `RoutingStatistics` (None in a dense block) with
        `return_statistics=True`.

    Example:

    ```python
    block = keras_moe.layers.DecoderBlock(
        keras_moe.layers.GroupedQueryAttention(4),
        keras_moe.layers.MixtureOfExperts(8, 128, top_k=2),
    )
    y = block(keras.random.normal((2, 16, 64)))
    ```
    """

    def __init__(
        self,
        attention,
        feed_forward,
        norm="rms",
        norm_epsilon=1e-6,
        dropout=0.0,
        recompute=False,
        output_norms=False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        checks.one_of("norm", norm, NORMS)
        checks.positive("norm_epsilon", norm_epsilon)
        checks.fraction("dropout", dropout)
        self.supports_masking = True
        self.attention = attention
        self.feed_forward = feed_forward
        self.norm = norm
        self.norm_epsilon = norm_epsilon
        self.dropout = dropout
        self.recompute = recompute
        self.output_norms = output_norms

    @property
    def is_mixture(self):
        """Whether the feed-forward sublayer is a mixture of experts."""
        return isinstance(self.feed_forward, MixtureOfExperts)

    def build(self, input_shape):
        def norm(name):
            layer = normalization(
                self.norm, self.norm_epsilon, dtype=self.dtype_policy, name=name
            )
            layer.build(input_shape)
            return layer

        self.attention_norm = norm("attention_norm")
        self.feed_forward_norm = norm("feed_forward_norm")
        if self.output_norms:
            self.attention_output_norm = norm("attention_output_norm")
            self.feed_forward_output_norm = norm("feed_forward_output_norm")
        for layer in (self.attention, self.feed_forward):
            if not layer.built:
                layer.build(input_shape)
        self.output_dropout = keras.layers.Dropout(
            self.dropout, dtype=self.dtype_policy, name="output_dropout"
        )

    def call(
        self,
        inputs,
        padding_mask=None,
        cache=None,
        cache_index=0,
        training=None,
        return_statistics=False,
        mask=None,
    ):
        if padding_mask is None:
            padding_mask = mask
        if self.recompute and training and cache is None:
            x, statistics = self._recomputed(inputs, padding_mask)
            if self.is_mixture and not return_statistics:
                self.feed_forward.record(statistics)
        else:
            x, cache, statistics = self._forward(
                inputs, padding_mask, cache, cache_index, training, return_statistics
            )
        outputs = [x]
        if cache is not None:
            outputs.append(cache)
        if return_statistics:
            outputs.append(statistics)
        return tuple(outputs) if len(outputs) > 1 else outputs[0]

    def _forward(
        self, inputs, padding_mask, cache, cache_index, training, with_statistics
    ):
        x = self.attention_norm(inputs)
        if cache is None:
            x = self.attention(x, mask=padding_mask, training=training)
        else:
            x, cache = self.attention(
                x, cache=cache, cache_index=cache_index, training=training
            )
        if self.output_norms:
            x = self.attention_output_norm(x)
        residual = inputs + x
        x = self.feed_forward_norm(residual)
        statistics = None
        if not self.is_mixture:
            x = self.feed_forward(x)
        elif with_statistics:
            x, statistics = self.feed_forward(
                x, mask=padding_mask, training=training, return_statistics=True
            )
        else:
            x = self.feed_forward(x, mask=padding_mask, training=training)
        if self.output_norms:
            x = self.feed_forward_output_norm(x)
        if self.dropout:
            x = self.output_dropout(x, training=training)
        return residual + x, cache, statistics

    def _recomputed(self, inputs, padding_mask):
        # A function of its inputs and weights: what a backend recomputes must add
        # no loss and change no state, such as the seeds of dropout and jitter.
        weights, state = self.trainable_variables, self.non_trainable_variables

        def forward(inputs, weight_values):
            mapping = zip(weights + state, weight_values + before, strict=True)
            with keras.StatelessScope(state_mapping=[*mapping]) as scope:
                x, _, statistics = self._forward(
                    inputs, padding_mask, None, 0, True, self.is_mixture
                )
            after = [scope.get_current_value(v) for v in state]
            return x, list(statistics or ()), after

        # Copies: assigned below, a variable's own memory would hold the next seed
        # when the block is recomputed.
        before = [keras.ops.copy(v.value) for v in state]
        values = [v.value for v in weights]
        x, statistics, after = keras.remat(forward)(inputs, values)
        for variable, value in zip(state, after, strict=True):
            variable.assign(value)
        if not self.is_mixture:
            return x, None
        return x, routing_statistics.RoutingStatistics(*statistics)

    def compute_output_shape(self, inputs_shape):
        return inputs_shape

    def compute_output_spec(
        self,
        inputs,
        padding_mask=None,
        cache=None,
        cache_index=0,
        training=None,
        return_statistics=False,
        mask=None,
    ):
        outputs = [keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)]
        if cache is not None:
            outputs.append(cache_spec(cache))
        if return_statistics:
            spec = None
            if self.is_mixture:
                spec = routing_statistics.spec(self.feed_forward.num_experts)
            outputs.append(spec)
        return tuple(outputs) if len(outputs) > 1 else outputs[0]

    def get_config(self):
        serialize = keras.saving.serialize_keras_object
        return {
            **super().get_config(),
            "attention": serialize(self.attention),
            "feed_forward": serialize(self.feed_forward),
            "norm": self.norm,
            "norm_epsilon": self.norm_epsilon,
            "dropout": self.dropout,
            "recompute": self.recompute,
            "output_norms": self.output_norms,
        }

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        for name in ("attention", "feed_forward"):
            config[name] = keras.saving.deserialize_keras_object(config[name])
        return cls(**config)
