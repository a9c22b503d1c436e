"""A mixture of experts, in the place of a feed-forward block.

B  batch        S  sequence length      T  tokens, all leading axes flattened
D  features     E  experts              K  choices a token
C  capacity, choices an expert accepts of a group of G tokens
"""

import keras
from keras import ops

from keras_moe import checks
from keras_moe.dispatch import (
    combine,
    expert_capacity,
    limit_capacity,
    sort_by_expert,
)
from keras_moe.layers import routing_statistics, spreading
from keras_moe.layers.experts import Experts
from keras_moe.layers.feed_forward import FeedForward
from keras_moe.layers.initializers import fresh
from keras_moe.layers.routers import (
    GATES_FROM,
    SCORES,
    Router,
    TopKRouter,
    check_groups,
    check_second_choice,
)
from keras_moe.ops import sum_over_replicas

ROUTERS = {"top_k": TopKRouter}
DISPATCHES = ("dropless", "capacity")
CAPACITY_GROUPS = ("batch", "sequence")
_ROUTER_DEFAULTS = {
    "scores": "softmax",
    "normalize_gates": None,
    "gates_from": "all",
    "router_jitter": 0.0,
    "selection_bias": False,
    "expert_groups": 1,
    "top_k_groups": 1,
    "group_scores": "top_2",
    "gate_scale": 1.0,
    "second_choice_threshold": None,
    "seed": None,
}


