import keras
import numpy as np
import pytest
from keras import ops

from keras_moe.layers import RelativeBias
from tests.execution import COMPILED, with_gradients
from tests.execution import numpy as to_numpy
from tests.layers.attentions import bucket

SETTINGS = [(32, 128), (32, 256), (64, 512), (8, 20), (6, 50), (7, 40), (2, 5), (3, 2)]


def buckets_of(num_buckets, max_distance, distance):
    """The layer's buckets, read off a table whose entries are their own numbers."""
    layer = RelativeBias(1, num_buckets, max_distance)
    layer.build(None)
    layer.embeddings.assign(np.arange(num_buckets)[:, None])
    queries = ops.convert_to_tensor(distance, "int32")
    return to_numpy(layer(queries, ops.zeros((1,), "int32")))[0, 0, :, 0]


@pytest.mark.parametrize("num_buckets, max_distance", SETTINGS)
def test_buckets_are_those_of_transformers_t5(num_buckets, max_distance):
    import torch
    from transformers.models.t5.modeling_t5 import T5Attention

    # Keys ahead of the query first, which count as distance 0.
    distance = np.arange(-5, 3 * max_distance)
    theirs = T5Attention._relative_position_bucket(
        torch.tensor(-distance), False, num_buckets, max_distance
    )
    got = buckets_of(num_buckets, max_distance, distance)
    np.testing.assert_array_equal(got, theirs.numpy())


@pytest.mark.parametrize("num_buckets, max_distance", [*SETTINGS, (32, 17), (10, 9999)])
def test_buckets_in_exact_arithmetic(num_buckets, max_distance):
    distance = np.unique(np.geomspace(1, 2 * max_distance, 300).astype(int))
    exact = [bucket(int(d), num_buckets, max_distance) for d in distance]
    got = buckets_of(num_buckets, max_distance, distance)
    np.testing.assert_array_equal(got, exact)


def test_bias_and_gradient():
    layer = RelativeBias(3, 6, 10)
    layer.build(None)
    table = np.random.default_rng(0).normal(size=(6, 3)).astype("float32")

    def function(table):
        with keras.StatelessScope(state_mapping=[(layer.embeddings, table)]):
            return layer(ops.arange(3, 12), ops.arange(12))

    dy = np.random.default_rng(1).normal(size=(1, 3, 9, 12)).astype("float32")
    y, (gradient,) = with_gradients(function, (table,), dy, COMPILED)
    expected, expected_gradient = np.zeros_like(dy), np.zeros((6, 3))
    for t, s in np.ndindex(9, 12):
        index = bucket(max(3 + t - s, 0), 6, 10)
        expected[0, :, t, s] = table[index]
        expected_gradient[index] += dy[0, :, t, s]
    np.testing.assert_allclose(y, expected, atol=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(num_heads=0), "`num_heads`.*num_heads=0"),
        (dict(num_buckets=1), "`num_buckets`.*at least 2.*num_buckets=1"),
        (dict(max_distance=16), "`max_distance`.*at least 17.*max_distance=16"),
        (dict(max_distance=20.0), "`max_distance`.*max_distance=20.0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        RelativeBias(**{"num_heads": 2, **arguments})


def test_config_round_trip():
    layer = RelativeBias(4, 16, 64, dtype="mixed_bfloat16")
    copy = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(layer)
    )
    assert copy.get_config() == layer.get_config()
    layer.build(None)
    bias = layer(ops.arange(3), ops.arange(5))
    assert tuple(bias.shape) == (1, 4, 3, 5)
    assert keras.backend.standardize_dtype(bias.dtype) == "bfloat16"


@pytest.mark.parametrize("num_buckets, max_distance", [(32, 128), (8, 20), (4, 5)])
def test_both_directions_as_in_transformers_t5(num_buckets, max_distance):
    import torch
    from transformers.models.t5.modeling_t5 import T5Attention

    layer = RelativeBias(1, num_buckets, max_distance, bidirectional=True)
    layer.build(None)
    layer.embeddings.assign(np.arange(num_buckets)[:, None])
    distance = np.arange(-3 * max_distance, 3 * max_distance)
    got = layer(ops.convert_to_tensor(distance, "int32"), ops.zeros((1,), "int32"))
    theirs = T5Attention._relative_position_bucket(
        torch.tensor(-distance), True, num_buckets, max_distance
    )
    np.testing.assert_array_equal(to_numpy(got)[0, 0, :, 0], theirs.numpy())


def test_of_a_sequence_to_itself():
    layer = RelativeBias(2, 8, 20, bidirectional=True)
    x = np.zeros((3, 7, 5), "float32")
    index = ops.arange(7, dtype="int32")
    np.testing.assert_array_equal(to_numpy(layer(x)), to_numpy(layer(index, index)))
    symbolic = layer(keras.Input((None, 5)))
    assert tuple(symbolic.shape) == (1, 2, None, None)


def test_odd_buckets_serve_one_direction():
    RelativeBias(2, 7, 20)
    with pytest.raises(ValueError, match="`num_buckets` must be even.*7"):
        RelativeBias(2, 7, 20, bidirectional=True)
    with pytest.raises(ValueError, match="`max_distance`.*at least 5.*4"):
        RelativeBias(2, 16, 4, bidirectional=True)
