"""Filling a large variable with little memory beside its own."""

import numpy as np

from keras_moe.ops._backend import backend


def assign_parts(variable, parts):
    """Gives a variable its values, part after part.

    `variable.assign` wants the whole value, in a tensor made of an array: memory
    holds a variable two to four times then, which is much where one holds all
    experts of a layer.

    Args:
        variable: `keras.Variable`.
        parts: an iterable of `(index, array)`, which may make them one by one: NumPy
            arrays of the variable's dtype, of the shape `variable.shape[1:]` for
            each index of the first axis, or a single one of the whole shape with the
            index None. Together they are all of the variable.

    Raises:
        ValueError: if an array has another shape, or an index is out of range. What
            the variable holds then is not defined.

    Example:

    ```python
    kernel = keras.Variable(np.zeros((4, 8, 8), "float32"))
    assign_parts(kernel, ((i, np.full((8, 8), i, "float32")) for i in range(4)))
    ```
    """
    backend.assign_parts(variable, _checked(tuple(variable.shape), parts))


def _checked(shape, parts):
    for index, array in parts:
        expected = shape if index is None else shape[1:]
        if array.shape != expected or not (index is None or 0 <= index < shape[0]):
            raise ValueError(
                f"A part of a variable of shape {shape} must have the shape "
                f"{expected}, and its index must lie in it. Received: an array of "
                f"shape {array.shape} for index={index}"
            )
        yield index, np.asarray(array, order="C")


def unwritten_zeros(shape, dtype=None):
    """Zeros that take memory only as they are written to, where a backend can.

    Args:
        shape: tuple of int.
        dtype: str, the name of a dtype.

    Returns:
        A tensor, for the value of a new variable alone.
    """
    return backend.unwritten_zeros(shape, dtype)
