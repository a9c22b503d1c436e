import json

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe.layers import (
    FeedForward,
    MixtureOfExperts,
    Router,
    Routing,
    TopKRouter,
)
from tests.execution import (
    COMPILED,
    MODES,
    as_function,
    differentiated,
    numerical_gradients,
    program,
    with_gradients,
)
from tests.execution import numpy as to_numpy
from tests.layers.mixtures import DIM, EXPERTS, HIDDEN, make, reference_of, weights_of
from tests.references import mixture as reference

SHAPE = (2, 6, DIM)
CAPACITY = dict(dispatch="capacity", capacity_factor=1.0)
CONFIGURATIONS = {
    "switch": dict(top_k=1, gated=False, activation="relu", **CAPACITY),
    "gshard": dict(
        top_k=2, gated=False, activation="gelu", capacity_group="sequence", **CAPACITY
    ),
    "mixtral": dict(top_k=2, gates_from="top_k"),
    "deepseek_moe": dict(top_k=3, normalize_gates=False, num_shared_experts=2),
    "deepseek_v3": dict(top_k=3, scores="sigmoid", num_shared_experts=1),
    "all_experts": dict(top_k=EXPERTS, activation="tanh"),
    "fixed_capacity": dict(
        top_k=2,
        num_shared_experts=1,
        gated=False,
        dispatch="capacity",
        capacity=2,
        capacity_group=5,
    ),
}
MASK = np.array([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]], bool)


