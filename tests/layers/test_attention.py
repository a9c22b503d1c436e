import keras
import numpy as np
import pytest
from keras import ops

from keras_moe.layers import GroupedQueryAttention
from tests.execution import (
    COMPILED,
    MODES,
    as_function,
    in_mode,
    numerical_gradients,
    program,
    with_gradients,
)
from tests.execution import numpy as to_numpy
from tests.layers.attentions import expected, make
from tests.references import attention as reference

HEADS = {
    "grouped": dict(num_query_heads=4, num_key_value_heads=2),
    "multi_query": dict(num_query_heads=4, num_key_value_heads=1),
    "full": dict(num_query_heads=2),
    "odd_heads": dict(num_query_heads=3, num_key_value_heads=1, head_dim=6),
    "odd_groups": dict(num_query_heads=6, num_key_value_heads=3, head_dim=2),
    "theta": dict(num_query_heads=2, rope_theta=100.0),
    "biased": dict(
        num_query_heads=3,
        num_key_value_heads=1,
        head_dim=5,
        positions="relative_bias",
        relative_buckets=6,
        relative_max_distance=5,
    ),
    "biased_grouped": dict(
        num_query_heads=4, num_key_value_heads=2, positions="relative_bias"
    ),
    "projections_biased": dict(
        num_query_heads=4, num_key_value_heads=2, bias="query_key_value"
    ),
    "all_biased": dict(num_query_heads=2, bias="all"),
    "heads_normed": dict(
        num_query_heads=4,
        num_key_value_heads=2,
        query_key_norm="head",
        norm_epsilon=0.1,
    ),
    "all_heads_normed": dict(
        num_query_heads=4, num_key_value_heads=2, query_key_norm="full"
    ),
    "normed_and_clipped": dict(num_query_heads=2, query_key_norm="full", clip=0.5),
    "clipped": dict(num_query_heads=2, clip=0.3),
    "capped": dict(num_query_heads=4, num_key_value_heads=2, soft_cap=0.5),
    "capped_and_biased": dict(
        num_query_heads=3,
        num_key_value_heads=1,
        head_dim=5,
        positions="relative_bias",
        soft_cap=0.7,
    ),
    "window": dict(num_query_heads=4, num_key_value_heads=2, window=3),
    "window_of_one": dict(num_query_heads=2, window=1),
    "capped_window": dict(num_query_heads=2, window=2, soft_cap=1.0),
    "without_positions": dict(num_query_heads=2, positions=None),
    "scaled": dict(num_query_heads=4, num_key_value_heads=2, scale=1.0),
    "capped_and_scaled": dict(num_query_heads=2, scale=0.3, soft_cap=0.5),
}
BIDIRECTIONAL = {
    "rotary": dict(num_query_heads=4, num_key_value_heads=2),
    "biased": dict(
        num_query_heads=3,
        head_dim=5,
        positions="relative_bias",
        relative_buckets=8,
        relative_max_distance=5,
        scale=1.0,
    ),
    "window": dict(num_query_heads=2, window=3),
}
LENGTH, DIM = 7, 8


def inputs(batch=2, length=LENGTH, seed=5):
    return np.random.default_rng(seed).normal(size=(batch, length, DIM)).astype("f")


