import keras
import numpy as np
import pytest

from keras_moe.layers import FeedForward
from tests.execution import (
    COMPILED,
    as_function,
    numerical_gradients,
    with_gradients,
)
from tests.execution import numpy as to_numpy
from tests.references.mixture import feed_forward


@pytest.mark.parametrize(
    "gated, activation",
    [(True, "silu"), (True, "linear"), (False, "relu"), (False, "gelu")],
)
def test_outputs_and_gradients(gated, activation):
    layer = FeedForward(5, activation, gated)
    layer.build((None, None, 3))
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=v.shape).astype("f") for v in layer.trainable_variables]
    x, dy = rng.normal(size=(2, 2, 4, 3)).astype("float32")
    names = [v.path.split("/")[-2] for v in layer.trainable_variables]

    def reference(x, *weights):
        return feed_forward(
            x, activation=activation, **dict(zip(names, weights, strict=True))
        )

    y, gradients = with_gradients(as_function(layer), (x, *weights), dy, COMPILED)
    np.testing.assert_allclose(y, reference(x, *weights), atol=1e-4)
    differences = numerical_gradients(reference, (x, *weights), dy)
    for a, b in zip(gradients, differences, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


def test_passes_a_mask_on():
    layer = FeedForward(5)
    embedding = keras.layers.Embedding(9, 4, mask_zero=True)
    ids = np.array([[1, 2, 0]])
    mean = keras.layers.GlobalAveragePooling1D()(layer(embedding(ids)))
    y = to_numpy(layer(embedding(ids)))
    np.testing.assert_allclose(to_numpy(mean), y[:, :2].mean(axis=1), atol=1e-6)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(intermediate_dim=0), "`intermediate_dim`.*intermediate_dim=0"),
        (dict(activation="swoosh"), "`activation`.*activation='swoosh'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        FeedForward(**{"intermediate_dim": 8, **arguments})


def test_config_round_trip(tmp_path):
    layer = FeedForward(8, "gelu", gated=False, kernel_initializer="he_normal")
    inputs = keras.Input((None, 3))
    model = keras.Model(inputs, layer(inputs))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.layers[-1].get_config() == layer.get_config()
    x = np.random.default_rng(0).normal(size=(2, 4, 3)).astype("float32")
    np.testing.assert_array_equal(to_numpy(loaded(x)), to_numpy(model(x)))


def test_dropout_of_hidden_features():
    layer = FeedForward(400, "linear", gated=False, dropout=0.25)
    layer.build((None, 3))
    layer.up.kernel.assign(np.ones((3, 400)))
    layer.down.kernel.assign(np.full((400, 3), 1 / 400))
    x = np.ones((50, 3), "float32")
    # The mean of kept features, each scaled by 4 / 3.
    np.testing.assert_allclose(to_numpy(layer(x)), 3.0, rtol=1e-5)
    y = to_numpy(layer(x, training=True))[:, 0] / 3
    spread = np.sqrt(0.25 / 0.75 / 400)
    assert abs(y.mean() - 1) < 5 * spread / np.sqrt(50)
    assert 0.5 * spread < y.std() < 2 * spread
    with pytest.raises(ValueError, match="`dropout`.*1.5"):
        FeedForward(4, dropout=1.5)
