"""Attention of a decoder to its source.

B  batch                T  tokens of the target     S  of the source
D  model features       G  key-value heads          d  head size
"""

import keras

from keras_moe.layers.attention import GroupedHeads, as_keys


@keras.saving.register_keras_serializable(package="keras_moe")
class CrossAttention(GroupedHeads):
    """Attention of a decoder to the states of an encoder.

    As `GroupedQueryAttention`, with keys and values of the source: each of its
    tokens is seen by every query, and without positions, as in T5
    ([Raffel et al., 2019](https://arxiv.org/abs/1910.10683), section 2.1).

    Args:
        num_query_heads: see `GroupedQueryAttention`, as for `num_key_value_heads`,
            `head_dim`, `query_key_norm`, `clip`, `scale`, `bias`, `soft_cap`,
            `dropout`, `weight_dropout`, `norm_epsilon` and `kernel_initializer`.
        **kwargs: `name`, `trainable`, `dtype`.

    Call arguments:
        inputs: float tensor `[B, T, D]`.
        source: float tensor `[B, S, D]`, the encoder's states, or None with a
            cache.
        source_mask: bool or int tensor `[B, S]`, 0 for padding, or None. A source
            of nothing but padding gives the average of its values.
        cache: None, or the source's keys and values as `project_source` gives
            them, which then stand for `source`.
        training: bool.

    Returns:
        A tensor `[B, T, D]`.

    Raises:
        ValueError: where sizes do not divide, a setting is out of range, or not
            one of `source` and `cache` is given.

    Example:

    ```python
    attention = keras_moe.layers.CrossAttention(8)
    y = attention(
        keras.random.normal((2, 5, 64)), source=keras.random.normal((2, 16, 64))
    )
    ```
    """

    def project_source(self, source):
        """The keys and values of a source `[B, S, D]`, both `[B, S, G, d]`."""
        return self._keys_and_values(source)

    def call(self, inputs, source=None, source_mask=None, cache=None, training=None):
        if (source is None) == (cache is None):
            raise ValueError(
                "Either `source` or `cache` must be given. Received: "
                f"source={source!r}, cache={cache!r}"
            )
        key, value = self.project_source(source) if cache is None else cache
        visible = None if source_mask is None else as_keys(source_mask)
        outputs = self._attend(
            self._queries(inputs), key, value, visible, None, training
        )
        return self._output(outputs, training)

    def compute_output_spec(
        self, inputs, source=None, source_mask=None, cache=None, training=None
    ):
        return keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)
