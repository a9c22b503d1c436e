"""Routing, losses, capacity and mixtures in float64 NumPy, from the papers.

Loops over tokens and choices, as the equations are printed. `none` is the id one
past the last expert: a choice that goes nowhere.
"""

import math
from collections import Counter
from fractions import Fraction
from typing import NamedTuple

import numpy as np

_erf = np.vectorize(math.erf, otypes=["float64"])


def softmax(x):
    x = np.asarray(x, "float64")
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, "float64")))


ACTIVATIONS = {
    "linear": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x * sigmoid(x),
    "gelu": lambda x: x * (1 + _erf(x / math.sqrt(2))) / 2,
    "tanh": np.tanh,
}


class Routing(NamedTuple):
    ids: np.ndarray  # [T, K]
    gates: np.ndarray  # [T, K]
    scores: np.ndarray  # [T, E], as the paper has them, not normalised
    logits: np.ndarray  # [T, E]

    @property
    def probabilities(self):
        """Scores that sum to one: DeepSeek-V3, eq. 18; a softmax does already."""
        return self.scores / self.scores.sum(axis=-1, keepdims=True)


def route(
    x,
    kernel,
    top_k,
    scores="softmax",
    normalize=None,
    gates_from="all",
    mask=None,
    bias=None,
    groups=1,
    top_k_groups=1,
    group_scores="top_2",
    scale=1.0,
):
    """Switch eq. 1-2, GShard alg. 1, Mixtral 2.1, DeepSeekMoE 9-11, V3 13-16."""
    x, kernel = np.asarray(x, "float64"), np.asarray(kernel, "float64")
    (tokens, _), experts = x.shape, kernel.shape[1]
    score = softmax if scores == "softmax" else sigmoid
    if normalize is None:
        normalize = top_k > 1
    logits = x @ kernel
    ids = np.full((tokens, top_k), experts)
    gates = np.zeros((tokens, top_k))
    for t in range(tokens):
        if mask is not None and not mask[t]:
            continue
        preference = score(logits[t]) if bias is not None else logits[t]
        preference = preference + (0 if bias is None else bias)
        in_groups = score(logits[t]) + (0 if bias is None else bias)
        members = np.split(np.arange(experts), groups)
        best = {
            g: sum(sorted(in_groups[m])[-1 if group_scores == "max" else -2 :])
            for g, m in enumerate(members)
        }
        kept = sorted(best, key=lambda g: (-best[g], g))[:top_k_groups]
        allowed = [e for g in kept for e in members[g]]
        best = sorted(allowed, key=lambda e: (-preference[e], e))[:top_k]
        if gates_from == "top_k":
            chosen = score(logits[t, best])
        else:
            chosen = score(logits[t])[best]
        ids[t] = best
        gates[t] = scale * (chosen / chosen.sum() if normalize else chosen)
    return Routing(ids, gates, score(logits), logits)


def _real_tokens(mask, tokens):
    return [t for t in range(tokens) if mask is None or mask[t]]


def expert_shares(ids, experts, mask=None, choices="all"):
    """`f_e`: the share of the choices that fell on expert e."""
    counts = Counter()
    for t in _real_tokens(mask, len(ids)):
        counts.update(ids[t] if choices == "all" else ids[t][:1])
    total = sum(counts.values())
    return np.array([counts[e] / total if total else 0.0 for e in range(experts)])


def switch_loss(routing, mask=None, choices="all"):
    """`N sum_i f_i P_i`: Switch eq. 4-6; for K > 1 DeepSeekMoE eq. 12-14.

    DeepSeekMoE's `f_i` is `N / (K T)` times the count, so `sum_i f_i P_i` is this.
    """
    experts = routing.logits.shape[1]
    real = _real_tokens(mask, len(routing.ids))
    mean = sum(routing.probabilities[t] for t in real) / max(len(real), 1)
    shares = expert_shares(routing.ids, experts, mask, choices)
    return experts * float(np.sum(shares * mean))


