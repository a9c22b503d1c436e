"""Activations that Keras has no name for."""

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="keras_moe")
def gelu_tanh(x):
    """Gelu by its tanh approximation, `"keras_moe>gelu_tanh"` by name.

    `x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x**3)))`
    ([Hendrycks and Gimpel, 2016](https://arxiv.org/abs/1606.08415), section 2),
    which JAX means by `gelu`.

    Args:
        x: float tensor of any shape.

    Returns:
        A tensor like `x`.
    """
    return ops.gelu(x, approximate=True)