def check(layer, x, mode, training=False, mask=None, unknown_axes=0):
    """Outputs and all gradients against the float64 reference and its differences."""
    inputs = (x, *weights_of(layer))
    expected = reference_of(layer, training, mask)
    cotangent = np.random.default_rng(1).normal(size=x.shape).astype("float32")
    got, gradients = with_gradients(
        as_function(layer, training=training, mask=mask),
        inputs,
        cotangent,
        mode,
        unknown_axes,
    )
    np.testing.assert_allclose(got, expected(*inputs), atol=2e-5)
    differences = numerical_gradients(expected, inputs, cotangent)
    for a, b in zip(gradients, differences, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("settings", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_outputs_and_gradients(settings):
    layer, x = make(SHAPE, **settings)
    check(layer, x, COMPILED)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["deepseek_v3", "fixed_capacity"])
def test_outputs_and_gradients_with_padding(name, mode):
    layer, x = make(SHAPE, **CONFIGURATIONS[name])
    check(layer, x, mode, training=True, mask=MASK)


@pytest.mark.parametrize("mode", [m for m in MODES if m != "eager"] or MODES)
@pytest.mark.parametrize("name", ["gshard", "switch", "mixtral"])
def test_sizes_unknown_to_the_compiler(name, mode):
    layer, x = make(SHAPE, **CONFIGURATIONS[name])
    check(layer, x, mode, unknown_axes=2)


@pytest.mark.parametrize("mode", MODES)
def test_one_program_serves_all_tokens(mode):
    layer, x = make(SHAPE, **CONFIGURATIONS["gshard"])
    weights = [ops.convert_to_tensor(w) for w in weights_of(layer)]
    function = differentiated(as_function(layer, training=True, mask=MASK))
    programs = {
        program(function, mode, [ops.convert_to_tensor(inputs), *weights], dy)
        for inputs in (x, x[::-1].copy(), 0 * x)
        for dy in [ops.ones(SHAPE)]
    }
    assert len(programs) == 1


@pytest.mark.parametrize("name", ["deepseek_moe", "fixed_capacity"])
@pytest.mark.parametrize("shape", [(12, DIM), (3, 1, 4, DIM), (DIM,)], ids=str)
def test_any_number_of_leading_axes(shape, name):
    layer, x = make(shape, **CONFIGURATIONS[name])
    y = to_numpy(layer(x))
    expected = reference_of(layer)(x, *weights_of(layer))
    assert y.shape == shape
    np.testing.assert_allclose(y, expected, atol=2e-5)


def test_sequence_groups_follow_the_axis_before_the_features():
    layer, x = make(
        (2, 2, 3, DIM), top_k=2, capacity_group="sequence", **CAPACITY, seed=3
    )
    y = to_numpy(layer(x))
    for index in np.ndindex(2, 2):
        alone = to_numpy(layer(x[index][None]))[0]
        np.testing.assert_allclose(y[index], alone, atol=1e-5)


class TestMask:
    def test_padding_gets_nothing_from_the_routed_experts(self):
        layer, x = make(SHAPE)
        y = to_numpy(layer(x, mask=MASK))
        assert not y[~MASK].any()
        np.testing.assert_allclose(y[MASK], to_numpy(layer(x))[MASK], atol=1e-5)

    def test_padding_passes_through_the_shared_experts(self):
        layer, x = make(SHAPE, num_shared_experts=1)
        y = to_numpy(layer(x, mask=MASK))
        shared = to_numpy(layer.shared_experts(x))
        np.testing.assert_allclose(y[~MASK], shared[~MASK], atol=1e-5)

    def test_padding_takes_no_capacity(self):
        # One place an expert: had padding a place, a token would lose its own.
        layer, x = make(SHAPE, top_k=1, dispatch="capacity", capacity=1)
        x[...] = x[0, 1]
        mask = np.zeros((2, 6), bool)
        mask[1, 2:4] = True
        y = to_numpy(layer(x, mask=mask))
        expected = to_numpy(layer(x[:1, :1]))[0, 0]
        np.testing.assert_allclose(y[1, 2], expected, atol=1e-5)
        assert not np.delete(y.reshape(12, DIM), 8, axis=0).any()

    def test_padding_counts_in_no_loss_and_no_load(self):
        layer, x = make(SHAPE, top_k=2, balance_loss=0.3, z_loss=0.2)
        layer(x, mask=MASK, training=True)
        masked = [float(loss) for loss in layer.losses]
        load = to_numpy(layer.expert_load.value)
        layer(x[MASK][None], training=True)
        np.testing.assert_allclose(masked, [float(v) for v in layer.losses], rtol=1e-5)
        np.testing.assert_allclose(load, to_numpy(layer.expert_load.value), rtol=1e-5)
        layer(x, training=True)
        assert abs(masked[0] - float(layer.losses[0])) > 1e-4

    @pytest.mark.parametrize("dtype", ["bool", "int32", "float32"])
    def test_dtypes(self, dtype):
        layer, x = make(SHAPE)
        y = to_numpy(layer(x, mask=MASK.astype(dtype)))
        np.testing.assert_allclose(y, to_numpy(layer(x, mask=MASK)), atol=1e-6)

    @pytest.mark.parametrize("shape", [(2, 5), (6,), (2, 6, 1), (12,)])
    def test_a_shape_that_does_not_fit(self, shape):
        layer, x = make(SHAPE)
        with pytest.raises(ValueError, match="`mask` must have the shape of `inputs`"):
            layer(x, mask=np.ones(shape, bool))

    def test_keras_passes_it_on_from_an_embedding(self):
        embedding = keras.layers.Embedding(9, DIM, mask_zero=True)
        layer, _ = make(SHAPE, seed=3)
        ids = np.array([[3, 4, 0, 0, 0, 0], [1, 2, 3, 8, 7, 0]])
        inputs = keras.Input((6,), dtype="int32")
        x = layer(embedding(inputs))
        model = keras.Model(inputs, [x, keras.layers.GlobalAveragePooling1D()(x)])
        y, mean = to_numpy(model(ids))
        embedded = to_numpy(embedding(ids)).astype("float32")
        direct = to_numpy(layer(embedded, mask=ids != 0))
        np.testing.assert_allclose(y, direct, atol=1e-5)
        # The mask goes on to the next layer.
        sums, counts = direct.sum(axis=1), (ids != 0).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(mean, sums / counts, atol=1e-5)


class TestCapacity:
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("eval_factor", [None, 3.0])
    def test_training_and_evaluation_have_their_own_factor(self, training, eval_factor):
        layer, x = make(
            SHAPE,
            top_k=2,
            dispatch="capacity",
            capacity_factor=0.5,
            eval_capacity_factor=eval_factor,
        )
        y = to_numpy(layer(x, training=training))
        weights = weights_of(layer)
        expected = reference_of(layer, training)(x, *weights)
        np.testing.assert_allclose(y, expected, atol=2e-5)
        other = reference_of(layer, not training)(x, *weights)
        assert (np.abs(expected - other).max() > 1e-2) == (eval_factor is not None)

    @pytest.mark.parametrize("group", ["batch", "sequence", 5])
    def test_with_room_for_all_it_equals_dropless(self, group):
        dropless, x = make(SHAPE)
        limited, _ = make(
            SHAPE, dispatch="capacity", capacity_factor=50.0, capacity_group=group
        )
        y = to_numpy(limited(x, training=True))
        np.testing.assert_array_equal(y, to_numpy(dropless(x, training=True)))
        assert float(limited.dropped_fraction) == 0

    @pytest.mark.parametrize("group", ["batch", "sequence", 5])
    def test_dropped_fraction(self, group):
        layer, x = make(
            SHAPE,
            top_k=2,
            dispatch="capacity",
            capacity_factor=0.5,
            capacity_group=group,
        )
        layer(x, mask=MASK, training=True)
        expected = reference_of(layer, True, MASK).statistics(x, *weights_of(layer))[1]
        assert 0 < expected < 1
        np.testing.assert_allclose(float(layer.dropped_fraction), expected, rtol=1e-6)

    @pytest.mark.parametrize(
        "group, capacity", [("batch", 3), ("sequence", 3), (4, 3), (20, 8)]
    )
    def test_sequences_for_themselves(self, group, capacity):
        """`per_sequence=True` counts C in each, and of no fewer tokens than a group."""
        shape = (3, 6, DIM)
        settings = dict(top_k=2, dispatch="capacity")
        layer, x = make(shape, capacity_factor=1.0, capacity_group=group, **settings)
        alone, _ = make(shape, capacity=capacity, capacity_group="sequence", **settings)
        found = to_numpy(layer(x, per_sequence=True))
        expected = reference_of(alone)(x, *weights_of(layer))
        np.testing.assert_allclose(found, expected, atol=2e-5)
        for row, wanted in zip(x, found, strict=True):
            single = to_numpy(layer(row[None], per_sequence=True))[0]
            np.testing.assert_allclose(single, wanted, atol=1e-6)
        # A token alone, as one that is generated, is never dropped.
        dropless, _ = make(shape, top_k=2)
        one = to_numpy(layer(x[:, :1], per_sequence=True))
        np.testing.assert_allclose(one, to_numpy(dropless(x[:, :1])), atol=1e-6)

    def test_sequence_groups_need_a_sequence(self):
        layer, x = make((6, DIM), capacity_group="sequence", **CAPACITY)
        with pytest.raises(ValueError, match=r"rank 3 or more.*inputs.shape=\(6, 4\)"):
            layer(x)


class TestLossesAndLoad:
    SETTINGS = dict(top_k=2, balance_loss=0.3, z_loss=0.2)

    def expected(self, layer, x, choices="all"):
        routing, _ = reference_of(layer).statistics(x, *weights_of(layer))
        balance = 0.3 * reference.switch_loss(routing, choices=choices)
        return [balance, 0.2 * reference.z_loss(routing)], routing

    @pytest.mark.parametrize("choices", ["all", "first"])
    def test_values(self, choices):
        layer, x = make(SHAPE, balance_choices=choices, **self.SETTINGS)
        layer(x, training=True)
        expected, routing = self.expected(layer, x, choices)
        losses = [float(loss) for loss in layer.losses]
        np.testing.assert_allclose(losses, expected, rtol=1e-5)
        load = to_numpy(layer.expert_load.value)
        shares = reference.expert_shares(routing.ids, EXPERTS)
        np.testing.assert_allclose(load, shares, atol=1e-6)
        assert float(layer.dropped_fraction) == 0

    def test_only_in_training(self):
        layer, x = make(SHAPE, **self.SETTINGS)
        for training in (None, False):
            layer(x, training=training)
            assert not layer.losses
        assert not to_numpy(layer.expert_load.value).any()

    def test_only_those_asked_for(self):
        for settings, count in (
            ({}, 0),
            ({"z_loss": 0.1}, 1),
            ({"balance_loss": 1}, 1),
        ):
            layer, x = make(SHAPE, **settings)
            layer(x, training=True)
            assert len(layer.losses) == count

    @pytest.mark.parametrize("training", [True, False])
    def test_statistics_on_request_change_nothing(self, training):
        layer, x = make(SHAPE, **self.SETTINGS, router_jitter=0.0)
        before = [to_numpy(v.value) for v in layer.variables]
        y, statistics = layer(x, training=training, return_statistics=True)
        assert not layer.losses
        for variable, value in zip(layer.variables, before, strict=True):
            np.testing.assert_array_equal(to_numpy(variable.value), value)
        _, routing = self.expected(layer, x)
        counts = np.bincount(routing.ids.ravel(), minlength=EXPERTS)
        np.testing.assert_array_equal(to_numpy(statistics.assignments), counts)
        np.testing.assert_allclose(to_numpy(y), to_numpy(layer(x)), atol=1e-6)

    def test_recording_sums_of_calls(self):
        layer, x = make(SHAPE, **self.SETTINGS)
        parts = [layer(part, return_statistics=True)[1] for part in (x[:1], x[1:])]
        layer.record(keras.tree.map_structure(lambda a, b: a + b, *parts))
        expected, _ = self.expected(layer, x)
        losses = [float(loss) for loss in layer.losses]
        np.testing.assert_allclose(losses, expected, rtol=1e-5)

    def test_load_is_no_weight(self):
        layer, _ = make(SHAPE)
        names = [v.name for v in layer.weights]
        assert names == ["kernel", "gate_kernel", "up_kernel", "down_kernel"]
        assert not layer.non_trainable_weights
        for state in (layer.expert_load, layer.dropped_fraction):
            assert any(variable is state for variable in layer.variables)

    @pytest.mark.parametrize("jit_compile", [True, False])
    def test_fit(self, jit_compile):
        if keras.config.backend() == "torch":
            jit_compile = False  # it has no compiled training step here
        layer, x = make(SHAPE, **self.SETTINGS, **CAPACITY)
        weights = weights_of(layer)
        inputs = keras.Input((None, DIM))
        model = keras.Model(inputs, layer(inputs))
        model.compile("sgd", "mse", jit_compile=jit_compile)
        target = np.zeros_like(x)
        (expected, routing), y = self.expected(layer, x), reference_of(layer, True)
        outputs, dropped = y(x, *weights), y.statistics(x, *weights)[1]
        history = model.fit(x, target, batch_size=2, verbose=0).history
        np.testing.assert_allclose(
            history["loss"][0], np.mean(outputs**2) + sum(expected), rtol=1e-4
        )
        shares = reference.expert_shares(routing.ids, EXPERTS)
        load = to_numpy(layer.expert_load.value)
        np.testing.assert_allclose(load, shares, atol=1e-6)
        np.testing.assert_allclose(float(layer.dropped_fraction), dropped, atol=1e-6)
        for before, after in zip(weights, weights_of(layer), strict=True):
            assert np.abs(before - after).max() > 1e-6
        # Neither evaluation nor prediction, of other sizes, touches the load.
        model.evaluate(x[:1], target[:1], verbose=0)
        y = model.predict(x[:1, :4], verbose=0)
        np.testing.assert_array_equal(to_numpy(layer.expert_load.value), load)
        expected = reference_of(layer)(x[:1, :4], *weights_of(layer))
        np.testing.assert_allclose(y, expected, atol=2e-5)


@keras.saving.register_keras_serializable(package="tests")
class EveryThird(Router):
    """Routes by position; its one weight is a gate."""

    def __init__(self, num_experts, offset=0, **kwargs):
        super().__init__(num_experts, **kwargs)
        self.offset = offset

    def build(self, input_shape):
        self.gate = self.add_weight(name="gate", shape=(), initializer="ones")

    def call(self, inputs, mask=None, training=None):
        token = ops.arange(ops.shape(inputs)[0], dtype="int32")[:, None]
        ids = (3 * token + self.offset) % self.num_experts
        logits = ops.zeros((ops.shape(inputs)[0], self.num_experts))
        gates = ops.ones_like(logits[:, :1]) * self.gate
        return Routing(ids, gates, ops.softmax(logits), logits)

    def get_config(self):
        return {**super().get_config(), "offset": self.offset}


class TestRouterInstance:
    def test_is_used(self):
        router = EveryThird(EXPERTS, offset=1)
        layer, x = make((6, DIM), router=router, top_k=1)
        router.gate.assign(0.5)
        y = to_numpy(layer(x))
        names = {"up": "up_kernel", "down": "down_kernel", "gate": "gate_kernel"}
        weights = {
            k: to_numpy(getattr(layer.experts, v).value) for k, v in names.items()
        }
        ids = (3 * np.arange(6)[:, None] + 1) % EXPERTS
        expected = reference.mixture(x, weights, ids, np.full((6, 1), 0.5))
        np.testing.assert_allclose(y, expected, atol=1e-5)

    def test_used_before_keeps_its_weights_and_may_be_shared(self):
        router = TopKRouter(EXPERTS, 2)
        x = np.random.default_rng(0).normal(size=SHAPE).astype("float32")
        before = to_numpy(router(x.reshape(-1, DIM)).logits)
        layers = [MixtureOfExperts(EXPERTS, 3, router=router) for _ in range(2)]
        for layer in layers:
            layer(x)
            assert layer.router is router
        after = to_numpy(router(x.reshape(-1, DIM)).logits)
        np.testing.assert_array_equal(before, after)

    @pytest.mark.parametrize(
        "router",
        [lambda: TopKRouter(4, 2), lambda: TopKRouter(EXPERTS, 1)],
        ids=["experts", "top_k"],
    )
    def test_must_agree_with_the_layer(self, router):
        with pytest.raises(
            ValueError, match="`router` must have.*5 and 2.*num_experts"
        ):
            MixtureOfExperts(EXPERTS, 3, router=router())

    @pytest.mark.parametrize(
        "setting",
        [
            dict(scores="sigmoid"),
            dict(normalize_gates=False),
            dict(gates_from="top_k"),
            dict(router_jitter=0.1),
            dict(second_choice_threshold=0.5),
            dict(seed=3),
        ],
        ids=str,
    )
    def test_takes_no_settings_from_the_layer(self, setting):
        ((name, value),) = setting.items()
        with pytest.raises(ValueError, match=f"`{name}` belongs.*{name}={value!r}"):
            MixtureOfExperts(EXPERTS, 3, router=TopKRouter(EXPERTS), **setting)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(num_experts=0), "`num_experts`.*at least 1.*num_experts=0"),
        (dict(num_experts="8"), "`num_experts`.*num_experts='8'"),
        (dict(intermediate_dim=0), "`intermediate_dim`.*intermediate_dim=0"),
        (dict(intermediate_dim=1.5), "`intermediate_dim`.*intermediate_dim=1.5"),
        (dict(top_k=0), r"`top_k`.*\(4\).*top_k=0"),
        (dict(top_k=5), r"`top_k`.*\(4\).*top_k=5"),
        (dict(num_shared_experts=-1), "`num_shared_experts`.*num_shared_experts=-1"),
        (dict(activation="swoosh"), "`activation`.*activation='swoosh'"),
        (dict(balance_loss=-0.1), "`balance_loss`.*balance_loss=-0.1"),
        (dict(z_loss=float("inf")), "`z_loss`.*z_loss=inf"),
        (dict(z_loss="0.1"), "`z_loss`.*z_loss='0.1'"),
        (dict(balance_choices="second"), "`balance_choices`.*'first'.*'second'"),
        (dict(dispatch="drop"), "`dispatch`.*'dropless'.*dispatch='drop'"),
        (dict(dispatch="capacity"), "`capacity_factor` or `capacity`.*=None.*=None"),
        (dict(**CAPACITY, capacity=2), "`capacity_factor` or `capacity`.*=1.0.*=2"),
        (dict(capacity_factor=1.0), "`capacity_factor` needs.*capacity_factor=1.0"),
        (dict(eval_capacity_factor=2.0), "`eval_capacity_factor` needs.*=2.0"),
        (dict(capacity=3), "`capacity` needs.*capacity=3"),
        (dict(dispatch="capacity", capacity=0), "`capacity`.*at least 1.*capacity=0"),
        (
            dict(dispatch="capacity", capacity_factor=0.0),
            "`capacity_factor`.*positive.*capacity_factor=0.0",
        ),
        (
            dict(**CAPACITY, eval_capacity_factor=-1),
            "`eval_capacity_factor`.*positive.*eval_capacity_factor=-1",
        ),
        (dict(**CAPACITY, capacity_group="token"), "`capacity_group`.*'token'"),
        (dict(**CAPACITY, capacity_group=0), "`capacity_group`.*capacity_group=0"),
        (dict(**CAPACITY, capacity_group=True), "`capacity_group`.*True"),
        (dict(router="bottom_k"), "`router`.*'top_k'.*router='bottom_k'"),
        (dict(router=3), "`router` must be a name or a.*router=3"),
        (dict(scores="relu"), "`scores`.*scores='relu'"),
        (dict(gates_from="none"), "`gates_from`.*gates_from='none'"),
        (dict(router_jitter=1.5), "`router_jitter`.*router_jitter=1.5"),
        (dict(second_choice_threshold=2), "`second_choice_threshold` must.*=2, top_k"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        MixtureOfExperts(**{"num_experts": 4, "intermediate_dim": 8, **arguments})


FULL = dict(
    top_k=3,
    activation="gelu",
    gated=False,
    num_shared_experts=1,
    dispatch="capacity",
    capacity_factor=1.25,
    balance_loss=0.1,
    z_loss=0.2,
    eval_capacity_factor=2.0,
    capacity_group=3,
    balance_choices="first",
    scores="sigmoid",
    normalize_gates=False,
    gates_from="top_k",
    router_jitter=0.1,
    second_choice_threshold=0.3,
    kernel_initializer="he_normal",
    seed=3,
    name="mine",
)


class TestSaving:
    def test_config_holds_every_setting(self):
        layer = MixtureOfExperts(EXPERTS, 3, **FULL)
        config = json.loads(json.dumps(keras.saving.serialize_keras_object(layer)))
        copy = keras.saving.deserialize_keras_object(config)
        assert copy.get_config() == layer.get_config()
        for name, value in FULL.items():
            if name not in ("activation", "kernel_initializer"):
                assert copy.get_config()[name] == value
        assert copy.activation is keras.activations.gelu
        assert isinstance(copy.kernel_initializer, keras.initializers.HeNormal)
        assert copy.router.jitter == 0.1 and copy.router.seed == 3
        assert isinstance(copy.shared_experts, FeedForward)

    @pytest.mark.parametrize("custom", [False, True], ids=["named", "instance"])
    def test_keras_file(self, custom, tmp_path):
        settings = {**FULL, "name": None}
        if custom:
            settings = dict(router=EveryThird(EXPERTS, offset=2), top_k=1)
        layer, x = make(SHAPE, **settings)
        inputs = keras.Input((None, DIM))
        model = keras.Model(inputs, layer(inputs))
        layer(x, training=True)  # the load is state, but not saved
        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        np.testing.assert_array_equal(to_numpy(loaded(x)), to_numpy(model(x)))
        copy = loaded.layers[-1]
        assert type(copy.router) is type(layer.router)
        assert copy.router.get_config() == layer.router.get_config()
        model.save_weights(tmp_path / "model.weights.h5")
        loaded.load_weights(tmp_path / "model.weights.h5")


@pytest.mark.parametrize("settings", [{}, CAPACITY], ids=["dropless", "capacity"])
@pytest.mark.parametrize("shape", [(0, 6, DIM), (2, 0, DIM), (0, DIM)], ids=str)
def test_empty_batches(shape, settings):
    layer, x = make(shape, num_shared_experts=1, balance_loss=0.1, **settings)
    assert tuple(layer(x, training=True).shape) == shape
    assert [float(loss) for loss in layer.losses] == [0.0]
    dy, weights = np.zeros(shape, "float32"), weights_of(layer)
    _, gradients = with_gradients(
        as_function(layer), (x, *weights), dy, COMPILED, unknown_axes=len(shape) - 1
    )
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize(
    "policy", ["mixed_bfloat16", "bfloat16", "mixed_float16", "float16"]
)
def test_dtype_policies(policy):
    layer, x = make(
        SHAPE, scale=0.4, dtype=policy, top_k=2, num_shared_experts=1, **CAPACITY
    )
    compute = layer.compute_dtype
    x = ops.convert_to_numpy(ops.cast(ops.cast(x, compute), "float32"))
    y = layer(ops.cast(x, compute))
    assert keras.backend.standardize_dtype(y.dtype) == compute
    assert layer.router.kernel.dtype == "float32"
    assert layer.experts.up_kernel.dtype == layer.variable_dtype
    weights = weights_of(layer)
    expected = reference_of(layer)
    error = {"bfloat16": 0.02, "float16": 0.0025}[compute]

    def check(got, expected):
        np.testing.assert_allclose(got, expected, atol=error * np.abs(expected).max())

    check(to_numpy(y), expected(x, *weights))
    cotangent = np.random.default_rng(1).normal(size=SHAPE).astype("float32")
    variables = [
        ops.cast(w, v.dtype)
        for w, v in zip(weights, layer.trainable_variables, strict=True)
    ]
    _, gradients = with_gradients(
        as_function(layer, training=True), (x, *variables), cotangent, COMPILED
    )
    differences = numerical_gradients(expected, (x, *weights), cotangent)
    for a, b in zip(gradients, differences, strict=True):
        check(a, b)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "bfloat16"])