@keras.saving.register_keras_serializable(package="keras_moe")
class MixtureOfExperts(keras.layers.Layer):
    """A sparsely-gated mixture of feed-forward experts.

    `y = sum over the chosen experts i of g[i] * expert_i(x)  (+ shared(x))`
    ([Shazeer et al., 2017](https://arxiv.org/abs/1701.06538), eq. 1), where a
    router gives each token its K experts and gates `g`. A drop-in for a
    feed-forward block: the shape stays, any number of leading axes is accepted,
    and only the chosen experts are computed, so the cost follows `top_k` and not
    `num_experts`. `num_shared_experts` adds experts that every token passes
    through, computed as one feed-forward network of their joint width, which is
    their sum (DeepSeekMoE, [Dai et al., 2024](https://arxiv.org/abs/2401.06066),
    section 3.2).

    **Dispatch.** `"dropless"` computes every choice exactly. `"capacity"` lets an
    expert take at most C choices of each group of G tokens: in each group first
    choices are placed before second choices, in sequence order, and what exceeds
    C is dropped, so that a token with no expert left passes on the residual
    connection around this layer alone. Whether a token is dropped depends on the
    others in its group. With `top_k > 1` capacity is therefore not causal even
    within a sequence: a later token's first choice goes before an earlier token's
    second. Cached generation, where the blocks of this package take each sequence
    for a group, then differs from a full forward pass, and padding counts towards
    G, though not towards the load. Use `"dropless"` where that
    matters.

    **Losses.** In training `balance_loss` and `z_loss` times their coefficients
    are added to the model's losses, one pair a layer; models sum them over
    layers.

    **Load.** After a training step `expert_load` `[E]` holds the share of the
    choices that fell on each expert and `dropped_fraction` the share that was
    dropped. They are variables, neither saved nor counted as weights. On any call
    `return_statistics=True` returns the sums they are made of instead and changes
    no state and adds no loss, as a layer needs inside a recurrent cell or
    `keras.remat`.

    Args:
        num_experts: int, E.
        intermediate_dim: int, the hidden width of one expert.
        top_k: int, K, between 1 and `num_experts`.
        router: `"top_k"` or a `Router` instance, which then must agree on
            `num_experts` and `top_k`; the router settings below belong to the
            name and must be left at their defaults with an instance.
        activation: a Keras activation, by name or callable.
        gated: bool, gated experts (see `Experts`).
        num_shared_experts: int, experts of the same width that every token takes.
        dispatch: `"dropless"` or `"capacity"`.
        capacity_factor: float, positive: in training
            `C = ceil(capacity_factor * K * G / E)`. Required by
            `dispatch="capacity"` unless `capacity` is given.
        eval_capacity_factor: float, positive: the same outside training. Defaults
            to `capacity_factor`.
        capacity: int, at least 1: C itself, in place of the factors.
        capacity_group: what a group is: `"batch"` (all tokens of a call),
            `"sequence"` (the tokens along the axis before the features) or an
            int, that many consecutive tokens; the last group of a call may be
            shorter and has the same C.
        balance_loss: float, coefficient of the balance loss, 1 at an even load
            (see `routing_statistics.balance_loss`).
        z_loss: float, coefficient of the router z-loss.
        balance_choices: `"all"` or `"first"`: which choices the balance loss
            counts (GShard counts the first).
        scores: see `TopKRouter`.
        normalize_gates: see `TopKRouter`.
        gates_from: see `TopKRouter`.
        router_jitter: see `TopKRouter`'s `jitter`.
        kernel_initializer: initializer of experts, shared experts and router.
        shared_expert_dim: int or None: the hidden width of the shared experts
            together; None for `num_shared_experts * intermediate_dim`.
        shared_expert_gate: bool: what the shared experts give is multiplied by
            `sigmoid(x w)`, `w` a weight `[D]` (Qwen1.5-MoE).
        selection_bias: see `TopKRouter`, as for `top_k_groups`, `group_scores`,
            `gate_scale`, `second_choice_threshold`, and `expert_groups`, its
            `groups`.
        bias_update_rate: float: in training, how far the selection bias moves at
            each step (see `TopKRouter.balance`).
        expert_dropout: float in `[0, 1)`, of the hidden features of experts and
            shared experts (see `Experts`).
        route_padding: bool: padding is routed as any token is, and so takes
            experts and capacity and counts in losses and load, as in Transformers'
            Switch.
        seed: int or None, of what the router draws.
        **kwargs: `name`, `trainable`, `dtype`. The router computes in float32
            whatever the policy.

    Call arguments:
        inputs: float tensor `[..., D]`.
        mask: bool tensor of the shape of `inputs` without its last axis, False
            for padding, or None. Padding takes no expert (its output is that of
            the shared experts, or zero), no capacity, and no part in the losses
            and the load.
        training: bool.
        return_statistics: bool.
        per_sequence: bool: the groups of a capacity are the sequences, whatever
            `capacity_group` is, so that no sequence depends on the others of its
            batch, as in generation. A sequence shorter than a `capacity_group` of
            that many tokens has the same C.

    Returns:
        A tensor of the shape of `inputs`; with `return_statistics=True` also the
        `RoutingStatistics` of the call.

    Raises:
        ValueError: for settings outside the ranges above, and for a mask whose
            shape does not fit.

    Example:

    ```python
    inputs = keras.Input((None, 64))
    x = keras_moe.layers.MixtureOfExperts(8, 128, top_k=2)(inputs)
    model = keras.Model(inputs, x)
    ```
    """

    def __init__(
        self,
        num_experts,
        intermediate_dim,
        top_k=2,
        router="top_k",
        activation="silu",
        gated=True,
        num_shared_experts=0,
        dispatch="dropless",
        capacity_factor=None,
        balance_loss=0.0,
        z_loss=0.0,
        *,
        eval_capacity_factor=None,
        capacity=None,
        capacity_group="batch",
        balance_choices="all",
        scores="softmax",
        normalize_gates=None,
        gates_from="all",
        router_jitter=0.0,
        selection_bias=False,
        expert_groups=1,
        top_k_groups=1,
        group_scores="top_2",
        gate_scale=1.0,
        second_choice_threshold=None,
        bias_update_rate=0.0,
        shared_expert_dim=None,
        shared_expert_gate=False,
        expert_dropout=0.0,
        route_padding=False,
        kernel_initializer="glorot_uniform",
        seed=None,
        **kwargs,
    ):
        settings = dict(locals())
        super().__init__(**kwargs)
        checks.at_least("intermediate_dim", intermediate_dim, 1)
        check_mixture(settings)
        self.supports_masking = True
        self.num_experts = num_experts
        self.intermediate_dim = intermediate_dim
        self.top_k = top_k
        self.activation = checks.activation("activation", activation)
        self.dispatch = dispatch
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor
        self.capacity = capacity
        self.capacity_group = capacity_group
        self.gated = gated
        self.num_shared_experts = num_shared_experts
        self.shared_expert_dim = shared_expert_dim
        self.has_shared_expert_gate = shared_expert_gate
        self.bias_update_rate = bias_update_rate
        self.expert_dropout = expert_dropout
        self.route_padding = route_padding
        self.balance_loss = balance_loss
        self.z_loss = z_loss
        self.balance_choices = balance_choices
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self._router_settings = {
            "scores": scores,
            "normalize_gates": normalize_gates,
            "gates_from": gates_from,
            "router_jitter": router_jitter,
            "selection_bias": selection_bias,
            "expert_groups": expert_groups,
            "top_k_groups": top_k_groups,
            "group_scores": group_scores,
            "gate_scale": gate_scale,
            "second_choice_threshold": second_choice_threshold,
            "seed": seed,
        }
        self._router_name = router if isinstance(router, str) else None
        self.router = self._make_router(router)
        if bias_update_rate and not getattr(self.router, "has_selection_bias", False):
            raise ValueError(_NEEDS_BIAS.format(bias_update_rate))
        self.experts = Experts(
            num_experts,
            intermediate_dim,
            activation=activation,
            gated=gated,
            kernel_initializer=kernel_initializer,
            dropout=expert_dropout,
            dtype=self.dtype_policy,
            name="experts",
        )
        if num_shared_experts:
            self.shared_experts = FeedForward(
                shared_expert_dim or num_shared_experts * intermediate_dim,
                activation=activation,
                gated=gated,
                # Not the seeds of the experts, which count from the first on.
                kernel_initializer=fresh(self.kernel_initializer, 3),
                dropout=expert_dropout,
                dtype=self.dtype_policy,
                name="shared_experts",
            )
        if shared_expert_gate:
            self.shared_expert_gate = keras.layers.Dense(
                1,
                activation="sigmoid",
                use_bias=False,
                kernel_initializer=fresh(self.kernel_initializer, 7),
                dtype=self.dtype_policy,
                name="shared_expert_gate",
            )
        self._load = None

    def _make_router(self, router):
        settings = self._router_settings
        if isinstance(router, Router):
            if (router.num_experts, router.top_k) != (self.num_experts, self.top_k):
                raise ValueError(
                    "`router` must have the layer's `num_experts` and `top_k`, "
                    f"{self.num_experts} and {self.top_k}. Received: a router with "
                    f"num_experts={router.num_experts}, top_k={router.top_k}"
                )
            for name, value in settings.items():
                if value != _ROUTER_DEFAULTS[name]:
                    raise ValueError(
                        f"`{name}` belongs to the router: give it to the instance "
                        f"and not to the layer. Received: {name}={value!r}"
                    )
            return router
        if not isinstance(router, str):
            raise ValueError(
                "`router` must be a name or a `keras_moe.layers.Router`. "
                f"Received: router={router!r}"
            )
        checks.one_of("router", router, ROUTERS)
        return ROUTERS[router](
            self.num_experts,
            self.top_k,
            scores=settings["scores"],
            normalize_gates=settings["normalize_gates"],
            gates_from=settings["gates_from"],
            jitter=settings["router_jitter"],
            selection_bias=settings["selection_bias"],
            groups=settings["expert_groups"],
            top_k_groups=settings["top_k_groups"],
            group_scores=settings["group_scores"],
            gate_scale=settings["gate_scale"],
            second_choice_threshold=settings["second_choice_threshold"],
            seed=settings["seed"],
            kernel_initializer=fresh(self.kernel_initializer, 6),
            name="router",
        )

    def build(self, input_shape):
        dim = input_shape[-1]
        if not self.router.built:  # a given router may have been used before
            self.router.build((None, dim))
        self.experts.build((None, dim))
        if self.num_shared_experts:
            self.shared_experts.build(input_shape)
        if self.has_shared_expert_gate:
            self.shared_expert_gate.build((None, dim))
        self._load = _Load(self.num_experts)  # here, so that its names are this layer's

    @property
    def variables(self):
        # Like random seeds: state that training updates, but not weights.
        return super().variables + (self._load.variables if self._load else [])

    @property
    def expert_load(self):
        """`[E]` variable: each expert's share of the last training step's choices."""
        return self._load.share

    @property
    def dropped_fraction(self):
        """Scalar variable: the share of them dropped for want of capacity."""
        return self._load.dropped

    def call(
        self,
        inputs,
        mask=None,
        training=None,
        return_statistics=False,
        per_sequence=False,
    ):
        outputs, statistics = self.mix(
            inputs, mask, training, training or return_statistics, per_sequence
        )
        if return_statistics:
            return outputs, statistics
        if training:
            self.record(statistics)
        return outputs

    def mix(
        self,
        inputs,
        mask=None,
        training=None,
        with_statistics=True,
        per_sequence=False,
    ):
        """The mixture as a pure function: no loss added, no state but a seed.

        Args:
            inputs: float tensor `[..., D]`.
            mask: bool tensor `[...]` or None.
            training: bool.
            with_statistics: bool; if False the second result is None.
            per_sequence: bool, as for a call.

        Returns:
            `(outputs, statistics)`.
        """
        shape = ops.shape(inputs)
        tokens = ops.reshape(inputs, (-1, shape[-1]))
        if mask is not None:
            mask = None if self.route_padding else self._flat_mask(mask, inputs)
        how = spreading.Pass(shape, training, with_statistics, per_sequence)
        outputs, statistics = spreading.run(self, tokens, mask, how)
        if self.num_shared_experts:
            shared = self.shared_experts(tokens, training=training)
            if self.has_shared_expert_gate:
                shared = self.shared_expert_gate(tokens) * shared
            outputs = outputs + shared
        return ops.reshape(outputs, shape), statistics

    def route_and_compute(self, compute, tokens, mask, how):
        """Routes tokens and lets their experts compute them.

        Args:
            compute: callable `(rows, group_sizes) -> rows`, the experts.
            tokens: float tensor `[T, D]`.
            mask: bool tensor `[T]` or None.
            how: a `spreading.Pass`, of these tokens.

        Returns:
            The outputs `[T, D]` without shared experts, and the statistics or None.
        """
        routing = limited = self.router(tokens, mask=mask, training=how.training)
        if self.dispatch == "capacity":
            group_size, capacity = self.group_and_capacity(how)
            limited = limit_capacity(routing, capacity, group_size, self.num_experts)
        order = sort_by_expert(limited.expert_ids, self.num_experts)
        rows = ops.take(tokens, order.tokens, axis=0)
        outputs = combine(compute(rows, order.group_sizes), order, limited.gates)
        statistics = None
        if how.with_statistics:
            statistics = routing_statistics.collect(
                routing, limited, self.num_experts, mask
            )
        return outputs, statistics

    def _flat_mask(self, mask, inputs):
        mask = ops.convert_to_tensor(mask, "bool")
        expected = tuple(inputs.shape[:-1])
        fits = len(mask.shape) == len(expected) and all(
            None in pair or pair[0] == pair[1]
            for pair in zip(mask.shape, expected, strict=True)
        )
        if not fits:
            raise ValueError(
                "`mask` must have the shape of `inputs` without its last axis, "
                f"{expected}. Received: mask.shape={tuple(mask.shape)}"
            )
        return ops.reshape(mask, (-1,))

    def group_and_capacity(self, how):
        """G and C in a `spreading.Pass`."""
        shape, training, per_sequence = how.shape, how.training, how.per_sequence
        if self.capacity_group == "sequence" or per_sequence:
            if len(shape) < 3:
                raise ValueError(
                    '`capacity_group="sequence"` and `per_sequence=True` need inputs '
                    "of rank 3 or more, [..., S, D]. Received: "
                    f"inputs.shape={tuple(shape)}"
                )
            group_size = shape[-2]
        elif self.capacity_group == "batch":
            group_size = 1
            for size in shape[:-1]:
                group_size = group_size * size
        else:
            group_size = self.capacity_group
        if isinstance(group_size, int):
            group_size = max(group_size, 1)  # an empty batch has no group
        if self.capacity is not None:
            return group_size, self.capacity
        factor = self.capacity_factor
        if not training and self.eval_capacity_factor is not None:
            factor = self.eval_capacity_factor
        counted = group_size
        if per_sequence and not isinstance(self.capacity_group, str):
            counted = self.capacity_group
            if not isinstance(group_size, int):
                counted = ops.maximum(group_size, counted)
            else:
                counted = max(group_size, counted)
        return group_size, expert_capacity(
            factor, counted, self.num_experts, self.top_k
        )

    def record(self, statistics):
        """Adds the losses of a training step and notes its load.

        Args:
            statistics: the `RoutingStatistics` of one call of `mix`, or the sum
                of several. Those of the replicas of data-parallel training are
                summed here (see `keras_moe.ops.sum_over_replicas`), so that losses
                and load are those of the whole batch.
        """
        statistics = routing_statistics.RoutingStatistics(
            *sum_over_replicas(statistics)
        )
        if self.balance_loss:
            self.add_loss(
                self.balance_loss
                * routing_statistics.balance_loss(statistics, self.balance_choices)
            )
        if self.z_loss:
            self.add_loss(self.z_loss * routing_statistics.z_loss(statistics))
        load = routing_statistics.expert_load(statistics)
        if self.bias_update_rate:
            self.router.balance(load, self.bias_update_rate)
        self._load.share.assign(load)
        self._load.dropped.assign(routing_statistics.dropped_fraction(statistics))

    def compute_output_shape(self, input_shape):
        return input_shape

    def compute_output_spec(
        self,
        inputs,
        mask=None,
        training=None,
        return_statistics=False,
        per_sequence=False,
    ):
        outputs = keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)
        if return_statistics:
            return outputs, routing_statistics.spec(self.num_experts)
        return outputs

    def get_config(self):
        router = self._router_name
        if router is None:
            router = keras.saving.serialize_keras_object(self.router)
        return {
            **super().get_config(),
            "num_experts": self.num_experts,
            "intermediate_dim": self.intermediate_dim,
            "top_k": self.top_k,
            "router": router,
            "activation": keras.activations.serialize(self.activation),
            "gated": self.gated,
            "num_shared_experts": self.num_shared_experts,
            "dispatch": self.dispatch,
            "capacity_factor": self.capacity_factor,
            "balance_loss": self.balance_loss,
            "z_loss": self.z_loss,
            "eval_capacity_factor": self.eval_capacity_factor,
            "capacity": self.capacity,
            "capacity_group": self.capacity_group,
            "balance_choices": self.balance_choices,
            "shared_expert_dim": self.shared_expert_dim,
            "shared_expert_gate": self.has_shared_expert_gate,
            "bias_update_rate": self.bias_update_rate,
            "expert_dropout": self.expert_dropout,
            "route_padding": self.route_padding,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            **self._router_settings,
        }

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        if isinstance(config.get("router"), dict):
            config["router"] = keras.saving.deserialize_keras_object(config["router"])
        return cls(**config)


