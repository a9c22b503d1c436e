"""Each group of rows through a function with that group's own weights.

N  rows, sorted by group        E  groups (experts)
n  rows given to a stage at a time: all of them, a group or a block of one
"""

import contextlib
from typing import Any, NamedTuple

from keras import ops

from keras_moe import checks
from keras_moe.ops._backend import backend
from keras_moe.ops._stages import stage_outputs


class Stage(NamedTuple):
    """One step of `grouped_apply`.

    Attributes:
        function: callable `(matmul, inputs, weights) -> outputs`. `inputs` and
            `outputs` are tuples of tensors `[n, ...features]`, each row computed
            from the same row alone. `weights` holds what `Stage.weights` holds,
            for the rows at hand; it is used through `matmul(x, w)` only, the
            product of rows `[n, D]` and a matrix `[D, H]` of their group, cast to
            the dtype of `x`. On JAX, compare equal where it does the same, or it
            is compiled at every eager call.
        weights: tuple of tensors `[E, D, H]`.
    """

    function: Any
    weights: Any


def grouped_apply(stages, x, group_sizes):
    """Applies a chain of stages to consecutive groups of rows.

    Row `i` of group `e` becomes `f_2(f_1(x[i]; weights_1[e]); weights_2[e])`.
    A block of rows passes through all stages while it is in the cache, and what
    lies between two stages is kept for the gradient, so end a stage with its
    matrix products: nothing but element-wise work is then computed twice.

    The formulation is chosen by backend and platform, see `formulation`.

    Args:
        stages: a sequence of `Stage`; the last returns a tuple of one tensor.
        x: float tensor `[N, D]`, rows sorted by group.
        group_sizes: int32 tensor `[E]`, the rows of each group, their sum at most
            `N`. Rows past the sum are zero in the result, with zero gradient.

    Returns:
        A tensor `[N, H]`. Differentiable in `x` and all weights.

    Example:

    ```python
    def double(matmul, inputs, weights):
        return (matmul(2 * inputs[0], weights[0]),)

    x = keras.random.normal((6, 4))
    w = keras.random.normal((3, 4, 8))
    y = grouped_apply([Stage(double, (w,))], x, ops.array([2, 0, 3]))
    ```
    """
    functions = tuple(stage.function for stage in stages)
    weights = tuple(
        tuple(ops.convert_to_tensor(w) for w in stage.weights) for stage in stages
    )
    name = _forced or backend.choose_formulation(x, weights)
    return _formulations()[name](functions, x, weights, group_sizes)


# Which one runs is chosen by `choose_formulation` of the backend's file:
#
#   backend      where                                       formulation
#   jax          CPU                                         "blocks"
#                GPU, TPU                                    "library" (ragged_dot)
#   torch        rows of a multiple of 16 bytes, and         "library" (grouped_mm)
#                bfloat16 if on a GPU
#                otherwise, and on a CPU without gradients   "groups"
#                where weights are of another dtype
#   tensorflow   within XLA                                  "blocks"
#                eagerly, and in a graph without XLA         "groups"
#
# "dense" is for debugging: every group's weights for every row, then a selection.
_forced = None


@contextlib.contextmanager
def formulation(name):
    """Forces how grouped products are computed, for debugging.

    Args:
        name: `"blocks"` (loops over blocks of rows of fixed sizes), `"groups"` (a
            loop over the groups in use), `"library"` (the backend's own grouped
            product) or `"dense"` (every group for every row, and a selection). A
            backend has `"dense"` and those that suit it.

    Raises:
        ValueError: for a name that the backend does not have.

    Example:

    ```python
    with keras_moe.ops.formulation("dense"):
        y = keras_moe.ops.grouped_matmul(x, w, group_sizes)
    ```

    What was compiled before keeps its formulation.
    """
    global _forced
    checks.one_of("name", name, tuple(_formulations()))
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def _formulations():
    return {**backend.FORMULATIONS, "dense": _dense}


def _dense(functions, x, weights, group_sizes):
    ends = ops.cumsum(group_sizes)
    row = ops.arange(ops.shape(x)[0], dtype=ends.dtype)
    y = 0.0
    for e in range(group_sizes.shape[0]):
        inside = (row < ends[e]) & (row >= ends[e] - group_sizes[e])
        inside = inside[:, None]
        # Rows of others may hold infinities, whose gradient is not a number.
        rows = ops.where(inside, x, ops.zeros_like(x))
        matrices = [tuple(w[e] for w in stage) for stage in weights]
        *_, (part,) = stage_outputs(functions, rows, matrices, _matmul)
        y = y + ops.where(inside, part, ops.zeros_like(part))
    return y


def _matmul(x, w):
    return ops.matmul(x, ops.cast(w, x.dtype))
