"""The encoder block: attention in both directions, then a feed-forward block.

B  batch        T  tokens       D  model features
"""

import keras

from keras_moe.layers.transformer_block import TransformerBlock


@keras.saving.register_keras_serializable(package="keras_moe")
class EncoderBlock(TransformerBlock):
    """A pre-norm Transformer encoder block over given sublayers.

        x = x + attention(norm(x))
        x = x + feed_forward(norm(x))
        x = x + extra_feed_forward(norm(x))         where there is one

    Args:
        attention: a layer such as `GroupedQueryAttention(4, causal=False)`.
        feed_forward: a `FeedForward` or a `MixtureOfExperts`.
        **kwargs: as for `DecoderBlock`, but for `cross_attention`.

    Call arguments:
        inputs: float tensor `[B, T, D]`.
        padding_mask: bool or int tensor `[B, T]`, 0 for padding, or None.
        training: bool.
        return_statistics: bool; a mixture's statistics are returned, and not
            recorded.
        mask: the mask that Keras attached to `inputs`, which it passes by itself;
            `padding_mask` goes before it.
        position_bias: see `GroupedQueryAttention`.
        per_sequence: see `MixtureOfExperts`.

    Returns:
        A tensor `[B, T, D]`; with `return_statistics=True` also the mixture's
        `RoutingStatistics`, None in a dense block.

    Example:

    ```python
    block = keras_moe.layers.EncoderBlock(
        keras_moe.layers.GroupedQueryAttention(4, causal=False),
        keras_moe.layers.MixtureOfExperts(8, 128, top_k=1),
    )
    y = block(keras.random.normal((2, 16, 64)))
    ```
    """

    def __init__(self, attention, feed_forward, **kwargs):
        if kwargs.get("cross_attention") is not None:
            raise ValueError(
                "`cross_attention` must be None: an encoder sees no other states. "
                f"Received: cross_attention={kwargs['cross_attention']!r}"
            )
        super().__init__(attention, feed_forward, **kwargs)

    def call(
        self,
        inputs,
        padding_mask=None,
        training=None,
        return_statistics=False,
        mask=None,
        position_bias=None,
        per_sequence=False,
    ):
        return self._run(
            inputs,
            mask if padding_mask is None else padding_mask,
            training,
            return_statistics,
            position_bias=position_bias,
            per_sequence=per_sequence,
        )

    def compute_output_spec(
        self,
        inputs,
        padding_mask=None,
        training=None,
        return_statistics=False,
        mask=None,
        position_bias=None,
        per_sequence=False,
    ):
        return self._specs(inputs, None, return_statistics)