class _Load:
    """The load of the last training step; plain, so Keras does not count it."""

    def __init__(self, num_experts):
        self.share = self._zeros((num_experts,), "expert_load")
        self.dropped = self._zeros((), "dropped_fraction")

    @staticmethod
    def _zeros(shape, name):
        return keras.Variable(
            "zeros", shape=shape, dtype="float32", trainable=False, name=name
        )

    @property
    def variables(self):
        return [self.share, self.dropped]


def check_mixture(s):
    """Refuses settings that do not fit a mixture or each other.

    Args:
        s: dict, by the names of the arguments of `MixtureOfExperts`; those of its
            router count where `router` is a name. `intermediate_dim` is not asked.
    """
    checks.at_least("num_experts", s["num_experts"], 1)
    checks.top_k(s["top_k"], s["num_experts"])
    checks.shared_experts(
        s["num_shared_experts"], s["shared_expert_dim"], s["shared_expert_gate"]
    )
    checks.activation("activation", s["activation"])
    checks.one_of("balance_choices", s["balance_choices"], ("all", "first"))
    for name in ("balance_loss", "z_loss", "bias_update_rate"):
        checks.not_negative(name, s[name])
    for name in ("router_jitter", "expert_dropout"):
        checks.fraction(name, s[name])
    _check_capacity(s)
    if not isinstance(s["router"], str):
        return
    checks.one_of("router", s["router"], ROUTERS)
    checks.one_of("scores", s["scores"], SCORES)
    checks.one_of("gates_from", s["gates_from"], GATES_FROM)
    checks.positive("gate_scale", s["gate_scale"])
    check_groups(
        s["num_experts"],
        s["top_k"],
        s["expert_groups"],
        s["top_k_groups"],
        s["group_scores"],
        name="expert_groups",
    )
    check_second_choice(s["second_choice_threshold"], s["top_k"])
    if s["bias_update_rate"] and not s["selection_bias"]:
        raise ValueError(_NEEDS_BIAS.format(s["bias_update_rate"]))


