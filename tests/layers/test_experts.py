import keras
import numpy as np
import pytest
from keras import ops

from keras_moe.layers import Experts, MixtureOfExperts
from tests.execution import (
    COMPILED,
    MODES,
    as_function,
    in_mode,
    numerical_gradients,
    with_gradients,
)
from tests.execution import numpy as to_numpy
from tests.references.mixture import feed_forward

SIZES = np.array([3, 0, 4, 1], "int32")
ROWS, DIM, HIDDEN = 10, 3, 5  # the last two rows belong to no expert


def make(seed=0, **settings):
    layer = Experts(4, HIDDEN, **settings)
    layer.build((None, DIM))
    rng = np.random.default_rng(seed)
    for variable in layer.trainable_variables:
        variable.assign(rng.normal(size=variable.shape))
    return layer, rng.normal(size=(ROWS, DIM)).astype("float32")


def expected(layer):
    names = [v.name for v in layer.trainable_variables]

    def outputs(x, *weights):
        weights = dict(zip(names, weights, strict=True))
        y = np.zeros(x.shape)
        start = 0
        for e, size in enumerate(SIZES):
            rows = slice(start, start + size)
            y[rows] = feed_forward(
                x[rows],
                weights["up_kernel"][e],
                weights["down_kernel"][e],
                weights["gate_kernel"][e] if layer.gated else None,
                layer.activation.__name__,
            )
            start += size
        return y

    return outputs


