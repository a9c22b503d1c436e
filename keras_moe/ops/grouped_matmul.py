"""Grouped matrix multiplication: every expert's rows times that expert's matrix.

N  rows, sorted by group        E  groups (experts)
D  features in                  H  features out
"""

import keras
from keras import ops

from keras_moe.ops.grouped_apply import Stage, grouped_apply


def grouped_matmul(x, w, group_sizes):
    """Multiplies consecutive groups of rows by one matrix each.

    With `o[e] = sum(group_sizes[:e])`,

        y[o[e] : o[e] + group_sizes[e]] = x[o[e] : o[e] + group_sizes[e]] @ w[e]

    and `y` is zero from row `sum(group_sizes)` on, with zero gradient there.
    The work follows the number of rows, not the number of groups: a group
    without rows costs next to nothing and its matrix is not read. This is the
    block-sparse product of MegaBlocks
    ([Gale et al., 2022](https://arxiv.org/abs/2211.15841), section 5) for groups
    of any size, without padding or dropping.

    Args:
        x: float tensor of shape `[N, D]`, rows sorted by group.
        w: float tensor of shape `[E, D, H]`, of the same dtype as `x`.
        group_sizes: int tensor of shape `[E]`, the rows of each group, not
            negative; their sum is at most `N` (neither can be checked inside a
            compiled program).

    Returns:
        A tensor of shape `[N, H]` and the dtype of `x`. Differentiable in `x`
        and `w`.

    Raises:
        ValueError: if ranks, shapes or dtypes do not fit.

    Example:

    ```python
    x = keras.random.normal((6, 4))
    w = keras.random.normal((3, 4, 8))
    y = grouped_matmul(x, w, [2, 0, 3])  # rows 0-1 by w[0], rows 2-4 by w[2]
    y.shape  # (6, 8); row 5 is zero
    ```
    """
    x = ops.convert_to_tensor(x)
    w = ops.convert_to_tensor(w)
    group_sizes = ops.cast(ops.convert_to_tensor(group_sizes), "int32")
    if len(x.shape) != 2 or len(w.shape) != 3 or x.shape[1] != w.shape[1]:
        raise ValueError(
            "`x` must have shape [N, D] and `w` shape [E, D, H] with the same D. "
            f"Received: x.shape={tuple(x.shape)}, w.shape={tuple(w.shape)}"
        )
    if tuple(group_sizes.shape) != (w.shape[0],):
        raise ValueError(
            f"`group_sizes` must have shape [E] = ({w.shape[0]},). "
            f"Received: group_sizes.shape={tuple(group_sizes.shape)}"
        )
    x_dtype, w_dtype = (keras.backend.standardize_dtype(t.dtype) for t in (x, w))
    if x_dtype != w_dtype:
        raise ValueError(
            "`x` and `w` must have the same dtype. "
            f"Received: x.dtype={x_dtype}, w.dtype={w_dtype}"
        )
    return grouped_apply([Stage(_product, (w,))], x, group_sizes)


def _product(matmul, inputs, weights):
    return (matmul(inputs[0], weights[0]),)
