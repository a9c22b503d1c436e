import keras
import numpy as np
import pytest
from keras import ops

from keras_moe.layers import MixtureOfExperts, Routing, routing_statistics
from tests.execution import MODES, numerical_gradients, with_gradients
from tests.execution import numpy as to_numpy
from tests.references import mixture as reference

TOKENS, EXPERTS, TOP_K = 14, 5, 2
MASKS = {
    "": None,
    "masked": np.arange(TOKENS) % 4 != 2,
    "all_but_one": np.arange(TOKENS) == 3,
}


def route(mask=None, scores="softmax", seed=0, top_k=TOP_K):
    """A random float64 routing, and it as tensors."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.normal(size=(TOKENS, EXPERTS)).astype("float32")
    expected = reference.route(logits, np.eye(EXPERTS), top_k, scores, mask=mask)
    return expected, as_tensors(expected)


def as_tensors(expected):
    return Routing(
        ops.convert_to_tensor(expected.ids, "int32"),
        *(
            ops.convert_to_tensor(part, "float32")
            for part in (expected.gates, expected.probabilities, expected.logits)
        ),
    )


def statistics_of(routing, mask=None, limited=None):
    return routing_statistics.collect(routing, limited or routing, EXPERTS, mask)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_sums(mask, scores):
    expected, routing = route(mask, scores)
    got = to_numpy(statistics_of(routing, mask))
    real = np.arange(TOKENS) if mask is None else np.flatnonzero(mask)
    assert got.tokens == len(real)
    counts = np.bincount(expected.ids[real].ravel(), minlength=EXPERTS)
    np.testing.assert_array_equal(got.assignments, counts)
    first = np.bincount(expected.ids[real, 0], minlength=EXPERTS)
    np.testing.assert_array_equal(got.first_choices, first)
    sums = expected.probabilities[real].sum(axis=0)
    np.testing.assert_allclose(got.probabilities, sums, atol=1e-5)
    np.testing.assert_allclose(
        got.squared_log_partition,
        reference.z_loss(expected, mask) * len(real),
        rtol=1e-5,
    )
    assert got.dropped == 0


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("choices", ["all", "first"])
@pytest.mark.parametrize("scores, top_k", [("softmax", 1), ("sigmoid", 3)])
def test_balance_loss_is_that_of_switch_and_deepseek(mask, choices, scores, top_k):
    expected, routing = route(mask, scores, top_k=top_k)
    got = routing_statistics.balance_loss(statistics_of(routing, mask), choices)
    np.testing.assert_allclose(
        float(got), reference.switch_loss(expected, mask, choices), rtol=1e-5
    )


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_first_choices_give_gshards_loss_times_experts_squared(mask):
    expected, routing = route(mask)
    got = routing_statistics.balance_loss(statistics_of(routing, mask), "first")
    np.testing.assert_allclose(
        float(got), EXPERTS**2 * reference.gshard_loss(expected, mask), rtol=1e-5
    )


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_z_loss_is_that_of_st_moe(mask):
    expected, routing = route(mask)
    got = routing_statistics.z_loss(statistics_of(routing, mask))
    np.testing.assert_allclose(float(got), reference.z_loss(expected, mask), rtol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_balance_loss_is_transformers_divided_by_top_k(masked):
    """Theirs sums over the K choices what this one averages."""
    import torch
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    mask = MASKS["masked"] if masked else None
    expected, routing = route(mask)
    theirs = load_balancing_loss_func(
        (torch.tensor(expected.logits, dtype=torch.float32),),
        EXPERTS,
        TOP_K,
        attention_mask=None if mask is None else torch.tensor(mask[None]),
    )
    got = routing_statistics.balance_loss(statistics_of(routing, mask))
    np.testing.assert_allclose(float(got), float(theirs) / TOP_K, rtol=1e-5)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_losses_are_those_of_transformers_switch(mask):
    """Theirs of one group, which the tokens that are no padding make up."""
    import torch
    from transformers.models.switch_transformers import modeling_switch_transformers

    expected, routing = route(mask, top_k=1)
    real = slice(None) if mask is None else np.asarray(mask, bool)
    logits = torch.tensor(expected.logits[real])[None]
    statistics = statistics_of(routing, mask)
    theirs = modeling_switch_transformers.load_balancing_loss_func(
        torch.softmax(logits, -1), logits.argmax(-1)
    )
    got = routing_statistics.balance_loss(statistics)
    np.testing.assert_allclose(float(got), float(theirs), rtol=1e-5)
    theirs = modeling_switch_transformers.router_z_loss_func(logits)
    got = routing_statistics.z_loss(statistics)
    np.testing.assert_allclose(float(got), float(theirs), rtol=1e-5)


def test_balance_loss_runs_from_one_to_the_number_of_experts():
    def loss(ids, probabilities):
        routing = reference.Routing(
            np.array(ids), np.ones_like(ids, float), np.array(probabilities), None
        )
        routing = routing._replace(logits=np.log(routing.scores + 1e-9))
        return float(
            routing_statistics.balance_loss(statistics_of(as_tensors(routing)))
        )

    even = loss([[e] for e in range(EXPERTS)], np.full((EXPERTS, EXPERTS), 0.2))
    np.testing.assert_allclose(even, 1, rtol=1e-6)
    collapsed = loss([[0]] * 4, np.eye(EXPERTS)[[0] * 4])
    np.testing.assert_allclose(collapsed, EXPERTS, rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_flow_through_mean_scores_alone(masked, mode):
    mask = MASKS["masked"] if masked else None
    routed, tensors = route(mask)

    def losses(logits):
        routing = tensors._replace(logits=logits, probabilities=ops.softmax(logits))
        statistics = statistics_of(routing, mask)
        return ops.stack(
            [
                routing_statistics.balance_loss(statistics),
                routing_statistics.z_loss(statistics),
            ]
        )

    def expected(logits):
        # The ids, and f with them, stay those of the first routing.
        moved = routed._replace(logits=logits, scores=reference.softmax(logits))
        return np.array(
            [reference.switch_loss(moved, mask), reference.z_loss(moved, mask)]
        )

    logits = routed.logits.astype("float32")
    got, gradients = with_gradients(losses, (logits,), np.array([1.0, 0.3], "f"), mode)
    np.testing.assert_allclose(got, expected(logits), rtol=1e-5)
    differences = numerical_gradients(expected, (logits,), np.array([1.0, 0.3]))
    np.testing.assert_allclose(gradients[0], differences[0], atol=1e-6)
    if masked:
        assert not gradients[0][~mask].any()


def test_load_and_dropped_fraction():
    expected, routing = route(MASKS["masked"])
    limited = routing._replace(
        expert_ids=ops.where(routing.expert_ids == 2, EXPERTS, routing.expert_ids)
    )
    statistics = statistics_of(routing, MASKS["masked"], limited)
    shares = reference.expert_shares(expected.ids, EXPERTS, MASKS["masked"])
    load = to_numpy(routing_statistics.expert_load(statistics))
    np.testing.assert_allclose(load, shares, atol=1e-6)
    np.testing.assert_allclose(load.sum(), 1, atol=1e-6)
    dropped = float(routing_statistics.dropped_fraction(statistics))
    np.testing.assert_allclose(dropped, shares[2], atol=1e-6)


def test_nothing_but_padding():
    mask = np.zeros(TOKENS, bool)
    _, routing = route(mask)
    statistics = statistics_of(routing, mask)
    assert float(routing_statistics.balance_loss(statistics)) == 0
    assert float(routing_statistics.z_loss(statistics)) == 0
    assert float(routing_statistics.dropped_fraction(statistics)) == 0
    assert not to_numpy(routing_statistics.expert_load(statistics)).any()


def test_sums_of_two_batches_add():
    _, routing = route()
    parts = []
    for rows in (slice(0, 5), slice(5, None)):
        part = Routing(*(tensor[rows] for tensor in routing))
        parts.append(statistics_of(part))
    together = keras.tree.map_structure(lambda a, b: a + b, *parts)
    whole = statistics_of(routing)
    for choices in ("all", "first"):
        np.testing.assert_allclose(
            float(routing_statistics.balance_loss(together, choices)),
            float(routing_statistics.balance_loss(whole, choices)),
            rtol=1e-5,
        )


def test_a_functional_model_tells_the_statistics_apart():
    inputs = keras.Input((6, 4))
    layer = MixtureOfExperts(3, 8, top_k=2, dispatch="capacity", capacity=1)
    model = keras.Model(inputs, layer(inputs, return_statistics=True))
    x = np.random.default_rng(0).normal(size=(2, 6, 4)).astype("float32")
    _, from_model = model(x)
    _, direct = layer(x, return_statistics=True)
    for a, b in zip(to_numpy(from_model), to_numpy(direct), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert to_numpy(direct).dropped == 24 - 3