def test_fit_in_half_precision(policy):
    layer, x = make(SHAPE, dtype=policy, balance_loss=0.1, scale=0.4)
    before = weights_of(layer)
    inputs = keras.Input(SHAPE[1:])
    model = keras.Model(inputs, layer(inputs))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    losses = model.fit(x, 0 * x, epochs=3, verbose=0).history["loss"]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    for a, b in zip(before, weights_of(layer), strict=True):
        assert np.abs(a - b).max() > 1e-4


class TestInsideOtherLayers:
    def test_time_distributed(self):
        layer, x = make(SHAPE, capacity_group="batch", **CAPACITY)
        steps = keras.layers.TimeDistributed(layer)
        y = to_numpy(steps(x))
        for t in range(SHAPE[1]):
            np.testing.assert_allclose(y[:, t], to_numpy(layer(x[:, t])), atol=1e-5)

    def test_time_distributed_in_training(self):
        layer, x = make(SHAPE)
        inputs = keras.Input(SHAPE[1:])
        outputs = keras.layers.TimeDistributed(layer)(inputs)
        model = keras.Model(inputs, outputs)
        model.compile("sgd", "mse")
        before = weights_of(layer)
        model.fit(x, 0 * x, verbose=0)
        assert all(
            np.abs(a - b).max() > 1e-6
            for a, b in zip(before, weights_of(layer), strict=True)
        )

    @pytest.mark.parametrize("unroll", [False, True])
    def test_recurrent_cell(self, unroll):
        layer, x = make(SHAPE, balance_loss=0.1, scale=0.4)
        recurrent = keras.layers.RNN(MixtureCell(layer), unroll=unroll)
        inputs = keras.Input(SHAPE[1:])
        model = keras.Model(inputs, recurrent(inputs))
        state = np.zeros((SHAPE[0], DIM), "float32")
        for t in range(SHAPE[1]):
            state = to_numpy(layer(x[:, t] + state)).astype("float32")
        np.testing.assert_allclose(to_numpy(model(x)), state, atol=1e-4)
        model.compile("sgd", "mse")
        before = weights_of(layer)
        losses = model.fit(x, state * 0, epochs=2, verbose=0).history["loss"]
        assert losses[1] < losses[0]
        assert all(
            np.abs(a - b).max() > 1e-7
            for a, b in zip(before, weights_of(layer), strict=True)
        )