def gshard_loss(routing, mask=None):
    """`1/E sum_e (c_e / S) m_e`, `c_e` counting first choices: GShard alg. 1."""
    experts = routing.logits.shape[1]
    real = _real_tokens(mask, len(routing.ids))
    loss = 0.0
    for e in range(experts):
        c = sum(routing.ids[t][0] == e for t in real)
        m = sum(routing.probabilities[t][e] for t in real) / len(real)
        loss += c / len(real) * m
    return loss / experts


def z_loss(routing, mask=None):
    """`1/B sum_i (log sum_j exp x_j)**2`: ST-MoE eq. 5."""
    real = _real_tokens(mask, len(routing.ids))
    total = sum(math.log(np.sum(np.exp(routing.logits[t]))) ** 2 for t in real)
    return total / max(len(real), 1)


def capacity(factor, group, experts, top_k):
    """`ceil(factor K G / E)` of the decimal factor, without rounding errors."""
    return math.ceil(Fraction(str(factor)) * top_k * group / experts)


def kept_choices(ids, capacity, group, experts):
    """GShard alg. 1: all first choices are placed, in order, then all second."""
    tokens, top_k = np.shape(ids)
    kept = np.zeros((tokens, top_k), bool)
    for start in range(0, tokens, group):
        taken = Counter()
        for k in range(top_k):
            for t in range(start, min(start + group, tokens)):
                e = int(ids[t][k])
                if e < experts and taken[e] < capacity:
                    taken[e] += 1
                    kept[t, k] = True
    return kept


def gshard(x, kernel, capacity, draws, threshold=0.5, mask=None):
    """GShard alg. 1 for one group `x [S, D]`: combine weights `[S, E]`.

    `draws [S]` are its `rnd`, and `threshold` 1/2 its factor of 2. A second choice
    that the draw left out takes no place, as the paper's text has it; the algorithm
    as printed counts one.
    """
    probabilities = softmax(np.asarray(x, "float64") @ np.asarray(kernel, "float64"))
    tokens, experts = probabilities.shape
    real = _real_tokens(mask, tokens)
    top = [sorted(range(experts), key=lambda e: (-p[e], e))[:2] for p in probabilities]
    combine = np.zeros((tokens, experts))
    taken = Counter()
    for choice in (0, 1):
        for t in real:
            gate = probabilities[t, top[t][choice]] / probabilities[t, top[t]].sum()
            if choice == 1 and not gate / threshold > draws[t]:
                continue
            if taken[top[t][choice]] < capacity:
                combine[t, top[t][choice]] = gate
            taken[top[t][choice]] += 1
    return combine


def feed_forward(x, up, down, gate=None, activation="silu"):
    """Shazeer 2020, eq. 6; without `gate` Vaswani et al. 2017, eq. 2, no biases."""
    act = ACTIVATIONS[activation]
    hidden = act(x @ up) if gate is None else act(x @ gate) * (x @ up)
    return hidden @ down


def mixture(x, weights, ids, gates, activation="silu"):
    """`y = sum_i G(x)_i E_i(x) (+ shared)`: Shazeer 2017 eq. 1, DeepSeekMoE eq. 9.

    `x [T, D]`; `weights` maps `up`, `down` and perhaps `gate` to the experts'
    `[E, ...]` and `shared_up`, ... to the shared matrices.
    """
    experts = len(weights["up"])
    y = np.zeros_like(x, "float64")
    for t in range(len(x)):
        for e, g in zip(ids[t], gates[t], strict=True):
            if e < experts:
                y[t] += g * feed_forward(
                    x[t],
                    weights["up"][e],
                    weights["down"][e],
                    weights["gate"][e] if "gate" in weights else None,
                    activation,
                )
    if "shared_up" in weights:
        y += feed_forward(
            x,
            weights["shared_up"],
            weights["shared_down"],
            weights.get("shared_gate"),
            activation,
        )
    return y
