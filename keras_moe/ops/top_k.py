"""Top-k with ties resolved alike on every backend."""

from keras import ops

from keras_moe.ops._backend import backend


def top_k(x, k):
    """The `k` largest entries of the last axis, ties going to the lowest index.

    `keras.ops.top_k` leaves ties to the backend, and torch breaks them
    arbitrarily; a router must choose the same experts everywhere.

    Args:
        x: float tensor of shape `[..., E]`.
        k: int, between 1 and `E`.

    Returns:
        `(values, indices)`, both of shape `[..., k]`, in descending order of
        value; `indices` is int32. Values carry no gradient: gather with the
        indices where one is wanted.

    Raises:
        ValueError: if `k` is not between 1 and `E`.

    Example:

    ```python
    top_k([[1.0, 3.0, 3.0]], k=2)  # values [[3, 3]], indices [[1, 2]]
    ```
    """
    x = ops.convert_to_tensor(x)
    if not 1 <= k <= x.shape[-1]:
        raise ValueError(
            f"`k` must be between 1 and the last axis of `x` ({x.shape[-1]}). "
            f"Received: k={k}"
        )
    return backend.top_k(ops.stop_gradient(x), k)
