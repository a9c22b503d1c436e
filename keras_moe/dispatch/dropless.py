"""Dropless dispatch: rows sorted by expert, as many as each expert is given.

T  tokens       K  choices a token      N = T K  rows
E  experts      D  features

The sort replaces the `[T, E, C]` masks of GShard: its cost does not depend on E,
and every choice is computed ([Gale et al., 2022](https://arxiv.org/abs/2211.15841)).
"""

from typing import Any, NamedTuple

from keras import ops

from keras_moe.ops import inverse_permutation


class ExpertOrder(NamedTuple):
    """The rows of all experts, in one sequence sorted by expert.

    Attributes:
        tokens: int32 tensor `[N]`: the token of each row.
        group_sizes: int32 tensor `[E]`: the rows of each expert. Rows of no
            expert come last and are counted nowhere.
        positions: int32 tensor `[T, K]`: the row of each choice.
    """

    tokens: Any
    group_sizes: Any
    positions: Any


def sort_by_expert(expert_ids, num_experts):
    """Orders the choices of all tokens by expert, and within one by token.

    Args:
        expert_ids: int32 tensor `[T, K]`, `num_experts` meaning none.
        num_experts: int, E.

    Returns:
        An `ExpertOrder`.
    """
    top_k = expert_ids.shape[1]
    flat = ops.reshape(expert_ids, (-1,))
    order = ops.argsort(flat)  # stable on every backend
    # Searching the sorted ids counts them without an [N, E] comparison.
    ends = ops.searchsorted(
        ops.take(flat, order), ops.arange(num_experts, dtype=flat.dtype), side="right"
    )
    ends = ops.cast(ends, "int32")
    group_sizes = ops.diff(ops.concatenate([ops.zeros((1,), "int32"), ends]))
    return ExpertOrder(
        tokens=ops.cast(order // top_k, "int32"),
        group_sizes=group_sizes,
        positions=ops.reshape(inverse_permutation(order), (-1, top_k)),
    )


def combine(rows, order, gates):
    """Sums each token's rows, weighted by its gates.

    `y[t] = sum_k gates[t, k] * rows[positions[t, k]]`, accumulated in float32.

    Args:
        rows: float tensor `[N, D]`, the experts' outputs, sorted by expert.
        order: the `ExpertOrder` that sorted them.
        gates: float32 tensor `[T, K]`.

    Returns:
        A tensor `[T, D]` of the dtype of `rows`.
    """
    # Flat positions: JAX takes no matrix of indices from an empty tensor.
    choices = ops.take(rows, ops.reshape(order.positions, (-1,)), axis=0)
    choices = ops.reshape(choices, (-1, gates.shape[1], rows.shape[1]))
    choices = ops.cast(choices, gates.dtype)
    return ops.cast(ops.sum(choices * gates[..., None], axis=1), rows.dtype)