class MixtureCell(keras.layers.Layer):
    """A recurrent cell, which may neither add losses nor assign variables."""

    def __init__(self, mixture, **kwargs):
        super().__init__(**kwargs)
        self.mixture = mixture
        self.state_size = self.output_size = DIM

    def build(self, input_shape):
        self.built = True

    def call(self, inputs, states, training=None):
        y, _ = self.mixture(
            inputs + states[0], training=training, return_statistics=True
        )
        return y, [y]


class TestGatedSharedExpert:
    def make(self):
        layer = MixtureOfExperts(
            EXPERTS,
            HIDDEN,
            num_shared_experts=1,
            shared_expert_dim=7,
            shared_expert_gate=True,
        )
        layer.build((2, 6, DIM))
        rng = np.random.default_rng(0)
        for variable in layer.trainable_variables:
            variable.assign(rng.normal(size=variable.shape))
        return layer, rng.normal(size=(2, 6, DIM)).astype("float32")

    def test_equals_the_equation(self):
        layer, x = self.make()
        weights = {
            "/".join(v.path.split("/")[-2:]): to_numpy(v.value) for v in layer.weights
        }
        up, gate, down = (weights[f"{n}/kernel"] for n in ("up", "gate", "down"))
        assert up.shape == (DIM, 7)
        shared = reference.feed_forward(x, up, down, gate)
        weight = reference.sigmoid(x @ weights["shared_expert_gate/kernel"])
        routed = layer(x) - layer.shared_expert_gate(x) * layer.shared_experts(x)
        y = to_numpy(layer(x))
        np.testing.assert_allclose(y, to_numpy(routed) + weight * shared, atol=1e-5)
        # The routed part is that of the same mixture without a shared expert.
        alone = MixtureOfExperts(EXPERTS, HIDDEN)
        alone.build((2, 6, DIM))
        alone.router.set_weights(layer.router.get_weights())
        alone.experts.set_weights(layer.experts.get_weights())
        np.testing.assert_allclose(to_numpy(alone(x)), to_numpy(routed), atol=1e-5)

    def test_saved_and_loaded(self):
        layer, x = self.make()
        again = MixtureOfExperts.from_config(layer.get_config())
        again.build((2, 6, DIM))
        again.set_weights(layer.get_weights())
        np.testing.assert_allclose(to_numpy(again(x)), to_numpy(layer(x)), atol=1e-6)

    @pytest.mark.parametrize(
        "setting", [dict(shared_expert_dim=4), dict(shared_expert_gate=True)], ids=str
    )
    def test_without_a_shared_expert(self, setting):
        with pytest.raises(ValueError, match="need shared experts"):
            MixtureOfExperts(EXPERTS, HIDDEN, **setting)


