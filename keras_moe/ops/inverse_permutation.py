"""The inverse of a permutation."""

from keras import ops

from keras_moe.ops._backend import backend


def inverse_permutation(permutation):
    """Where each number comes in a permutation: `y[permutation[i]] = i`.

    The same as sorting it once more with `argsort`, in linear time.

    Args:
        permutation: int tensor `[N]` that holds each of `0 .. N - 1` once.

    Returns:
        An int32 tensor `[N]`.

    Example:

    ```python
    inverse_permutation([2, 0, 1])  # [1, 2, 0]
    ```
    """
    return backend.inverse_permutation(ops.convert_to_tensor(permutation))
