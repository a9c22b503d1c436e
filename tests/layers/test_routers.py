import keras
import numpy as np
import pytest
from keras import ops

from keras_moe.dispatch import limit_capacity
from keras_moe.layers import Router, Routing, TopKRouter
from tests.execution import (
    MODES,
    as_function,
    in_mode,
    numerical_gradients,
    with_gradients,
)
from tests.execution import numpy as to_numpy
from tests.references import mixture as reference

TOKENS, DIM, EXPERTS = 12, 6, 5
SETTINGS = [
    pytest.param(dict(top_k=1), id="switch"),
    pytest.param(dict(top_k=2), id="gshard"),
    pytest.param(dict(top_k=2, gates_from="top_k"), id="mixtral"),
    pytest.param(dict(top_k=3, normalize_gates=False), id="deepseek_moe"),
    pytest.param(dict(top_k=3, scores="sigmoid"), id="deepseek_v3"),
    pytest.param(dict(top_k=1, scores="sigmoid"), id="llama4"),
    pytest.param(dict(top_k=1, normalize_gates=True), id="constant_gate"),
    pytest.param(
        dict(top_k=2, scores="sigmoid", gates_from="top_k", normalize_gates=False),
        id="sigmoid_of_top_k",
    ),
    pytest.param(dict(top_k=EXPERTS), id="all_experts"),
    pytest.param(
        dict(top_k=EXPERTS, scores="sigmoid", normalize_gates=False), id="all_sigmoid"
    ),
]


def make(experts=EXPERTS, **settings):
    rng = np.random.default_rng(0)
    router = TopKRouter(experts, **settings)
    router.build((None, DIM))
    kernel = rng.normal(size=(DIM, experts)).astype("float32")
    router.kernel.assign(kernel)
    return router, rng.normal(size=(TOKENS, DIM)).astype("float32"), kernel


def expected_of(x, kernel, settings, mask=None):
    return reference.route(
        x,
        kernel,
        settings["top_k"],
        settings.get("scores", "softmax"),
        settings.get("normalize_gates"),
        settings.get("gates_from", "all"),
        mask,
    )


def check(routing, expected, atol=1e-6):
    for tensor in routing[1:]:
        assert keras.backend.standardize_dtype(tensor.dtype) == "float32"
    assert keras.backend.standardize_dtype(routing.expert_ids.dtype) == "int32"
    got = to_numpy(routing)
    np.testing.assert_array_equal(got.expert_ids, expected.ids)
    np.testing.assert_allclose(got.gates, expected.gates, atol=atol)
    np.testing.assert_allclose(got.probabilities, expected.probabilities, atol=atol)
    np.testing.assert_allclose(got.logits, expected.logits, atol=10 * atol)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_equals_the_papers(settings, masked):
    router, x, kernel = make(**settings)
    mask = np.arange(TOKENS) % 3 != 1 if masked else None
    check(router(x, mask=mask), expected_of(x, kernel, settings, mask))


GROUPED = {
    "deepseek_v2": dict(
        top_k=3,
        groups=4,
        top_k_groups=2,
        group_scores="max",
        normalize_gates=False,
        gate_scale=16.0,
    ),
    "deepseek_v3": dict(
        top_k=4,
        scores="sigmoid",
        groups=4,
        top_k_groups=2,
        gate_scale=2.5,
        selection_bias=True,
    ),
    "bias_alone": dict(top_k=2, scores="sigmoid", selection_bias=True),
    "biased_softmax": dict(top_k=2, selection_bias=True, normalize_gates=False),
    "one_group": dict(top_k=3, groups=2, top_k_groups=1),
}


@pytest.mark.parametrize("settings", GROUPED.values(), ids=GROUPED)
@pytest.mark.parametrize("mode", MODES)
def test_choice_within_groups_and_by_a_bias(settings, mode):
    router, x, kernel = make(experts=12, **settings)
    bias = None
    if router.has_selection_bias:
        bias = np.random.default_rng(3).normal(size=12).astype("float32")
        router.selection_bias.assign(bias)
    expected = reference.route(
        x,
        kernel,
        settings["top_k"],
        settings.get("scores", "softmax"),
        settings.get("normalize_gates"),
        bias=bias,
        groups=settings.get("groups", 1),
        top_k_groups=settings.get("top_k_groups", 1),
        group_scores=settings.get("group_scores", "top_2"),
        scale=settings.get("gate_scale", 1.0),
    )
    plain = reference.route(x, kernel, settings["top_k"])
    assert (expected.ids != plain.ids).any()  # the settings matter here
    check(in_mode(router, mode)(ops.convert_to_tensor(x)), expected, atol=1e-5)


