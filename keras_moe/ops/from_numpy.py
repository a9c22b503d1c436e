"""A NumPy array as a tensor."""

from keras_moe.ops._backend import backend


def from_numpy(array):
    """A tensor of an array's values, which may share its memory.

    `keras.ops.convert_to_tensor` copies on torch, bfloat16 by way of float32: up to
    five times the memory while a large weight is loaded.

    Args:
        array: contiguous NumPy array of any float dtype, bfloat16 among them, that
            is not written to afterwards.

    Returns:
        A tensor of the same shape and dtype.

    Example:

    ```python
    variable.assign(from_numpy(np.zeros(variable.shape, "float32")))
    ```
    """
    return backend.from_numpy(array)
