"""The decoder block: attention, then a feed-forward block or a mixture.

B  batch        T  tokens       D  model features       S  tokens of a source
"""

import keras

from keras_moe.layers.transformer_block import TransformerBlock


@keras.saving.register_keras_serializable(package="keras_moe")
class DecoderBlock(TransformerBlock):
    """A pre-norm Transformer decoder block over given sublayers.

        x = x + attention(norm(x))
        x = x + cross_attention(norm(x), source)    where there is one
        x = x + feed_forward(norm(x))
        x = x + extra_feed_forward(norm(x))         where there is one

    ([Vaswani et al., 2017](https://arxiv.org/abs/1706.03762), with the norm
    before each sublayer). The feed-forward sublayer is a `FeedForward` or a
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
        dropout: float in `[0, 1)`, of the output of the feed-forward sublayers;
            attention has its own.
        recompute: bool: in training, keep the inputs alone for the gradient and
            compute the block anew on the way back (`keras.remat`): less memory
            for about a third more time.
        cross_attention: None, or a `CrossAttention` to the states of an encoder.
        extra_feed_forward: None, or a `FeedForward` that follows the mixture
            (ST-MoE, [Zoph et al., 2022](https://arxiv.org/abs/2202.08906)).
        **kwargs: `name`, `trainable`, `dtype`.

    Call arguments:
        inputs: float tensor `[B, T, D]`.
        padding_mask: bool or int tensor `[B, T]`, 0 for padding, or None.
        cache: None, or the attention's cache; with cross-attention a pair of that
            and of the source's keys and values (`CrossAttention.project_source`).
            With a cache a mixture's capacity is that of each sequence (see
            `per_sequence` of `MixtureOfExperts`).
        cache_index: int or scalar int tensor: where in the cache `inputs` start.
        training: bool.
        return_statistics: bool; a mixture's statistics are returned, and not
            recorded.
        mask: the mask that Keras attached to `inputs`, which it passes by itself;
            `padding_mask` goes before it.
        source: float tensor `[B, S, D]` for cross-attention, which needs it unless
            there is a cache.
        source_mask: bool or int tensor `[B, S]`, 0 for padding, or None.
        position_bias: see `GroupedQueryAttention`.

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

    def call(
        self,
        inputs,
        padding_mask=None,
        cache=None,
        cache_index=0,
        training=None,
        return_statistics=False,
        mask=None,
        source=None,
        source_mask=None,
        position_bias=None,
    ):
        if source is not None and self.cross_attention is None:
            raise ValueError(
                "`source` needs a block with `cross_attention`. Received: "
                f"source.shape={tuple(source.shape)}, cross_attention=None"
            )
        return self._run(
            inputs,
            mask if padding_mask is None else padding_mask,
            training,
            return_statistics,
            cache,
            cache_index,
            source,
            source_mask,
            position_bias,
        )

    def compute_output_spec(
        self,
        inputs,
        padding_mask=None,
        cache=None,
        cache_index=0,
        training=None,
        return_statistics=False,
        mask=None,
        source=None,
        source_mask=None,
        position_bias=None,
    ):
        return self._specs(inputs, cache, return_statistics)