def test_a_bias_moves_against_the_load():
    router, *_ = make(top_k=2, selection_bias=True)
    router.balance(ops.array([0.4, 0.1, 0.2, 0.2, 0.1]), rate=0.01)
    np.testing.assert_allclose(
        to_numpy(router.selection_bias.value), [-0.01, 0.01, 0, 0, 0.01], atol=1e-7
    )
    assert not router.selection_bias.trainable


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "settings",
    [
        dict(top_k=2),
        dict(top_k=3, scores="sigmoid"),
        dict(top_k=2, gates_from="top_k"),
        dict(top_k=1),
    ],
    ids=str,
)
def test_gradients_of_gates_and_probabilities(settings, mode):
    """Against differences of the float64 reference, whose choices do not move."""
    router, x, kernel = make(**settings)
    layer = as_function(router)

    def outputs(x, kernel):
        routing = layer(x, kernel)
        return ops.concatenate([routing.gates, routing.probabilities], axis=1)

    def expected(x, kernel):
        routing = expected_of(x, kernel, settings)
        return np.concatenate([routing.gates, routing.probabilities], axis=1)

    width = settings["top_k"] + EXPERTS
    cotangent = np.random.default_rng(1).normal(size=(TOKENS, width)).astype("f")
    got, gradients = with_gradients(outputs, (x, kernel), cotangent, mode)
    np.testing.assert_allclose(got, expected(x, kernel), atol=1e-6)
    differences = numerical_gradients(expected, (x, kernel), cotangent)
    for a, b in zip(gradients, differences, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_the_gate_of_a_top_1_router_teaches_it_by_default():
    router, x, kernel = make(top_k=1)
    layer = as_function(router)

    def gates(x, kernel):
        return layer(x, kernel).gates

    _, (_, gradient) = with_gradients(gates, (x, kernel), np.ones((TOKENS, 1), "f"))
    assert np.abs(gradient).max() > 1e-2


@pytest.mark.parametrize(
    "policy", ["bfloat16", "mixed_bfloat16", "float16", "mixed_float16"]
)
def test_computes_in_float32_under_any_policy(policy):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        router, x, kernel = make(top_k=2)
        assert router.kernel.dtype == "float32"
        x = keras.ops.cast(x, keras.config.dtype_policy().compute_dtype)
        routing = router(x)
    finally:
        keras.config.set_dtype_policy(before)
    x = ops.convert_to_numpy(ops.cast(x, "float32"))
    check(routing, expected_of(x, kernel, dict(top_k=2)))


def test_a_dtype_given_to_the_router_is_ignored():
    router = TopKRouter(4, dtype="bfloat16")
    assert router.dtype_policy.name == "float32"


def test_ties_go_to_the_lowest_expert():
    rng = np.random.default_rng(0)
    router, _, _ = make(top_k=3)
    # Small integers: the logits are exact, and many are equal.
    x = rng.integers(-1, 2, (TOKENS, DIM)).astype("float32")
    kernel = rng.integers(-1, 2, (DIM, EXPERTS)).astype("float32")
    router.kernel.assign(kernel)
    check(router(x), expected_of(x, kernel, dict(top_k=3)))
    zeros = to_numpy(router(np.zeros_like(x)))
    np.testing.assert_array_equal(zeros.expert_ids, [[0, 1, 2]] * TOKENS)


def test_scores_that_saturate_still_rank_by_logit():
    router, _, _ = make(top_k=2, scores="sigmoid")
    router.kernel.assign(np.eye(DIM, EXPERTS))
    x = np.zeros((2, DIM), "float32")
    x[0, :4] = [30, 60, 40, 50]  # the sigmoid of each is 1 in float32
    x[1, :5] = [-200, -300, -150, -250, -400]  # and 0 here
    routing = to_numpy(router(x))
    assert routing.expert_ids.tolist() == [[1, 3], [2, 0]]
    np.testing.assert_allclose(routing.gates[0], [0.5, 0.5])
    assert all(np.isfinite(part).all() for part in routing[1:])


def test_large_logits_stay_finite():
    router, x, kernel = make(top_k=2)
    routing = router(1e4 * x)
    check(routing, expected_of(1e4 * x, kernel, dict(top_k=2)), atol=1e-2)


def test_empty_input():
    router, x, _ = make(top_k=2)
    routing = router(x[:0])
    assert tuple(routing.expert_ids.shape) == (0, 2)
    assert tuple(routing.probabilities.shape) == (0, EXPERTS)


class TestJitter:
    def test_only_in_training(self):
        router, x, kernel = make(top_k=2, jitter=0.3)
        for training in (False, None):
            routing = router(x, training=training)
            check(routing, expected_of(x, kernel, dict(top_k=2)))

    def test_noise_lies_in_its_range_and_fills_it(self):
        router = TopKRouter(DIM, top_k=1, jitter=0.3, seed=1)
        router.build((None, DIM))
        router.kernel.assign(np.eye(DIM))  # logits are what the router saw
        x = np.random.default_rng(0).uniform(1, 2, (500, DIM)).astype("float32")
        noise = to_numpy(router(x, training=True).logits) / x
        assert 0.7 - 1e-5 <= noise.min() < 0.705
        assert 1.295 < noise.max() <= 1.3 + 1e-5
        assert abs(noise.mean() - 1) < 0.01
        # Drawn for each feature, and anew at each call.
        assert np.unique(noise.round(4)).size > 2000
        again = to_numpy(router(x, training=True).logits) / x
        assert np.abs(noise - again).mean() > 0.1

    def test_a_seed_repeats_it(self):
        noises = []
        for _ in range(2):
            router, x, _ = make(top_k=2, jitter=0.3, seed=7)
            noises.append(to_numpy(router(x, training=True).logits))
        np.testing.assert_array_equal(*noises)
        router, x, _ = make(top_k=2, jitter=0.3, seed=8)
        other = to_numpy(router(x, training=True).logits)
        assert np.abs(other - noises[0]).max() > 0.01


class TestSecondChoiceThreshold:
    """GShard's random second expert."""

    def draws(self, seed, top_k, mode="eager"):
        """What the router draws at its first call."""
        generator = keras.random.SeedGenerator(seed)

        def draw():  # TensorFlow's XLA has numbers of its own
            with keras.StatelessScope():
                return keras.random.uniform((TOKENS, top_k - 1), seed=generator)

        return to_numpy(in_mode(draw, mode)())

    def expected(self, x, kernel, settings, threshold, mask=None, mode="eager"):
        """A routing whose later choices stand where a draw is below `g / t`."""
        routing = expected_of(x, kernel, settings, mask)
        gates = routing.gates
        drawn = self.draws(3, settings["top_k"], mode)
        stands = np.c_[np.full(TOKENS, True), gates[:, 1:] / threshold > drawn]
        assert 0 < stands[:, 1:].mean() < 1
        return routing._replace(
            ids=np.where(stands, routing.ids, EXPERTS), gates=np.where(stands, gates, 0)
        )

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
    @pytest.mark.parametrize("threshold", [0.5, 0.8])
    def test_is_algorithm_1_of_gshard(self, threshold, masked, mode):
        """With the capacity of each group, as combine weights."""
        router, x, kernel = make(top_k=2, second_choice_threshold=threshold, seed=3)
        mask = np.arange(TOKENS) % 3 != 1 if masked else None
        group, capacity = 4, 1

        def limited(x):
            with keras.StatelessScope():  # the state of the seed stays as it is
                routing = router(x, mask=mask, training=True)
            return limit_capacity(routing, capacity, group, EXPERTS)

        routing = to_numpy(in_mode(limited, mode)(ops.convert_to_tensor(x)))
        chosen = np.eye(EXPERTS + 1)[routing.expert_ids][..., :EXPERTS]
        got = (routing.gates[..., None] * chosen).sum(axis=1)
        draws = self.draws(3, 2, mode)[:, 0]
        expected, other = (
            np.concatenate(
                [
                    reference.gshard(
                        x[i : i + group],
                        kernel,
                        capacity,
                        d[i : i + group],
                        threshold,
                        None if mask is None else mask[i : i + group],
                    )
                    for i in range(0, TOKENS, group)
                ]
            )
            for d in (draws, np.zeros(TOKENS))
        )
        np.testing.assert_allclose(got, expected, atol=1e-6)
        assert ((expected == 0) & (other > 0)).any()  # some were left out

    @pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
    @pytest.mark.parametrize(
        "settings, threshold",
        [
            (dict(top_k=2), 0.5),
            (dict(top_k=3), 0.3),
            (dict(top_k=2, normalize_gates=False), 0.5),
            (dict(top_k=2, scores="sigmoid"), 1.0),
        ],
        ids=str,
    )
    def test_leaves_out_later_choices(self, settings, threshold, masked):
        router, x, kernel = make(
            **settings, second_choice_threshold=threshold, seed=3, gate_scale=1.0
        )
        mask = np.arange(TOKENS) % 3 != 1 if masked else None
        expected = self.expected(x, kernel, settings, threshold, mask)
        check(router(x, mask=mask, training=True), expected)

    def test_gates_are_compared_before_they_are_scaled(self):
        settings = dict(top_k=2)
        router, x, kernel = make(
            **settings, second_choice_threshold=0.5, seed=3, gate_scale=4.0
        )
        expected = self.expected(x, kernel, settings, 0.5)
        check(router(x, training=True), expected._replace(gates=4 * expected.gates))

    def test_how_often_a_choice_stands(self):
        """`min(1, g / t)` of many draws, within five standard deviations."""
        gates = np.array([0.6, 0.28, 0.12])
        router = TopKRouter(3, top_k=3, second_choice_threshold=0.25, seed=1)
        router.build((None, 3))
        router.kernel.assign(np.diag(np.log(gates)))
        count = 4000
        first, second = (
            to_numpy(router(np.ones((count, 3), "float32"), training=True).gates) > 0
            for _ in range(2)
        )
        share, p = first.mean(axis=0), gates[2] / 0.25
        assert share[0] == share[1] == 1
        assert abs(share[2] - p) < 5 * np.sqrt(p * (1 - p) / count)
        # Anew at each call: two draws agree as often as independent ones do.
        agree, q = (first[:, 2] == second[:, 2]).mean(), p**2 + (1 - p) ** 2
        assert abs(agree - q) < 5 * np.sqrt(q * (1 - q) / count)

    @pytest.mark.parametrize("training", [False, None])
    def test_every_choice_stands_outside_training(self, training):
        router, x, kernel = make(top_k=3, second_choice_threshold=1.0)
        routing = router(x, training=training)
        check(routing, expected_of(x, kernel, dict(top_k=3)))

    @pytest.mark.parametrize("mode", MODES)
    def test_gradients(self, mode):
        """The gates that stand teach as if all did; the draw teaches nothing."""
        settings = dict(top_k=3)
        router, x, kernel = make(**settings, second_choice_threshold=0.5, seed=3)
        layer = as_function(router, training=True)

        def gates(x, kernel):
            return layer(x, kernel).gates

        stands = self.expected(x, kernel, settings, 0.5, mode=mode).ids < EXPERTS

        def expected(x, kernel):
            return np.where(stands, expected_of(x, kernel, settings).gates, 0)

        cotangent = np.random.default_rng(1).normal(size=(TOKENS, 3)).astype("f")
        got, gradients = with_gradients(gates, (x, kernel), cotangent, mode)
        np.testing.assert_allclose(got, expected(x, kernel), atol=1e-6)
        differences = numerical_gradients(expected, (x, kernel), cotangent)
        for a, b in zip(gradients, differences, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)

    def test_jitter_and_draws_from_one_seed(self):
        first, second = (
            to_numpy(router(x, training=True))
            for router, x, _ in (
                make(top_k=2, jitter=0.2, second_choice_threshold=0.5, seed=7)
                for _ in range(2)
            )
        )
        for a, b in zip(first, second, strict=True):
            np.testing.assert_array_equal(a, b)


class TestTransformers:
    """The routers of published implementations, with the same weights."""

    def published(self, config, router, x, kernel):
        import torch

        with torch.no_grad():
            router.weight.copy_(torch.tensor(kernel.T))
            logits, gates, ids = router(torch.tensor(x))
        return logits.numpy(), gates.numpy(), ids.numpy()

    def compare(self, routing, published):
        logits, gates, ids = published
        routing = to_numpy(routing)
        np.testing.assert_array_equal(routing.expert_ids, ids)
        np.testing.assert_allclose(routing.gates, gates, atol=1e-6)

    @pytest.mark.parametrize("gates_from", ["all", "top_k"])
    def test_mixtral(self, gates_from):
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

        config = MixtralConfig(
            hidden_size=DIM, num_local_experts=EXPERTS, num_experts_per_tok=2
        )
        router, x, kernel = make(top_k=2, gates_from=gates_from)
        theirs = self.published(config, MixtralTopKRouter(config), x, kernel)
        self.compare(router(x), theirs)

    @pytest.mark.parametrize("normalize", [False, True])
    def test_qwen2_moe(self, normalize):
        from transformers import Qwen2MoeConfig
        from transformers.models.qwen2_moe.modeling_qwen2_moe import (
            Qwen2MoeTopKRouter,
        )

        config = Qwen2MoeConfig(
            hidden_size=DIM,
            num_experts=EXPERTS,
            num_experts_per_tok=3,
            norm_topk_prob=normalize,
        )
        router, x, kernel = make(top_k=3, normalize_gates=normalize)
        theirs = self.published(config, Qwen2MoeTopKRouter(config), x, kernel)
        self.compare(router(x), theirs)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(num_experts=0), "`num_experts` must be.*Received: num_experts=0"),
        (dict(num_experts=2.0), "`num_experts` must be.*Received: num_experts=2.0"),
        (dict(top_k=0), r"`top_k` must be.*\(4\).*Received: top_k=0"),
        (dict(top_k=5), r"`top_k` must be.*\(4\).*Received: top_k=5"),
        (dict(top_k=True), "`top_k` must be.*Received: top_k=True"),
        (dict(scores="relu"), "`scores` must be.*'sigmoid'.*scores='relu'"),
        (dict(gates_from="some"), "`gates_from` must be.*gates_from='some'"),
        (dict(jitter=1.0), "`jitter` must be.*Received: jitter=1.0"),
        (dict(jitter=-0.1), "`jitter` must be.*Received: jitter=-0.1"),
        (dict(jitter=float("nan")), "`jitter` must be.*Received: jitter=nan"),
        (dict(second_choice_threshold=0), "`second_choice_threshold`.*positive.*=0"),
        (dict(second_choice_threshold=1.5), "must be at most 1.*threshold=1.5, top_k"),
        (dict(second_choice_threshold="random"), "`second_choice_thr.*='random'"),
        (dict(second_choice_threshold=0.5, top_k=1), "`top_k` of 2.*0.5, top_k=1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        TopKRouter(**{"num_experts": 4, "top_k": 2, **arguments})


def test_config_round_trip():
    router = TopKRouter(
        5,
        top_k=3,
        scores="sigmoid",
        normalize_gates=False,
        gates_from="top_k",
        jitter=0.1,
        second_choice_threshold=0.4,
        seed=3,
        kernel_initializer="he_normal",
        name="mine",
    )
    config = keras.saving.serialize_keras_object(router)
    copy = keras.saving.deserialize_keras_object(config)
    assert copy.get_config() == router.get_config()
    assert copy.name == "mine" and copy.gates_from == "top_k" and copy.seed == 3
    assert isinstance(copy.kernel_initializer, keras.initializers.HeNormal)


def test_a_router_must_say_how_it_routes():
    with pytest.raises(NotImplementedError, match="Router must implement `call"):
        Router(4)(np.ones((2, 3), "float32"))


def test_one_initializer_gives_two_routers_different_weights():
    initializer = keras.initializers.RandomNormal()
    kernels = []
    for _ in range(2):
        router = TopKRouter(4, kernel_initializer=initializer)
        router.build((None, DIM))
        kernels.append(ops.convert_to_numpy(router.kernel))
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-3


def test_symbolic_call():
    routing = TopKRouter(4, top_k=2)(keras.Input((DIM,)))
    assert isinstance(routing, Routing)
    assert [tuple(t.shape) for t in routing] == [
        (None, 2),
        (None, 2),
        (None, 4),
        (None, 4),
    ]
