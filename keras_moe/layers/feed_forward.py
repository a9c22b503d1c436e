"""The dense feed-forward block that a mixture of experts stands in for."""

import keras

from keras_moe import checks
from keras_moe.layers.initializers import fresh


@keras.saving.register_keras_serializable(package="keras_moe")
class FeedForward(keras.layers.Layer):
    """A position-wise feed-forward network, gated or plain, without biases.

    With `a` the activation: `(a(x W_gate) * (x W_up)) W_down` gated
    ([Shazeer, 2020](https://arxiv.org/abs/2002.05202), eq. 6), else
    `a(x W_up) W_down` ([Vaswani et al., 2017](https://arxiv.org/abs/1706.03762),
    section 3.3).

    Args:
        intermediate_dim: int, the hidden width.
        activation: a Keras activation, by name or callable.
        gated: bool.
        kernel_initializer: initializer of the matrices.
        dropout: float in `[0, 1)`, of the hidden features.
        **kwargs: `name`, `trainable`, `dtype`.

    Call arguments:
        inputs: float tensor `[..., D]`.
        training: bool.

    Returns:
        A tensor of the same shape.

    Raises:
        ValueError: if `intermediate_dim` is below 1 or the activation unknown.

    Example:

    ```python
    ffn = keras_moe.layers.FeedForward(256, activation="gelu", gated=False)
    y = ffn(keras.random.normal((2, 8, 64)))
    ```
    """

    def __init__(
        self,
        intermediate_dim,
        activation="silu",
        gated=True,
        kernel_initializer="glorot_uniform",
        dropout=0.0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        checks.at_least("intermediate_dim", intermediate_dim, 1)
        checks.fraction("dropout", dropout)
        self.dropout = dropout
        self.supports_masking = True
        self.intermediate_dim = intermediate_dim
        self.activation = checks.activation("activation", activation)
        self.gated = gated
        self.kernel_initializer = keras.initializers.get(kernel_initializer)

    def build(self, input_shape):
        dim, hidden = input_shape[-1], self.intermediate_dim
        if self.gated:
            self.gate = self._dense("gate", dim, hidden, 2)
        self.up = self._dense("up", dim, hidden, 0)
        self.down = self._dense("down", hidden, dim, 1)
        self.hidden_dropout = keras.layers.Dropout(
            self.dropout, dtype=self.dtype_policy, name="hidden_dropout"
        )

    def _dense(self, name, fan_in, fan_out, index):
        layer = keras.layers.Dense(
            fan_out,
            use_bias=False,
            kernel_initializer=fresh(self.kernel_initializer, index),
            dtype=self.dtype_policy,
            name=name,
        )
        layer.build((None, fan_in))
        return layer

    def call(self, inputs, training=None):
        hidden = self.up(inputs)
        if self.gated:
            hidden = self.activation(self.gate(inputs)) * hidden
        else:
            hidden = self.activation(hidden)
        if self.dropout:
            hidden = self.hidden_dropout(hidden, training=training)
        return self.down(hidden)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {
            **super().get_config(),
            "intermediate_dim": self.intermediate_dim,
            "activation": keras.activations.serialize(self.activation),
            "gated": self.gated,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "dropout": self.dropout,
        }