@pytest.mark.parametrize(
    "gated, activation",
    [(True, "silu"), (True, "gelu"), (False, "relu"), (False, "gelu")],
)
def test_outputs_and_gradients(gated, activation):
    layer, x = make(gated=gated, activation=activation)
    weights = [to_numpy(v.value).astype("f") for v in layer.trainable_variables]
    dy = np.random.default_rng(1).normal(size=x.shape).astype("float32")
    function = as_function(layer, group_sizes=ops.convert_to_tensor(SIZES))
    y, gradients = with_gradients(function, (x, *weights), dy, COMPILED)
    reference = expected(layer)
    np.testing.assert_allclose(y, reference(x, *weights), atol=1e-4)
    differences = numerical_gradients(reference, (x, *weights), dy)
    for a, b in zip(gradients, differences, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


def test_weights():
    layer, _ = make()
    shapes = {v.name: tuple(v.shape) for v in layer.weights}
    assert shapes == {
        "gate_kernel": (4, DIM, HIDDEN),
        "up_kernel": (4, DIM, HIDDEN),
        "down_kernel": (4, HIDDEN, DIM),
    }
    plain, _ = make(gated=False)
    assert [v.name for v in plain.weights] == ["up_kernel", "down_kernel"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(num_experts=0), "`num_experts`.*num_experts=0"),
        (dict(intermediate_dim=-1), "`intermediate_dim`.*intermediate_dim=-1"),
        (dict(activation="swoosh"), "`activation`.*activation='swoosh'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Experts(**{"num_experts": 4, "intermediate_dim": 8, **arguments})


def test_config_round_trip():
    layer = Experts(4, 8, "gelu", gated=False, kernel_initializer="he_normal")
    copy = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(layer)
    )
    assert copy.get_config() == layer.get_config()
    assert copy.activation is keras.activations.gelu


def test_symbolic_call():
    layer, _ = make(dtype="mixed_bfloat16")
    y = layer(keras.Input((DIM,)), keras.Input(batch_shape=(4,), dtype="int32"))
    assert tuple(y.shape) == (None, DIM) and y.dtype == "bfloat16"


@pytest.mark.skipif(
    keras.config.backend() != "tensorflow", reason="SavedModels are TensorFlow's"
)
def test_a_saved_model(tmp_path):
    import tensorflow as tf

    inputs = keras.Input((None, DIM))
    model = keras.Model(inputs, MixtureOfExperts(4, HIDDEN)(inputs))
    model.export(tmp_path / "model", verbose=False)
    loaded = tf.saved_model.load(tmp_path / "model")
    for shape in ((2, 5, DIM), (1, 1, DIM)):
        x = np.random.default_rng(0).normal(size=shape).astype("float32")
        np.testing.assert_allclose(loaded.serve(x), model(x), atol=1e-6)


class TestDropout:
    def test_changes_nothing_outside_training(self):
        layer, x = make(dropout=0.5)
        sizes = ops.convert_to_tensor(SIZES)
        plain, _ = make()
        np.testing.assert_allclose(
            to_numpy(layer(x, sizes)), to_numpy(plain(x, sizes)), atol=1e-6
        )

    @pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
    @pytest.mark.parametrize("gated", [True, False])
    def test_drops_hidden_features(self, gated, dtype):
        """One weight a hidden feature tells which were kept."""
        hidden, rate = 300, 0.4
        layer = Experts(4, hidden, "linear", gated=gated, dropout=rate, dtype=dtype)
        layer.build((None, 1))
        for variable in layer.trainable_variables:
            variable.assign(np.ones(variable.shape))
        down = np.random.default_rng(0).normal(size=(4, hidden, 1))
        layer.down_kernel.assign(down)
        x = np.ones((ROWS, 1), "float32")
        drawn = to_numpy(layer(x, ops.convert_to_tensor(SIZES), training=True))
        np.testing.assert_array_equal(drawn[8:], 0)
        mean = np.repeat(down.sum(1), SIZES, axis=0)
        spread = np.sqrt(rate / (1 - rate) * (down**2).sum(1))
        distance = (drawn[:8] - mean) / np.repeat(spread, SIZES, axis=0)
        assert np.abs(distance).max() < 4.5
        assert distance.std() > 0.3
        # Rows of one expert are dropped from apart.
        assert len(np.unique(drawn[:8].round(5))) > 6

    @pytest.mark.parametrize("mode", MODES)
    def test_gradients_are_those_of_what_was_kept(self, mode):
        layer, x = make(dropout=0.5)
        weights = [to_numpy(v.value).astype("f") for v in layer.trainable_variables]
        state = [v.value for v in layer.non_trainable_variables]

        def function(x, *weights):
            variables = layer.trainable_variables + layer.non_trainable_variables
            mapping = zip(variables, [*weights, *state], strict=True)
            with keras.StatelessScope(state_mapping=[*mapping]):
                return layer(x, ops.convert_to_tensor(SIZES), training=True)

        dy = np.random.default_rng(1).normal(size=x.shape).astype("float32")
        keras.utils.set_random_seed(5)  # torch draws unseeded dropout by it alone
        y, gradients = with_gradients(function, (x, *weights), dy, mode)
        # Linear in the last kernel: its gradient gives back the output.
        np.testing.assert_allclose(
            np.sum(gradients[-1] * weights[-1]), np.sum(y * dy), rtol=1e-3
        )
        step = np.random.default_rng(2).normal(size=x.shape).astype("float32")
        # In the same mode, as XLA draws other numbers.
        run, ends = in_mode(function, mode), []
        weights = [ops.convert_to_tensor(w) for w in weights]
        for sign in (1, -1):
            keras.utils.set_random_seed(5)
            moved = ops.convert_to_tensor(x + sign * 1e-3 * step)
            ends.append(np.sum(to_numpy(run(moved, *weights)) * dy))
        slope = (ends[0] - ends[1]) / 2e-3
        np.testing.assert_allclose(np.sum(gradients[0] * step), slope, rtol=2e-2)

    def test_of_a_mixture(self):
        layer = MixtureOfExperts(4, HIDDEN, expert_dropout=0.3, num_shared_experts=1)
        assert layer.experts.dropout == layer.shared_experts.dropout == 0.3
        copy = MixtureOfExperts.from_config(layer.get_config())
        assert copy.experts.dropout == 0.3
        with pytest.raises(ValueError, match="`expert_dropout`.*1"):
            MixtureOfExperts(4, HIDDEN, expert_dropout=1)
