import keras
import numpy as np
import pytest
from keras import ops

from keras_moe.layers import CrossAttention
from tests.execution import COMPILED, numerical_gradients, with_gradients
from tests.execution import numpy as to_numpy
from tests.layers.attentions import expected, randomize
from tests.references.attention import attention

DIM, T, S = 8, 4, 6
HEADS = {
    "full": dict(num_query_heads=2),
    "grouped": dict(num_query_heads=4, num_key_value_heads=2, scale=1.0),
    "multi_query": dict(num_query_heads=3, num_key_value_heads=1, head_dim=5),
    "normed": dict(num_query_heads=2, query_key_norm="head", bias="all", clip=0.8),
    "capped": dict(num_query_heads=4, num_key_value_heads=2, soft_cap=0.4),
}


def make(**settings):
    layer = CrossAttention(**settings)
    layer.build((None, None, DIM))
    randomize(layer)
    rng = np.random.default_rng(3)
    return layer, *(rng.normal(size=(2, n, DIM)).astype("f") for n in (T, S))


@pytest.mark.parametrize("settings", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_equals_the_paper(settings, side):
    layer, x, source = make(**settings)
    mask = np.ones((2, S), bool)
    mask[0, slice(0, 2) if side == "left" else slice(4, None)] = False
    y = to_numpy(layer(x, source=source, source_mask=mask))
    unmasked = to_numpy(layer(x, source=source))
    for i, real in enumerate(mask):
        wanted = expected(layer, x[i], source=source[i][real])
        np.testing.assert_allclose(y[i], wanted, atol=1e-5)
        wanted = expected(layer, x[i], source=source[i])
        np.testing.assert_allclose(unmasked[i], wanted, atol=1e-5)


@pytest.mark.parametrize("settings", HEADS.values(), ids=HEADS)
def test_a_projected_source_stands_for_it(settings):
    layer, x, source = make(**settings)
    mask = np.arange(S) < [[S], [3]]
    whole = layer(x, source=source, source_mask=mask)
    cache = layer.project_source(source)
    heads = layer.num_key_value_heads, layer.head_dim
    assert [tuple(t.shape) for t in cache] == [(2, S, *heads)] * 2
    for t in range(T):
        y = layer(x[:, t : t + 1], cache=cache, source_mask=mask)
        np.testing.assert_allclose(to_numpy(y)[:, 0], to_numpy(whole)[:, t], atol=1e-5)


def test_gradients():
    layer, x, source = make(num_query_heads=2)
    weights = [to_numpy(v.value).astype("f") for v in layer.trainable_variables]
    names = [v.path.split("/")[-2] for v in layer.trainable_variables]
    dy = np.random.default_rng(1).normal(size=x.shape).astype("f")

    def function(x, source, *weights):
        mapping = zip(layer.trainable_variables, weights, strict=True)
        with keras.StatelessScope(state_mapping=[*mapping]):
            return layer(x, source=source)

    y, gradients = with_gradients(function, (x, source, *weights), dy, COMPILED)

    def reference(x, source, *weights):
        named = dict(zip(names, weights, strict=True))
        parts = [named[n] for n in ("query", "key", "value", "output_dense")]
        return np.stack(
            [attention(a, *parts, source=b) for a, b in zip(x, source, strict=True)]
        )

    np.testing.assert_allclose(y, reference(x, source, *weights), atol=1e-5)
    differences = numerical_gradients(reference, (x, source, *weights), dy)
    for a, b in zip(gradients, differences, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


@pytest.mark.parametrize("settings", [{}, {"soft_cap": 1.0}])
def test_a_source_of_padding_gives_its_average(settings):
    layer, x, source = make(num_query_heads=2, **settings)
    y = to_numpy(layer(x, source=source, source_mask=np.zeros((2, S), bool)))
    value = np.einsum("bsd,dhk->bshk", source, to_numpy(layer.value.kernel.value))
    kernel = to_numpy(layer.output_dense.kernel.value)
    wanted = np.einsum("bhk,hkd->bd", value.mean(1), kernel)
    np.testing.assert_allclose(y, np.repeat(wanted[:, None], T, 1), atol=1e-5)


def test_bad_arguments():
    layer, x, source = make(num_query_heads=2)
    with pytest.raises(ValueError, match="Either `source` or `cache`"):
        layer(x)
    with pytest.raises(ValueError, match="Either `source` or `cache`"):
        layer(x, source=source, cache=layer.project_source(source))
    with pytest.raises(ValueError, match="`scale`.*scale=0"):
        CrossAttention(2, scale=0)
    with pytest.raises(ValueError, match="`weight_dropout`.*1.0"):
        CrossAttention(2, weight_dropout=1.0)


def test_config_round_trip(tmp_path):
    layer = CrossAttention(4, 2, 6, scale=1.0, soft_cap=3.0, weight_dropout=0.1)
    copy = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(layer)
    )
    assert copy.get_config() == layer.get_config()
    x, source = keras.Input((None, DIM)), keras.Input((None, DIM))
    model = keras.Model([x, source], layer(x, source=source))
    arrays = [np.ones((2, n, DIM), "f") for n in (T, S)]
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(
        ops.convert_to_numpy(loaded(arrays)), ops.convert_to_numpy(model(arrays))
    )