class TestRandomSecondChoice:
    """GShard in training: random second choices and a capacity in groups."""

    SETTINGS = dict(
        top_k=2,
        gated=False,
        activation="relu",
        second_choice_threshold=0.5,
        dispatch="capacity",
        capacity=1,
        capacity_group=4,
        balance_loss=0.1,
        balance_choices="first",
    )

    def make(self, **settings):
        layer, x = make(SHAPE, **{**self.SETTINGS, **settings})
        tokens = x.reshape(-1, DIM)
        router, up, down = (
            to_numpy(v.value)
            for v in (
                layer.router.kernel,
                layer.experts.up_kernel,
                layer.experts.down_kernel,
            )
        )
        seed = keras.random.SeedGenerator(0)
        seed.state.assign(layer.router.seed_generator.state)
        draws = to_numpy(keras.random.uniform((12, 1), seed=seed))[:, 0]
        capacity = layer.capacity or len(tokens)
        group = layer.capacity_group if layer.capacity else len(tokens)
        combine = np.concatenate(
            [
                reference.gshard(part, router, capacity, draws[i : i + group])
                for i in range(0, 12, group)
                for part in [tokens[i : i + group]]
            ]
        )
        gates = reference.route(tokens, router, 2).gates
        standing = 12 + (2 * gates[:, 1] > draws).sum()
        assert 12 < standing < 24
        ids = np.tile(np.arange(EXPERTS), (12, 1))
        y = reference.mixture(tokens, dict(up=up, down=down), ids, combine, "relu")
        return layer, x, y.reshape(SHAPE), combine, standing

    def test_outputs_and_load(self):
        layer, x, expected, combine, standing = self.make()
        y = to_numpy(layer(x, training=True))
        np.testing.assert_allclose(y, expected, atol=2e-5)
        # What was left out by chance was not dropped: it was no choice.
        dropped = 1 - (combine > 0).sum() / standing
        assert dropped > 0
        np.testing.assert_allclose(float(layer.dropped_fraction), dropped, atol=1e-6)
        routing, _ = reference_of(layer).statistics(x, *weights_of(layer))
        loss = 0.1 * EXPERTS**2 * reference.gshard_loss(routing)
        np.testing.assert_allclose(float(layer.losses[0]), loss, rtol=1e-5)

    def test_dropless(self):
        layer, x, expected, combine, standing = self.make(
            dispatch="dropless", capacity=None
        )
        np.testing.assert_allclose(
            to_numpy(layer(x, training=True)), expected, atol=2e-5
        )
        load = (combine > 0).sum(axis=0) / standing
        np.testing.assert_allclose(to_numpy(layer.expert_load.value), load, atol=1e-6)
        assert float(layer.dropped_fraction) == 0

    def test_fit_draws_anew_at_each_step(self):
        layer, x = make(SHAPE, **{**self.SETTINGS, "capacity": 12})
        inputs = keras.Input(SHAPE[1:])
        model = keras.Model(inputs, layer(inputs))
        model.compile(keras.optimizers.SGD(0.0), "mse")
        loads, losses = [], []
        for _ in range(4):
            losses += model.fit(x, 0 * x, verbose=0).history["loss"]
            loads.append(to_numpy(layer.expert_load.value))
        assert len(np.unique(np.round(losses, 6))) == 4
        assert np.std(loads, axis=0).max() > 0
        # Evaluation takes all second choices, and is the same each time.
        evaluated = {model.evaluate(x, 0 * x, verbose=0) for _ in range(2)}
        expected = np.mean(reference_of(layer)(x, *weights_of(layer)) ** 2)
        np.testing.assert_allclose(list(evaluated), [expected], rtol=1e-4)


