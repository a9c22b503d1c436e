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
