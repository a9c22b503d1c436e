"""Routers: which experts take a token, and with what weight.

T  tokens               D  model features
E  experts              K  choices a token
x  [T, D] tokens        W  [D, E] router weights
h  = x W, logits        p  = scores of all experts, rows summing to 1
g  gates: the weights with which the chosen experts' outputs are summed
"""

from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_moe import checks
from keras_moe.layers.initializers import fresh
from keras_moe.ops import top_k as top_k_op

SCORES = ("softmax", "sigmoid")
GATES_FROM = ("all", "top_k")


class Routing(NamedTuple):
    """What a router decides, and what its losses need.

    Attributes:
        expert_ids: int32 tensor `[T, K]`. The experts of each token, best first.
            `E`, one past the last expert, means none: a padding token has it in
            every place, a token with fewer experts in some, and dispatch adds it
            where capacity is exceeded.
        gates: float32 tensor `[T, K]`, zero where `expert_ids` is `E`.
        probabilities: float32 tensor `[T, E]`: the scores of all experts,
            normalised to sum to one.
        logits: float32 tensor `[T, E]`, before the score function.
    """

    expert_ids: Any
    gates: Any
    probabilities: Any
    logits: Any


@keras.saving.register_keras_serializable(package="keras_moe")
class Router(keras.layers.Layer):
    """Base class: a router maps tokens to a `Routing`.

    Always computes in float32, whatever the dtype policy, as Switch Transformers
    do for stability
    ([Fedus et al., 2021](https://arxiv.org/abs/2101.03961), section 2.4).

    Args:
        num_experts: int, E.
        top_k: int, K, between 1 and `num_experts`.
        kernel_initializer: initializer of the `[D, E]` weights.
        **kwargs: `name`, `trainable`. `dtype` is accepted and ignored.

    Call arguments:
        inputs: float tensor `[T, D]`.
        mask: bool tensor `[T]`, False for padding, or None.
        training: bool.

    Returns:
        A `Routing`.

    Raises:
        ValueError: if `top_k` is not between 1 and `num_experts`.
    """

    def __init__(
        self,
        num_experts,
        top_k=1,
        kernel_initializer="glorot_uniform",
        **kwargs,
    ):
        kwargs.pop("dtype", None)
        super().__init__(dtype="float32", **kwargs)
        checks.at_least("num_experts", num_experts, 1)
        checks.top_k(top_k, num_experts)
        self.supports_masking = True
        self.num_experts = num_experts
        self.top_k = top_k
        self.kernel_initializer = keras.initializers.get(kernel_initializer)

    def build(self, input_shape):
        self.kernel = self.add_weight(
            name="kernel",
            shape=(input_shape[-1], self.num_experts),
            initializer=fresh(self.kernel_initializer),
        )

    def call(self, inputs, mask=None, training=None):
        raise NotImplementedError(f"{type(self).__name__} must implement `call()`.")

    def get_config(self):
        return {
            **super().get_config(),
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
        }