class TestBalancingWithoutALoss:
    def test_training_moves_the_bias_and_evens_the_load(self):
        layer = MixtureOfExperts(
            EXPERTS,
            HIDDEN,
            top_k=1,
            scores="sigmoid",
            selection_bias=True,
            bias_update_rate=0.05,
        )
        inputs = keras.Input((6, DIM))
        model = keras.Model(inputs, layer(inputs))
        # One expert is liked by all: without a bias it takes every token.
        kernel = np.full((DIM, EXPERTS), -1.0)
        kernel[:, 2] = 1.0
        layer.router.kernel.assign(kernel)
        x = np.random.default_rng(0).uniform(0.5, 1.0, (8, 6, DIM)).astype("float32")
        model.compile(keras.optimizers.SGD(0.0), "mse")
        model.fit(x, x, verbose=0)
        np.testing.assert_allclose(to_numpy(layer.expert_load.value), [0, 0, 1, 0, 0])
        np.testing.assert_allclose(
            to_numpy(layer.router.selection_bias.value),
            [0.05, 0.05, -0.05, 0.05, 0.05],
            atol=1e-6,
        )
        model.fit(x, x, epochs=12, verbose=0)
        assert to_numpy(layer.expert_load.value)[2] < 1

    def test_needs_a_bias(self):
        with pytest.raises(ValueError, match="`bias_update_rate` needs.*0.1"):
            MixtureOfExperts(EXPERTS, HIDDEN, bias_update_rate=0.1)