@pytest.mark.parametrize("settings", HEADS.values(), ids=HEADS)
def test_equals_the_papers(settings):
    layer, x = make(**settings), inputs()
    y = to_numpy(layer(x))
    for got, sequence in zip(y, x, strict=True):
        np.testing.assert_allclose(got, expected(layer, sequence), atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_gradients(mode):
    layer, x = make(4, 2), inputs(1, 4)
    names = [v.path.split("/")[-2] for v in layer.trainable_variables]
    assert names == ["query", "key", "value", "output_dense"]

    def equation(x, *weights):
        return reference.attention(x[0], *weights, theta=10000.0)[None]

    weights = [to_numpy(v.value).astype("f") for v in layer.trainable_variables]
    dy = inputs(1, 4, seed=6)
    y, gradients = with_gradients(as_function(layer), (x, *weights), dy, mode)
    np.testing.assert_allclose(y, equation(x, *weights), atol=1e-5)
    differences = numerical_gradients(equation, (x, *weights), dy)
    for a, b in zip(gradients, differences, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("heads", [(4, 2), (4, 1), (2, 2)], ids=str)
def test_equals_transformers_llama(heads):
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import (
        LlamaAttention,
        LlamaRotaryEmbedding,
    )

    config = LlamaConfig(
        hidden_size=DIM,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=6,
        attn_implementation="eager",
    )
    layer, x = make(*heads, head_dim=6), inputs()
    theirs = LlamaAttention(config, layer_idx=0).eval()
    with torch.no_grad():
        for name, ours in (
            ("q_proj", layer.query),
            ("k_proj", layer.key),
            ("v_proj", layer.value),
        ):
            kernel = to_numpy(ours.kernel.value).reshape(DIM, -1)
            getattr(theirs, name).weight.copy_(torch.tensor(kernel.T))
        kernel = to_numpy(layer.output_dense.kernel.value).reshape(-1, DIM)
        theirs.o_proj.weight.copy_(torch.tensor(kernel.T))
        tokens = torch.tensor(x)
        positions = LlamaRotaryEmbedding(config)(tokens, torch.arange(LENGTH)[None])
        causal = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)[None, None]
        y, _ = theirs(tokens, positions, causal)
    np.testing.assert_allclose(to_numpy(layer(x)), y.numpy(), atol=1e-5)


@pytest.mark.parametrize("name", ["grouped", "biased"])
def test_a_token_sees_none_after_it(name):
    layer, x = make(**HEADS[name]), inputs()
    y = to_numpy(layer(x))
    x[:, 4:] = inputs(seed=9)[:, 4:]
    changed = to_numpy(layer(x))
    np.testing.assert_allclose(changed[:, :4], y[:, :4], atol=1e-6)
    assert np.abs(changed[:, 4:] - y[:, 4:]).min() > 1e-6


@pytest.mark.parametrize("dtype", ["bool", "int32"])
@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("name", ["grouped", "biased", "capped_window"])
def test_padding_changes_nothing(name, side, dtype):
    layer, x = make(**HEADS[name]), inputs()
    mask = np.ones((2, LENGTH), bool)
    if side != "right":
        mask[0, :2] = mask[1, :1] = False
    if side != "left":
        mask[0, 5:] = mask[1, 6:] = False
    y = to_numpy(layer(x, mask=mask.astype(dtype)))
    assert np.isfinite(y).all()
    for got, sequence, real in zip(y, x, mask, strict=True):
        alone = expected(layer, sequence[real])
        np.testing.assert_allclose(got[real], alone, atol=1e-5)


@pytest.mark.parametrize("name", ["grouped", "biased"])
def test_a_row_of_padding_stays_finite(name):
    layer, x = make(**HEADS[name]), inputs()
    mask = np.stack([np.zeros(LENGTH, bool), np.ones(LENGTH, bool)])
    weights = [v.value for v in layer.trainable_variables]
    y, gradients = with_gradients(
        as_function(layer, mask=mask), (x, *weights), inputs(seed=6), COMPILED
    )
    np.testing.assert_allclose(y[1], expected(layer, x[1]), atol=1e-5)
    assert np.isfinite(y).all() and all(np.isfinite(g).all() for g in gradients)


class TestCache:
    ROOM = LENGTH + 3

    def empty(self, layer, fill=0.0):
        shape = (2, self.ROOM, layer.num_key_value_heads, layer.head_dim)
        # What lies in the cache past the last token must not matter.
        return (np.full(shape, fill, "f"), np.full(shape, -fill, "f"))

    @pytest.mark.parametrize("name", ["grouped", "multi_query", "biased"])
    @pytest.mark.parametrize("prefill", [0, 4])
    def test_steps_equal_one_pass(self, name, prefill):
        layer, x = make(**HEADS[name]), inputs()
        cache = tuple(map(ops.convert_to_tensor, self.empty(layer, fill=50.0)))
        outputs = []
        if prefill:
            y, cache = layer(x[:, :prefill], cache=cache, cache_index=0)
            outputs.append(y)
        for t in range(prefill, LENGTH):
            y, cache = layer(x[:, t : t + 1], cache=cache, cache_index=t)
            outputs.append(y)
        y = to_numpy(ops.concatenate(outputs, axis=1))
        for got, sequence in zip(y, x, strict=True):
            np.testing.assert_allclose(got, expected(layer, sequence), atol=1e-5)
        keys, values = to_numpy(cache)
        assert keys.shape == values.shape == self.empty(layer)[0].shape
        assert (keys[:, LENGTH:] == 50).all() and (values[:, LENGTH:] == -50).all()

    @pytest.mark.parametrize("mode", MODES)
    def test_one_program_serves_every_step(self, mode):
        layer, x = make(4, 2), inputs()
        _, cache = layer(x[:, :5], cache=self.empty(layer, 9.0), cache_index=0)

        def step(token, cache, index):
            return layer(token, cache=cache, cache_index=index)

        token = ops.convert_to_tensor(x[:, 5:6])
        index = ops.convert_to_tensor(5, "int32")
        y, _ = in_mode(step, mode)(token, cache, index)
        for got, sequence in zip(to_numpy(y), x, strict=True):
            alone = expected(layer, sequence[:6])
            np.testing.assert_allclose(got[0], alone[5], atol=1e-5)
        programs = {
            program(step, mode, token, cache, ops.convert_to_tensor(i, "int32"))
            for i in (5, 6)
        }
        assert len(programs) == 1

    def test_in_half_precision(self):
        layer, x = make(4, 2, dtype="mixed_bfloat16"), inputs()
        cache = tuple(ops.cast(part, "bfloat16") for part in self.empty(layer))
        y, cache = layer(x, cache=cache)
        assert {keras.backend.standardize_dtype(c.dtype) for c in cache} == {"bfloat16"}
        np.testing.assert_allclose(to_numpy(y), to_numpy(layer(x)), atol=0.05)


def test_dropout_only_in_training():
    layer, x = make(4, 2, dropout=0.5), inputs()
    y = to_numpy(layer(x))
    np.testing.assert_allclose(y[0], expected(layer, x[0]), atol=1e-5)
    dropped = to_numpy(layer(x, training=True))
    kept = dropped != 0
    assert 0.3 < kept.mean() < 0.7
    np.testing.assert_allclose(dropped[kept], 2 * y[kept], atol=1e-5)


@pytest.mark.parametrize("name", ["grouped", "biased"])
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "float16"])
def test_dtype_policies(policy, name):
    layer, x = make(**HEADS[name], dtype=policy), inputs(length=40)
    mask = np.arange(40)[None] < [[40], [30]]
    y = layer(x, mask=mask)
    assert keras.backend.standardize_dtype(y.dtype) == layer.compute_dtype
    for got, sequence, real in zip(to_numpy(y), x, mask, strict=True):
        alone = expected(layer, sequence[real])
        error = {"bfloat16": 0.03, "float16": 0.005}[layer.compute_dtype]
        tolerance = error * np.abs(alone).max()
        np.testing.assert_allclose(got[real], alone, atol=tolerance)
    assert np.isfinite(to_numpy(y)).all()


