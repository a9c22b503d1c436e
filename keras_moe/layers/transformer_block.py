"""What encoder and decoder blocks share: norms, residuals, recomputation.

B  batch        T  tokens       D  model features       S  tokens of a source
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
_SUBLAYERS = ("attention", "feed_forward", "cross_attention", "extra_feed_forward")


def normalization(kind, epsilon, **kwargs):
    """An RMS norm (`"rms"`) or a layer norm, with an offset (`"layer"`) or without."""
    checks.one_of("norm", kind, NORMS)
    layer = NORMS[kind](epsilon=epsilon, **kwargs)
    layer.supports_masking = True  # Keras's RMS norm warns of masks otherwise
    return layer


class TransformerBlock(keras.layers.Layer):
    """A pre-norm Transformer block over given sublayers.

    A subclass defines `call`, which hands its arguments to `_run`.
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
        extra_feed_forward=None,
        cross_attention=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        checks.one_of("norm", norm, NORMS)
        checks.positive("norm_epsilon", norm_epsilon)
        checks.fraction("dropout", dropout)
        self.supports_masking = True
        self.attention = attention
        self.feed_forward = feed_forward
        self.extra_feed_forward = extra_feed_forward
        self.cross_attention = cross_attention
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
        for name in ("attention", "feed_forward"):
            self._add_norm(f"{name}_norm", input_shape)
        if self.output_norms:
            for name in ("attention", "feed_forward"):
                self._add_norm(f"{name}_output_norm", input_shape)
        for name in ("cross_attention", "extra_feed_forward"):
            if getattr(self, name) is not None:
                self._add_norm(f"{name}_norm", input_shape)
                if self.output_norms:
                    self._add_norm(f"{name}_output_norm", input_shape)
        for name in _SUBLAYERS:
            layer = getattr(self, name)
            if layer is not None and not layer.built:
                layer.build(input_shape)
        self.output_dropout = keras.layers.Dropout(
            self.dropout, dtype=self.dtype_policy, name="output_dropout"
        )

    def _add_norm(self, name, input_shape):
        layer = normalization(
            self.norm, self.norm_epsilon, dtype=self.dtype_policy, name=name
        )
        layer.build(input_shape)
        setattr(self, name, layer)

    def _run(
        self,
        inputs,
        padding_mask,
        training,
        return_statistics,
        cache=None,
        cache_index=0,
        source=None,
        source_mask=None,
        position_bias=None,
        per_sequence=False,
    ):
        """The results of `call`; adds the losses of a training step."""
        masks = padding_mask, source_mask
        floats = [inputs, source, position_bias]
        if self.recompute and training and cache is None:
            x, statistics = self._recomputed(floats, masks)
            if self.is_mixture and not return_statistics:
                self.feed_forward.record(statistics)
        else:
            x, cache, statistics = self._forward(
                *floats,
                masks,
                cache,
                cache_index,
                training,
                return_statistics,
                # What is generated for a row must not depend on the others.
                per_sequence or cache is not None,
            )
        return _packed(x, cache, statistics, return_statistics)

    def _forward(
        self,
        inputs,
        source,
        position_bias,
        masks,
        cache,
        cache_index,
        training,
        with_statistics,
        per_sequence=False,
    ):
        padding_mask, source_mask = masks
        own_cache, source_cache = cache, None
        if cache is not None and self.cross_attention is not None:
            own_cache, source_cache = cache
        x = self.attention_norm(inputs)
        arguments = {} if position_bias is None else {"position_bias": position_bias}
        if cache is None:
            x = self.attention(x, mask=padding_mask, training=training, **arguments)
        else:
            x, own_cache = self.attention(
                x,
                cache=own_cache,
                cache_index=cache_index,
                training=training,
                **arguments,
            )
        x = inputs + self._normed_output(x, "attention")
        if self.cross_attention is not None:
            y = self.cross_attention(
                self.cross_attention_norm(x),
                source=source,
                source_mask=source_mask,
                cache=source_cache,
                training=training,
            )
            x = x + self._normed_output(y, "cross_attention")
            own_cache = None if cache is None else (own_cache, source_cache)
        y = self.feed_forward_norm(x)
        statistics = None
        if not self.is_mixture:
            y = self.feed_forward(y, training=training)
        elif with_statistics:
            y, statistics = self.feed_forward(
                y,
                mask=padding_mask,
                training=training,
                return_statistics=True,
                per_sequence=per_sequence,
            )
        else:
            y = self.feed_forward(
                y, mask=padding_mask, training=training, per_sequence=per_sequence
            )
        x = x + self._dropped(self._normed_output(y, "feed_forward"), training)
        if self.extra_feed_forward is not None:
            y = self.extra_feed_forward_norm(x)
            y = self.extra_feed_forward(y, training=training)
            y = self._normed_output(y, "extra_feed_forward")
            x = x + self._dropped(y, training)
        return x, own_cache, statistics

    def _normed_output(self, x, name):
        return getattr(self, f"{name}_output_norm")(x) if self.output_norms else x

    def _dropped(self, x, training):
        # A call of a layer costs more than a token's arithmetic.
        return self.output_dropout(x, training=training) if self.dropout else x

    def _recomputed(self, floats, masks):
        # A function of its inputs and weights: what a backend recomputes must add
        # no loss and change no state, such as the seeds of dropout and jitter.
        weights, state = self.trainable_variables, self.non_trainable_variables
        given = [t is not None for t in floats]

        def forward(tensors, weight_values):
            tensors = iter(tensors)
            tensors = [next(tensors) if there else None for there in given]
            mapping = zip(weights + state, weight_values + before, strict=True)
            with keras.StatelessScope(state_mapping=[*mapping]) as scope:
                x, _, statistics = self._forward(
                    *tensors, masks, None, 0, True, self.is_mixture
                )
            after = [scope.get_current_value(v) for v in state]
            return x, list(statistics or ()), after

        # Copies: assigned below, a variable's own memory would hold the next seed
        # when the block is recomputed.
        before = [keras.ops.copy(v.value) for v in state]
        values = [v.value for v in weights]
        tensors = [t for t in floats if t is not None]
        x, statistics, after = keras.remat(forward)(tensors, values)
        for variable, value in zip(state, after, strict=True):
            variable.assign(value)
        if not self.is_mixture:
            return x, None
        return x, routing_statistics.RoutingStatistics(*statistics)

    def _specs(self, inputs, cache, return_statistics):
        """What `call` returns, as symbolic tensors."""
        outputs = keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)
        statistics = None
        if return_statistics and self.is_mixture:
            statistics = routing_statistics.spec(self.feed_forward.num_experts)
        if cache is not None:
            cache = cache_spec(cache)
        return _packed(outputs, cache, statistics, return_statistics)

    def compute_output_shape(self, inputs_shape):
        return inputs_shape

    def get_config(self):
        config = {
            **super().get_config(),
            "norm": self.norm,
            "norm_epsilon": self.norm_epsilon,
            "dropout": self.dropout,
            "recompute": self.recompute,
            "output_norms": self.output_norms,
        }
        for name in _SUBLAYERS:
            layer = getattr(self, name)
            if layer is not None:
                config[name] = keras.saving.serialize_keras_object(layer)
        return config

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        for name in _SUBLAYERS:
            if name in config:
                config[name] = keras.saving.deserialize_keras_object(config[name])
        return cls(**config)


def _packed(x, cache, statistics, return_statistics):
    outputs = [x]
    if cache is not None:
        outputs.append(cache)
    if return_statistics:
        outputs.append(statistics)
    return tuple(outputs) if len(outputs) > 1 else outputs[0]