@keras.saving.register_keras_serializable(package="keras_moe")
class TopKRouter(Router):
    """Each token takes the K experts that score it highest.

    With `h = x W`, the scores are `s = softmax(h)` or `s = sigmoid(h)`, the
    choices `I = argtop_k(s)`, ties going to the lowest expert, and the gates

    - `g = s[I]` as they are: Switch
      ([Fedus et al., 2021](https://arxiv.org/abs/2101.03961), eq. 1-2) and
      DeepSeekMoE ([Dai et al., 2024](https://arxiv.org/abs/2401.06066), eq. 9-11);
    - `g = s[I] / sum(s[I])` with `normalize_gates`: GShard
      ([Lepikhin et al., 2020](https://arxiv.org/abs/2006.16668), algorithm 1);
      with sigmoid scores DeepSeek-V3
      ([2024](https://arxiv.org/abs/2412.19437), eq. 13-15);
    - `g = softmax(h[I])` with `gates_from="top_k"`: Mixtral
      ([Jiang et al., 2024](https://arxiv.org/abs/2401.04088), section 2.1),
      equal to normalised softmax gates.

    What is chosen may differ from what is weighed: a `selection_bias` `b` is added
    to the scores for the choice alone, and with `groups` the choice is limited to the
    `top_k_groups` groups that score highest
    ([DeepSeek-V2, 2024](https://arxiv.org/abs/2405.04434), section 2.2.2, where a
    group's score is its best expert's;
    [DeepSeek-V3, 2024](https://arxiv.org/abs/2412.19437), section 2.1.2, eq. 16,
    where it is the sum of its two best). Gates are multiplied by `gate_scale` at last.

    With a `second_choice_threshold` `t`, each choice after the first is left to
    chance in training: it stands with probability `min(1, g / t)`, `g` being its gate
    before `gate_scale`. One that does not stand is *none*, as if the token had not
    made it: it takes no capacity, counts in no load and is not counted as dropped.
    The other gates stay as they are, and no gradient passes through the draw. `t =
    0.5` is GShard's random second expert (algorithm 1, line 19: `2 g > rnd`). Outside
    training every choice stands: the paper leaves it open, and so a token's output
    does not depend on chance. Where the printed algorithm counts a place for a choice
    that was not made (line 22), this follows the paper's text (section 2.2, "conserve
    the overall expert capacity") and its authors' code, which free it.

    Args:
        num_experts: int, E.
        top_k: int, K, between 1 and `num_experts`.
        scores: `"softmax"` or `"sigmoid"`.
        normalize_gates: bool, or None for `top_k > 1`: the only gate of a top-1
            router, normalised, would be the constant 1 and teach it nothing.
        gates_from: `"all"` takes the gates from the scores of all experts,
            `"top_k"` applies the score function to the K chosen logits alone.
        jitter: float, at least 0 and below 1. In training the router sees the
            tokens times noise drawn from `uniform(1 - jitter, 1 + jitter)`
            (Switch, section 2.4). The experts see them unchanged.
        second_choice_threshold: float above 0, at most 1, or None: the gate from which
            on a second (third, ...) choice always stands in training. None keeps all;
            otherwise `top_k` must be 2 or more.
        seed: int or None, of the jitter and the draws.
        kernel_initializer: initializer of the `[D, E]` weights.
        selection_bias: bool: the weight `selection_bias` `[E]`, zero at first, which
            no gradient reaches; `balance` moves it.
        groups: int: consecutive experts form this many groups of equal size.
        top_k_groups: int, the groups a token may choose from.
        group_scores: `"max"` or `"top_2"`.
        gate_scale: float, positive.
        **kwargs: `name`, `trainable`.

    Call arguments:
        inputs: float tensor `[T, D]`.
        mask: bool tensor `[T]`, False for padding, or None.
        training: bool, whether jitter and `second_choice_threshold` apply.

    Returns:
        A `Routing`, in float32.

    Raises:
        ValueError: for settings outside the ranges above.

    Example:

    ```python
    router = keras_moe.layers.TopKRouter(num_experts=8, top_k=2)
    routing = router(keras.random.normal((16, 32)))
    routing.expert_ids.shape  # (16, 2)
    ```
    """

    def __init__(
        self,
        num_experts,
        top_k=2,
        scores="softmax",
        normalize_gates=None,
        gates_from="all",
        jitter=0.0,
        seed=None,
        kernel_initializer="glorot_uniform",
        selection_bias=False,
        groups=1,
        top_k_groups=1,
        group_scores="top_2",
        gate_scale=1.0,
        second_choice_threshold=None,
        **kwargs,
    ):
        super().__init__(
            num_experts, top_k, kernel_initializer=kernel_initializer, **kwargs
        )
        checks.positive("gate_scale", gate_scale)
        check_groups(num_experts, top_k, groups, top_k_groups, group_scores)
        self.has_selection_bias = selection_bias
        self.groups = groups
        self.top_k_groups = top_k_groups
        self.group_scores = group_scores
        self.gate_scale = gate_scale
        checks.one_of("scores", scores, SCORES)
        checks.one_of("gates_from", gates_from, GATES_FROM)
        checks.fraction("jitter", jitter)
        self.scores = scores
        self.normalize_gates = normalize_gates
        self.gates_from = gates_from
        check_second_choice(second_choice_threshold, top_k)
        self.jitter = jitter
        self.second_choice_threshold = second_choice_threshold
        self.seed = seed
        if jitter or second_choice_threshold is not None:
            self.seed_generator = keras.random.SeedGenerator(seed)

    def build(self, input_shape):
        super().build(input_shape)
        if self.has_selection_bias:
            self.selection_bias = self.add_weight(
                name="selection_bias",
                shape=(self.num_experts,),
                initializer="zeros",
                trainable=False,
            )

    def call(self, inputs, mask=None, training=None):
        if self.jitter and training:
            inputs = inputs * keras.random.uniform(
                ops.shape(inputs),
                1.0 - self.jitter,
                1.0 + self.jitter,
                dtype="float32",
                seed=self.seed_generator,
            )
        logits = ops.matmul(inputs, self.kernel)
        scores = self._score(logits)
        _, expert_ids = top_k_op(self._preferences(logits, scores), self.top_k)
        if self.gates_from == "all":
            gates = ops.take_along_axis(scores, expert_ids, axis=-1)
        else:
            gates = self._score(ops.take_along_axis(logits, expert_ids, axis=-1))
        if normalizes_gates(self.normalize_gates, self.top_k):
            gates = _normalize(gates)
        if self.second_choice_threshold is not None and training:
            stands = self._draw(gates)
            expert_ids = ops.where(stands, expert_ids, self.num_experts)
            gates = ops.where(stands, gates, 0.0)
        if self.gate_scale != 1.0:
            gates = gates * self.gate_scale
        probabilities = scores if self.scores == "softmax" else _normalize(scores)
        if mask is not None:
            mask = ops.cast(mask, "bool")[:, None]
            expert_ids = ops.where(mask, expert_ids, self.num_experts)
            gates = ops.where(mask, gates, 0.0)
        return Routing(expert_ids, gates, probabilities, logits)

    def _preferences(self, logits, scores):
        """What experts are chosen by, `[T, E]`."""
        if self.has_selection_bias:
            scores = scores + self.selection_bias
        elif self.groups == self.top_k_groups or self.group_scores == "max":
            # The same order as that of the scores, which may round to ties.
            scores = logits
        if self.groups == self.top_k_groups:
            return scores
        groups = ops.reshape(scores, (-1, self.groups, self.num_experts // self.groups))
        best, _ = top_k_op(groups, 1 if self.group_scores == "max" else 2)
        _, chosen = top_k_op(ops.sum(best, axis=-1), self.top_k_groups)
        allowed = ops.any(
            chosen[:, :, None] == ops.arange(self.groups, dtype=chosen.dtype), axis=1
        )
        groups = ops.where(allowed[:, :, None], groups, -np.inf)
        return ops.reshape(groups, (-1, self.num_experts))

    def _draw(self, gates):
        """Which choices stand, bool `[T, K]`: the first ones always."""
        first, later = gates[:, :1], gates[:, 1:]
        drawn = keras.random.uniform(
            ops.shape(later), dtype="float32", seed=self.seed_generator
        )
        stands = self.second_choice_threshold * drawn < later
        return ops.concatenate([ops.ones_like(first, dtype="bool"), stands], axis=1)

    def balance(self, load, rate):
        """Moves the selection bias against the load, by `rate` an expert.

        `b += rate * sign(mean(load) - load)`: balancing without a loss
        ([Wang et al., 2024](https://arxiv.org/abs/2408.15664), algorithm 1).

        Args:
            load: float tensor `[E]`, each expert's share of the choices.
            rate: float.
        """
        step = rate * ops.sign(ops.mean(load) - load)
        self.selection_bias.assign(self.selection_bias + step)

    def _score(self, logits):
        if self.scores == "softmax":
            return ops.softmax(logits, axis=-1)
        return ops.sigmoid(logits)

    def get_config(self):
        return {
            **super().get_config(),
            "scores": self.scores,
            "normalize_gates": self.normalize_gates,
            "gates_from": self.gates_from,
            "jitter": self.jitter,
            "seed": self.seed,
            "selection_bias": self.has_selection_bias,
            "groups": self.groups,
            "top_k_groups": self.top_k_groups,
            "group_scores": self.group_scores,
            "gate_scale": self.gate_scale,
            "second_choice_threshold": self.second_choice_threshold,
        }


def check_groups(num_experts, top_k, groups, top_k_groups, group_scores, name="groups"):
    """Refuses groups that do not hold `top_k` experts; `name` is that of `groups`."""
    checks.one_of("group_scores", group_scores, ("max", "top_2"))
    checks.at_least(name, groups, 1)
    checks.at_least("top_k_groups", top_k_groups, 1)
    checks.divides("num_experts", num_experts, name, groups)
    size = num_experts // groups
    if top_k_groups > groups or top_k > top_k_groups * size:
        raise ValueError(
            f"`top_k_groups` must be at most `{name}`, with `top_k` experts or more in "
            f"them. Received: top_k_groups={top_k_groups}, {name}={groups}, "
            f"top_k={top_k}, num_experts={num_experts}"
        )
    if groups > top_k_groups and group_scores == "top_2" and size < 2:
        raise ValueError(
            '`group_scores="top_2"` needs groups of 2 experts or more. '
            f"Received: {name}={groups}, num_experts={num_experts}"
        )


def check_second_choice(threshold, top_k):
    """Refuses a `second_choice_threshold` that is out of range, or without effect."""
    if threshold is None:
        return
    checks.positive("second_choice_threshold", threshold)
    if threshold > 1 or top_k < 2:
        raise ValueError(
            "`second_choice_threshold` must be at most 1, with a `top_k` of 2 or more. "
            f"Received: second_choice_threshold={threshold}, top_k={top_k}"
        )


def normalizes_gates(normalize_gates, top_k):
    """Whether gates are divided by their sum: unless it is said, those of several."""
    return top_k > 1 if normalize_gates is None else normalize_gates


def _normalize(scores):
    # Sigmoid scores can all underflow; a softmax's cannot.
    return scores / (ops.sum(scores, axis=-1, keepdims=True) + 1e-20)