def test_takes_the_mask_of_an_embedding():
    layer = make(4, 2)
    embedding = keras.layers.Embedding(9, DIM, mask_zero=True)
    ids = np.array([[0, 0, 3, 4, 5, 6, 7]])
    y = to_numpy(layer(embedding(ids)))
    alone = expected(layer, to_numpy(embedding(ids))[0, 2:])
    np.testing.assert_allclose(y[0, 2:], alone, atol=1e-5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(num_query_heads=0), "`num_query_heads`.*num_query_heads=0"),
        (dict(num_key_value_heads=0), "`num_key_value_heads`.*num_key_value_heads=0"),
        (
            dict(num_key_value_heads=3),
            "`num_query_heads` must be a multiple of `num_key_value_heads`.*=4.*=3",
        ),
        (dict(head_dim=0), "`head_dim`.*head_dim=0"),
        (dict(positions="alibi"), "`positions`.*'rotary'.*positions='alibi'"),
        (dict(rope_theta=0), "`rope_theta`.*rope_theta=0"),
        (dict(dropout=1.0), "`dropout`.*dropout=1.0"),
        (dict(positions="relative_bias", relative_buckets=1), "`relative_buckets`.*=1"),
        (
            dict(positions="relative_bias", relative_max_distance=16),
            "`relative_max_distance`.*at least 17.*relative_max_distance=16",
        ),
        (dict(head_dim=5), "`head_dim` must be even.*head_dim=5"),
        (dict(num_query_heads=3), "multiple of `num_query_heads`.*8.*=3"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        layer = GroupedQueryAttention(**{"num_query_heads": 4, **arguments})
        layer.build((None, None, DIM))


@pytest.mark.parametrize("name", HEADS)
def test_config_round_trip(name, tmp_path):
    layer = make(**HEADS[name], dropout=0.1, kernel_initializer="he_normal")
    sequence = keras.Input((None, DIM))
    model = keras.Model(sequence, layer(sequence))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.layers[-1].get_config() == layer.get_config()
    x = inputs(1)
    np.testing.assert_array_equal(to_numpy(loaded(x)), to_numpy(model(x)))


def test_symbolic_calls():
    layer = make(4, 2, dtype="mixed_bfloat16")
    x = keras.Input((None, DIM))
    y = layer(x)
    assert tuple(y.shape) == (None, None, DIM) and y.dtype == "bfloat16"
    cache = [keras.Input((10, 2, 2), dtype="bfloat16") for _ in range(2)]
    y, updated = layer(x, cache=tuple(cache), cache_index=3)
    assert tuple(y.shape) == (None, None, DIM)
    assert [tuple(part.shape) for part in updated] == [(None, 10, 2, 2)] * 2


@pytest.mark.parametrize("settings", BIDIRECTIONAL.values(), ids=BIDIRECTIONAL)
@pytest.mark.parametrize("side", ["left", "right"])
def test_of_an_encoder(settings, side):
    layer, x = make(causal=False, **settings), inputs()
    mask = np.ones((2, LENGTH), bool)
    mask[0, slice(0, 2) if side == "left" else slice(5, None)] = False
    y = to_numpy(layer(x, mask=mask))
    for got, sequence, real in zip(y, x, mask, strict=True):
        np.testing.assert_allclose(
            got[real], expected(layer, sequence[real]), atol=1e-5
        )


@pytest.mark.parametrize("settings", [{}, {"soft_cap": 0.5}, {"positions": "rotary"}])
def test_adds_a_bias_from_outside(settings):
    layer = make(**{"num_query_heads": 2, "positions": None, **settings})
    x = inputs()
    bias = np.random.default_rng(7).normal(size=(1, 2, LENGTH, LENGTH))
    y = to_numpy(layer(x, position_bias=bias.astype("f")))
    for got, sequence in zip(y, x, strict=True):
        wanted = expected(layer, sequence, position_bias=bias[0])
        np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_dropout_of_weights_keeps_their_mean():
    layer = make(2, positions=None, weight_dropout=0.4)
    x = inputs(1)
    outside = to_numpy(layer(x))
    np.testing.assert_allclose(outside[0], expected(layer, x[0]), atol=1e-5)
    drawn = np.stack([to_numpy(layer(x, training=True)) for _ in range(400)])
    # Of 400 draws, whose spread says how far off their mean may be.
    error = drawn.std(0) / 20
    assert (np.abs(drawn.mean(0) - outside) < 5 * error + 1e-5).all()
    assert drawn.std(0).min() > 1e-3
