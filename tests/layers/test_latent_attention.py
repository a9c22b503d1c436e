import keras
import numpy as np
import pytest
from keras import ops

from keras_moe.layers import LatentAttention
from tests.execution import MODES, as_function, in_mode, with_gradients
from tests.execution import numpy as to_numpy
from tests.layers.attentions import expected, randomize

DIM, LENGTH = 8, 7
SIZES = dict(head_dim=4, rope_head_dim=2, value_head_dim=3, key_value_rank=5)
SETTINGS = {
    "plain_queries": dict(num_query_heads=2),
    "query_rank": dict(num_query_heads=3, query_rank=6),
    "biased": dict(num_query_heads=2, query_rank=6, bias="all", rope_theta=50.0),
}


def make(num_query_heads=2, seed=0, **settings):
    layer = LatentAttention(num_query_heads, **{**SIZES, **settings})
    layer.build((None, None, DIM))
    randomize(layer, seed)
    return layer


def inputs(batch=2, length=LENGTH, seed=5):
    return np.random.default_rng(seed).normal(size=(batch, length, DIM)).astype("f")


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("mode", MODES)
def test_equals_the_paper(settings, mode):
    layer, x = make(**settings), inputs()
    weights = [v.value for v in layer.trainable_variables]
    y = to_numpy(in_mode(as_function(layer), mode)(ops.convert_to_tensor(x), *weights))
    for got, sequence in zip(y, x, strict=True):
        np.testing.assert_allclose(got, expected(layer, sequence), atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    layer, x = make(query_rank=6), inputs()
    mask = np.ones((2, LENGTH), bool)
    mask[0, slice(0, 3) if side == "left" else slice(5, None)] = False
    y = to_numpy(layer(x, mask=mask))
    for got, sequence, real in zip(y, x, mask, strict=True):
        alone = expected(layer, sequence[real])
        np.testing.assert_allclose(got[real], alone, atol=1e-5)


@pytest.mark.parametrize("steps", [(1,) * LENGTH, (3, 1, 1, 2), (LENGTH,)], ids=str)
def test_with_a_cache_of_latents(steps):
    """One token at a time attends to latents, several to expanded keys: both agree."""
    layer, x = make(3, query_rank=6), inputs()
    cache = layer.empty_cache(2, LENGTH + 2)
    assert [tuple(part.shape) for part in cache] == [(2, 9, 5), (2, 9, 2)]
    parts, start = [], 0
    for step in steps:
        part, cache = layer(
            ops.convert_to_tensor(x[:, start : start + step]),
            cache=cache,
            cache_index=start,
        )
        parts.append(to_numpy(part))
        start += step
    for got, sequence in zip(np.concatenate(parts, axis=1), x, strict=True):
        np.testing.assert_allclose(got, expected(layer, sequence), atol=1e-5)


def test_a_soft_cap_and_a_window_apply():
    x = inputs()
    plain = to_numpy(make()(x))
    for setting in (dict(soft_cap=0.1), dict(window=2)):
        y = to_numpy(make(**setting)(x))
        np.testing.assert_allclose(y[:, 0], plain[:, 0], atol=1e-6)  # sees itself
        assert np.abs(y[:, 3:] - plain[:, 3:]).max() > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_gradients_reach_every_weight(mode):
    layer, x = make(query_rank=6, bias="all"), inputs(1)
    weights = [v.value for v in layer.trainable_variables]
    dy = inputs(1, seed=6)
    _, gradients = with_gradients(as_function(layer), (x, *weights), dy, mode)
    assert len(gradients) == 1 + len(weights)
    assert all(np.abs(g).max() > 0 for g in gradients)


def test_saved_and_loaded():
    layer, x = make(query_rank=6, rope_theta=50.0), inputs()
    again = LatentAttention.from_config(layer.get_config())
    again.build((None, None, DIM))
    again.set_weights(layer.get_weights())
    np.testing.assert_allclose(to_numpy(again(x)), to_numpy(layer(x)), atol=1e-6)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(rope_head_dim=3), "`rope_head_dim` must be even.*rope_head_dim=3"),
        (dict(key_value_rank=0), "`key_value_rank`.*key_value_rank=0"),
        (dict(query_rank=-1), "`query_rank`.*query_rank=-1"),
        (dict(value_head_dim=None), "`value_head_dim`.*value_head_dim=None"),
        (dict(bias="some"), "`bias`.*bias='some'"),
        (dict(window=0), "`window`.*window=0"),
        (dict(soft_cap=-1.0), "`soft_cap`.*soft_cap=-1.0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_symbolic_call():
    y, cache = make()(
        keras.Input((1, DIM), batch_size=2),
        cache=(keras.Input((9, 5), batch_size=2), keras.Input((9, 2), batch_size=2)),
    )
    assert y.shape == (2, 1, DIM)
    assert [part.shape for part in cache] == [(2, 9, 5), (2, 9, 2)]
