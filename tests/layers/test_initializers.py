import keras
import numpy as np
import pytest
from keras import ops

from keras_moe.layers import (
    Experts,
    FeedForward,
    GroupedQueryAttention,
    MixtureOfExperts,
)
from keras_moe.layers.initializers import fresh, fresh_per_expert, fresh_share

SHAPE = (16, 40, 24)  # E, fan in, fan out


def draw(initializer, shape=SHAPE, index=0):
    make = fresh_per_expert(initializer, shape[0], index)
    return ops.convert_to_numpy(make(shape, dtype="float32"))


@pytest.mark.parametrize(
    "name, variance",
    [
        ("glorot_uniform", 2 / (40 + 24)),  # Glorot and Bengio, 2010, eq. 12
        ("glorot_normal", 2 / (40 + 24)),
        ("he_normal", 2 / 40),  # He et al., 2015, eq. 10
        ("he_uniform", 2 / 40),
        ("lecun_normal", 1 / 40),
        (keras.initializers.VarianceScaling(0.3, mode="fan_out"), 0.3 / 24),
        (keras.initializers.RandomNormal(stddev=0.02), 0.02**2),
        (keras.initializers.TruncatedNormal(stddev=0.02), 0.02**2 * 0.774),
    ],
)
def test_each_expert_is_initialised_as_if_alone(name, variance):
    values = draw(name)
    np.testing.assert_allclose(values.var(axis=(1, 2)), variance, rtol=0.25)
    np.testing.assert_allclose(values.var(), variance, rtol=0.05)
    assert np.abs(values[0] - values[1]).max() > 0


def test_orthogonal_experts():
    for matrix in draw("orthogonal"):
        np.testing.assert_allclose(matrix.T @ matrix, np.eye(24), atol=1e-5)
    seeded = draw(keras.initializers.Orthogonal(seed=3), (3, 6, 6))
    assert all(np.abs(seeded[a] - seeded[b]).max() > 0.1 for a, b in [(0, 1), (1, 2)])


def test_identity_and_constants():
    np.testing.assert_array_equal(draw("identity", (2, 3, 3)), [np.eye(3)] * 2)
    np.testing.assert_array_equal(draw("zeros", (2, 3, 3)), np.zeros((2, 3, 3)))
    half = keras.initializers.Constant(0.5)
    np.testing.assert_array_equal(draw(half, (2, 3, 3)), np.full((2, 3, 3), 0.5))


def test_a_callable_is_used_as_it_is():
    values = draw(lambda shape, dtype=None: ops.ones(shape, dtype), (2, 3, 3))
    np.testing.assert_array_equal(values, np.ones((2, 3, 3)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.initializers.RandomNormal(),
        lambda: keras.initializers.RandomNormal(seed=3),
        lambda: keras.initializers.RandomNormal(seed=keras.random.SeedGenerator(3)),
    ],
    ids=["unseeded", "seeded", "generator"],
)
def test_copies_draw_different_values(make):
    initializer = make()
    draws = [
        ops.convert_to_numpy(fresh(initializer, index)((8, 8))) for index in range(3)
    ]
    for a, b in [(0, 1), (0, 2), (1, 2)]:
        assert np.abs(draws[a] - draws[b]).max() > 1e-3


def layers():
    return {
        "experts": lambda i: Experts(3, 8, kernel_initializer=i),
        "feed_forward": lambda i: FeedForward(8, kernel_initializer=i),
        "attention": lambda i: GroupedQueryAttention(2, kernel_initializer=i),
        "mixture": lambda i: MixtureOfExperts(
            8, 8, num_shared_experts=1, kernel_initializer=i
        ),
    }


def built(make, initializer):
    layer = make(initializer)
    layer.build((None, None, 8))
    return [ops.convert_to_numpy(v) for v in layer.trainable_variables]


def differ(a, b):
    a, b = np.ravel(a), np.ravel(b)
    size = min(a.size, b.size)
    return np.abs(a[:size] - b[:size]).max() > 1e-4


@pytest.mark.parametrize("make", layers().values(), ids=layers())
@pytest.mark.parametrize("seed", [None, 3, "generator"])
def test_the_weights_of_a_layer_differ(make, seed):
    if seed == "generator":
        seed = keras.random.SeedGenerator(3)
    weights = built(make, keras.initializers.GlorotUniform(seed=seed))
    for i, a in enumerate(weights):
        for b in weights[:i]:
            assert a.shape != b.shape or differ(a, b)


@pytest.mark.parametrize("make", layers().values(), ids=layers())
def test_two_layers_given_one_initializer_differ(make):
    for initializer in ("glorot_uniform", keras.initializers.RandomNormal()):
        first, second = built(make, initializer), built(make, initializer)
        assert all(differ(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("make", layers().values(), ids=layers())
def test_a_seed_repeats_the_weights(make):
    first, second = (
        built(make, keras.initializers.RandomNormal(seed=3)) for _ in range(2)
    )
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_share_of_the_variance():
    for name in ("lecun_normal", keras.initializers.VarianceScaling(1.0)):
        values = ops.convert_to_numpy(fresh_share(name, 0.25)((64, 64)))
        np.testing.assert_allclose(values.var(), 0.25 / 64, rtol=0.1)
    values = ops.convert_to_numpy(
        fresh_share(keras.initializers.RandomNormal(stddev=0.3), 0.25)((64, 64))
    )
    np.testing.assert_allclose(values.std(), 0.3, rtol=0.1)


def test_queries_begin_smaller_where_logits_are_not_scaled():
    deviations = []
    for scale in (None, 1.0):
        layer = GroupedQueryAttention(
            8, head_dim=16, scale=scale, kernel_initializer="lecun_normal"
        )
        layer.build((None, None, 64))
        deviations.append(ops.convert_to_numpy(layer.query.kernel).std())
    np.testing.assert_allclose(deviations[0] / deviations[1], 4.0, rtol=0.1)