_NEEDS_BIAS = (
    "`bias_update_rate` needs a router with `selection_bias=True`. Received: "
    "bias_update_rate={}"
)


def _check_capacity(s):
    checks.one_of("dispatch", s["dispatch"], DISPATCHES)
    factor, capacity = s["capacity_factor"], s["capacity"]
    eval_factor, group = s["eval_capacity_factor"], s["capacity_group"]
    if s["dispatch"] == "dropless":
        for name in ("capacity_factor", "eval_capacity_factor", "capacity"):
            if s[name] is not None:
                raise ValueError(
                    f'`{name}` needs `dispatch="capacity"`. Received: '
                    f'dispatch="dropless", {name}={s[name]!r}'
                )
    elif (factor is None) == (capacity is None):
        raise ValueError(
            '`dispatch="capacity"` needs either `capacity_factor` or `capacity`. '
            f"Received: capacity_factor={factor!r}, capacity={capacity!r}"
        )
    if capacity is not None:
        checks.at_least("capacity", capacity, 1)
        if eval_factor is not None:
            raise ValueError(
                "`eval_capacity_factor` must be None with a `capacity`, which holds "
                "outside training, too. Received: "
                f"eval_capacity_factor={eval_factor!r}, capacity={capacity!r}"
            )
    for name in ("capacity_factor", "eval_capacity_factor"):
        if s[name] is not None:
            checks.positive(name, s[name])
    if group not in CAPACITY_GROUPS:
        if isinstance(group, str):
            checks.one_of("capacity_group", group, (*CAPACITY_GROUPS, "an integer"))
        checks.at_least("capacity_group", group, 1)
