"""Capacity: how many choices an expert accepts of each group of tokens.

T  tokens       K  choices a token      E  experts
G  tokens a group                       C  capacity, choices an expert a group
"""

import math

from keras import ops

from keras_moe import checks
from keras_moe.ops import inverse_permutation

# 1.1 * 3 * 30 / 11 is 9, but a little above it in floating point; how much depends
# on whether Python or XLA, which reorders, computes it.
_JUST_BELOW = 1 - 1e-9


def expert_capacity(capacity_factor, group_size, num_experts, top_k):
    """`C = ceil(capacity_factor * K * G / E)`: an even share times the factor.

    Switch Transformers ([Fedus et al., 2021](https://arxiv.org/abs/2101.03961),
    eq. 3) for K = 1; with K in it a factor of 1 fits an even load for any K, as
    GShard's `2 G / E` does ([Lepikhin et al., 2020](https://arxiv.org/abs/2006.16668),
    section 3.2).

    A share that rounding puts just above an integer counts as that integer.

    Args:
        capacity_factor: float, positive.
        group_size: int or scalar int tensor, G, padding included.
        num_experts: int, E.
        top_k: int, K.

    Returns:
        int, or a scalar int32 tensor where `group_size` is one.

    Raises:
        ValueError: if `capacity_factor` is not positive.
    """
    checks.positive("capacity_factor", capacity_factor)
    if isinstance(group_size, int):
        share = capacity_factor * top_k * group_size / num_experts
        return math.ceil(share * _JUST_BELOW)
    share = capacity_factor * top_k * ops.cast(group_size, "float64") / num_experts
    return ops.cast(ops.ceil(share * _JUST_BELOW), "int32")


def limit_capacity(routing, capacity, group_size, num_experts):
    """Gives up the choices that exceed an expert's capacity in their group.

    In each group the first choices of all tokens are placed, in sequence order,
    then their second choices, and so on (GShard, algorithm 1). Tokens form
    groups in the order they come in; the last group may be shorter.

    Args:
        routing: a `Routing` of T tokens. Padding takes no place.
        capacity: int or scalar int tensor, C, at least 1.
        group_size: int or scalar int tensor, G, at least 1.
        num_experts: int, E.

    Returns:
        The `Routing` with `expert_ids` set to `num_experts` and `gates` to zero
        where a choice was given up. The remaining gates are left as they were.
    """
    ids = routing.expert_ids
    num_tokens, top_k = ops.shape(ids)[0], ids.shape[1]
    token = ops.arange(num_tokens, dtype="int32")
    bucket = (token // group_size)[:, None] * (num_experts + 1) + ids
    # Rows of one bucket, ordered by choice and then by token: transposing makes
    # a stable sort keep that order.
    flat = ops.reshape(ops.transpose(bucket), (-1,))
    order = ops.argsort(flat)
    sorted_buckets = ops.take(flat, order)
    place = ops.take(_place_in_run(sorted_buckets), inverse_permutation(order))
    place = ops.transpose(ops.reshape(place, (top_k, num_tokens)))
    kept = place < capacity
    return routing._replace(
        expert_ids=ops.where(kept, ids, num_experts),
        gates=ops.where(kept, routing.gates, 0.0),
    )


def _place_in_run(values):
    """How many equal entries precede each one, in a sorted int32 vector."""
    # Not by searching the vector in itself: XLA under TensorFlow searches by
    # comparing all with all.
    size = ops.shape(values)[0]
    index = ops.arange(size, dtype="int32")
    starts = values != ops.concatenate([values[:1] - 1, values[:-1]])
    run = ops.cumsum(ops.cast(starts, "int32")) - 1
    # One segment more than needed: torch takes 0 segments for no argument.
    first = ops.segment_sum(ops.where(starts, index, 0), run, num_segments=size + 1)
    return index - ops.take(first, run)
