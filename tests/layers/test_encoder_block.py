import keras
import numpy as np
import pytest
from keras import ops

from keras_moe.layers import (
    CrossAttention,
    EncoderBlock,
    FeedForward,
    GroupedQueryAttention,
    MixtureOfExperts,
)
from tests.execution import numpy as to_numpy
from tests.layers import attentions
from tests.layers.test_decoder_block import KINDS, expected

DIM, LENGTH = 8, 6


def make(kind, seed=0, **settings):
    attention = GroupedQueryAttention(4, 2, causal=False)
    block = EncoderBlock(attention, KINDS[kind](), **settings)
    block.build((None, None, DIM))
    attentions.randomize(block, seed)
    x = np.random.default_rng(seed + 1).normal(size=(2, LENGTH, DIM))
    return block, x.astype("float32")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("output_norms", [False, True])
def test_equals_its_parts_in_both_directions(kind, output_norms):
    block, x = make(kind, output_norms=output_norms)
    mask = np.arange(LENGTH) < [[LENGTH], [4]]
    y = to_numpy(block(x, padding_mask=mask))
    for got, sequence, real in zip(y, x, mask, strict=True):
        wanted = expected(block, sequence[real])
        np.testing.assert_allclose(got[real], wanted, atol=5e-5)
    # The first token is another where the last is.
    x[0, -1] += 1
    assert np.abs(to_numpy(block(x, padding_mask=mask))[0, 0] - y[0, 0]).max() > 1e-3


def test_statistics():
    block, x = make("mixture")
    y, statistics = block(x, return_statistics=True)
    assert float(ops.sum(statistics.assignments)) == 2 * 2 * LENGTH
    np.testing.assert_allclose(to_numpy(y), to_numpy(block(x)), atol=1e-5)
    y, statistics = make("dense")[0](x, return_statistics=True)
    assert statistics is None


def test_padding_can_be_routed():
    mixture = MixtureOfExperts(5, 6, top_k=1, route_padding=True)
    block = EncoderBlock(GroupedQueryAttention(2, causal=False), mixture)
    x = np.random.default_rng(0).normal(size=(2, LENGTH, DIM)).astype("float32")
    mask = np.arange(LENGTH) < [[LENGTH], [2]]
    _, statistics = block(x, padding_mask=mask, return_statistics=True)
    assert float(statistics.tokens) == 2 * LENGTH
    _, statistics = block(x, padding_mask=mask, return_statistics=True, training=True)
    assert float(statistics.tokens) == 2 * LENGTH


def test_config_round_trip(tmp_path):
    block = EncoderBlock(
        GroupedQueryAttention(2, causal=False, window=3),
        FeedForward(4, dropout=0.2),
        extra_feed_forward=FeedForward(3),
        dropout=0.1,
    )
    inputs = keras.Input((None, DIM))
    model = keras.Model(inputs, block(inputs))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    x = np.ones((2, LENGTH, DIM), "float32")
    np.testing.assert_array_equal(to_numpy(loaded(x)), to_numpy(model(x)))


def test_an_encoder_takes_no_cross_attention():
    with pytest.raises(ValueError, match="`cross_attention` must be None"):
        EncoderBlock(
            GroupedQueryAttention(4, 2, causal=False),
            FeedForward(8),
            cross_attention=CrossAttention(4, 2),
        )
    block = EncoderBlock(GroupedQueryAttention(4, 2), FeedForward(8))
    assert EncoderBlock.from_config(block.get_config()).cross_attention is None
