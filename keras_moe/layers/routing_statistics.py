"""What a routing says about its load, and the losses made of it.

T  tokens, padding left out     E  experts      K  choices a token
h  [T, E] router logits         p  [T, E] scores, rows summing to 1
f  [E] share of the choices an expert received
P  [E] mean score of an expert

Every statistic is a sum over tokens, so those of several devices or batches add.
"""

from typing import Any, NamedTuple

import keras
from keras import ops


class RoutingStatistics(NamedTuple):
    """Sums over the tokens of one call, all float32, padding left out.

    Attributes:
        tokens: scalar, T.
        assignments: `[E]`: the choices that fell on each expert, before any was
            given up for capacity. What a router left out is no choice.
        first_choices: `[E]`: the first choices alone.
        probabilities: `[E]`: the sum of each expert's score.
        squared_log_partition: scalar: the sum of `logsumexp(h)**2`.
        dropped: scalar: the choices given up for capacity.
    """

    tokens: Any
    assignments: Any
    first_choices: Any
    probabilities: Any
    squared_log_partition: Any
    dropped: Any


def spec(num_experts):
    """The symbolic `RoutingStatistics` of a layer of `num_experts`."""

    # A tensor each: a functional model tells them apart by identity.
    def tensor(*shape):
        return keras.KerasTensor(shape, dtype="float32")

    return RoutingStatistics(
        tokens=tensor(),
        assignments=tensor(num_experts),
        first_choices=tensor(num_experts),
        probabilities=tensor(num_experts),
        squared_log_partition=tensor(),
        dropped=tensor(),
    )


def collect(routing, limited, num_experts, mask=None):
    """The `RoutingStatistics` of a routing.

    Args:
        routing: the `Routing` that the router returned.
        limited: the same after `limit_capacity`, or `routing` itself.
        num_experts: int, E.
        mask: bool tensor `[T]`, False for padding, or None.
    """
    if mask is None:
        mask = ops.ones_like(routing.logits[:, 0])
    mask = ops.cast(mask, "float32")
    assignments = _count(routing.expert_ids, num_experts)
    return RoutingStatistics(
        tokens=ops.sum(mask),
        assignments=assignments,
        first_choices=_count(routing.expert_ids[:, :1], num_experts),
        probabilities=ops.sum(routing.probabilities * mask[:, None], axis=0),
        squared_log_partition=ops.sum(
            ops.square(ops.logsumexp(routing.logits, axis=-1)) * mask
        ),
        dropped=ops.sum(assignments) - ops.sum(_count(limited.expert_ids, num_experts)),
    )


def _count(expert_ids, num_experts):
    # One choice at a time: a comparison of [T, E], never of [T, K, E].
    experts = ops.arange(num_experts, dtype=expert_ids.dtype)
    return sum(
        ops.sum(ops.cast(expert_ids[:, k, None] == experts, "float32"), axis=0)
        for k in range(expert_ids.shape[1])
    )


def balance_loss(statistics, choices="all"):
    """`E * sum_e f[e] P[e]`: 1 for an even load, up to E for a collapsed one.

    Switch Transformers ([Fedus et al., 2021](https://arxiv.org/abs/2101.03961),
    eq. 4-6) for K = 1; DeepSeekMoE
    ([Dai et al., 2024](https://arxiv.org/abs/2401.06066), eq. 12-14) for any K;
    with `choices="first"` GShard, which counts first choices only
    ([Lepikhin et al., 2020](https://arxiv.org/abs/2006.16668), algorithm 1; its
    loss is this one divided by `E**2`, of each group of tokens apart, where this
    takes all tokens of a call together). Gradients flow through `P` alone.

    Args:
        statistics: a `RoutingStatistics`.
        choices: `"all"` or `"first"`: the choices that `f` counts.

    Returns:
        A float32 scalar, 0 where there is no token.
    """
    counts = statistics.assignments if choices == "all" else statistics.first_choices
    share = expert_load(statistics, counts)
    mean = statistics.probabilities / ops.maximum(statistics.tokens, 1.0)
    return counts.shape[0] * ops.sum(ops.stop_gradient(share) * mean)


def z_loss(statistics):
    """The mean of `logsumexp(h)**2`, which keeps router logits small.

    ST-MoE ([Zoph et al., 2022](https://arxiv.org/abs/2202.08906), eq. 5).

    Returns:
        A float32 scalar, 0 where there is no token.
    """
    return statistics.squared_log_partition / ops.maximum(statistics.tokens, 1.0)


def expert_load(statistics, counts=None):
    """`f [E]`: the share of the choices that fell on each expert, summing to 1."""
    counts = statistics.assignments if counts is None else counts
    return counts / ops.maximum(ops.sum(counts), 1.0)


def dropped_fraction(statistics):
    """The share of the choices that were given up for capacity, a scalar."""
    return statistics.dropped / ops.maximum(ops.sum(statistics.assignments), 1.0)
