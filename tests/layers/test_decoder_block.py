import keras
import numpy as np
import pytest
from keras import ops

from keras_moe.layers import (
    CrossAttention,
    DecoderBlock,
    FeedForward,
    GroupedQueryAttention,
    MixtureOfExperts,
    RoutingStatistics,
)
from tests.execution import (
    MODES,
    as_function,
    in_mode,
    wait_for_runs,
    when_run,
    with_gradients,
)
from tests.execution import numpy as to_numpy
from tests.layers import attentions
from tests.layers.mixtures import reference_of
from tests.references.attention import layer_norm, rms_norm
from tests.references.mixture import feed_forward

DIM, LENGTH = 8, 6


def mixture(**settings):
    return MixtureOfExperts(5, 6, **{"top_k": 2, **settings})


KINDS = {"dense": lambda: FeedForward(6), "mixture": mixture}


def make(kind="mixture", seed=0, attention=None, feed_forward=None, **settings):
    attention = GroupedQueryAttention(4, 2, **(attention or {}))
    block = DecoderBlock(attention, feed_forward or KINDS[kind](), **settings)
    block.build((None, None, DIM))
    attentions.randomize(block, seed)
    x = np.random.default_rng(seed + 1).normal(size=(2, LENGTH, DIM))
    return block, x.astype("float32")


def norm_of(layer, x):
    weights = [to_numpy(v.value) for v in layer.trainable_variables]
    if isinstance(layer, keras.layers.RMSNormalization):
        return rms_norm(x, *weights, layer.epsilon)
    return layer_norm(x, weights[0], sum(weights[1:]), layer.epsilon)


def expected(block, sequence):
    """The block's output for one sequence `[T, D]`, in float64."""
    x = np.asarray(sequence, "float64")
    y = attentions.expected(block.attention, norm_of(block.attention_norm, x))
    x = x + (norm_of(block.attention_output_norm, y) if block.output_norms else y)
    normed = norm_of(block.feed_forward_norm, x)
    weights = [to_numpy(v.value) for v in block.feed_forward.trainable_variables]
    if block.is_mixture:
        y = reference_of(block.feed_forward)(normed, *weights)
    else:
        named = attentions.named(block.feed_forward)
        y = feed_forward(normed, named["up"], named["down"], named["gate"])
    return x + (norm_of(block.feed_forward_output_norm, y) if block.output_norms else y)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "norm, epsilon", [("rms", 1e-6), ("layer", 0.1), ("layer_no_bias", 1e-5)]
)
@pytest.mark.parametrize("output_norms", [False, True], ids=["", "output_norms"])
def test_equals_its_parts(kind, norm, epsilon, output_norms):
    block, x = make(kind, norm=norm, norm_epsilon=epsilon, output_norms=output_norms)
    assert block.is_mixture == (kind == "mixture")
    y = to_numpy(block(x))
    for got, sequence in zip(y, x, strict=True):
        np.testing.assert_allclose(got, expected(block, sequence), atol=5e-5)


@pytest.mark.parametrize("mode", MODES)
def test_in_every_mode(mode):
    block, x = make()
    function = in_mode(as_function(block), mode)
    weights = [v.value for v in block.trainable_variables]
    y = to_numpy(function(ops.convert_to_tensor(x), *weights))
    for got, sequence in zip(y, x, strict=True):
        np.testing.assert_allclose(got, expected(block, sequence), atol=5e-5)


def test_equals_transformers_mixtral():
    import torch
    from transformers import MixtralConfig, MixtralModel

    config = MixtralConfig(
        vocab_size=11,
        hidden_size=DIM,
        intermediate_size=6,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=5,
        num_experts_per_tok=2,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        attn_implementation="eager",
        experts_implementation="eager",
        pad_token_id=None,
    )
    block, x = make()
    model = MixtralModel(config).eval()
    theirs, attention, moe = model.layers[0], block.attention, block.feed_forward

    def copy(parameter, values):
        parameter.copy_(torch.tensor(values).reshape(parameter.shape))

    with torch.no_grad():
        for name, ours in (("q", "query"), ("k", "key"), ("v", "value")):
            kernel = to_numpy(getattr(attention, ours).kernel.value).reshape(DIM, -1)
            copy(getattr(theirs.self_attn, f"{name}_proj").weight, kernel.T)
        kernel = to_numpy(attention.output_dense.kernel.value).reshape(-1, DIM)
        copy(theirs.self_attn.o_proj.weight, kernel.T)
        for norm, ours in (
            (theirs.input_layernorm, block.attention_norm),
            (theirs.post_attention_layernorm, block.feed_forward_norm),
        ):
            copy(norm.weight, to_numpy(ours.trainable_variables[0].value))
        copy(theirs.mlp.gate.weight, to_numpy(moe.router.kernel.value).T)
        gate, up, down = (
            to_numpy(kernel.value).transpose(0, 2, 1)
            for kernel in (
                moe.experts.gate_kernel,
                moe.experts.up_kernel,
                moe.experts.down_kernel,
            )
        )
        copy(theirs.mlp.experts.gate_up_proj, np.concatenate([gate, up], axis=1))
        copy(theirs.mlp.experts.down_proj, down)
        model.norm = torch.nn.Identity()
        y = model(inputs_embeds=torch.tensor(x)).last_hidden_state
    np.testing.assert_allclose(to_numpy(block(x)), y.numpy(), atol=5e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(kind, side):
    block, x = make(kind)
    mask = np.ones((2, LENGTH), bool)
    mask[0, slice(0, 2) if side == "left" else slice(4, None)] = False
    y = to_numpy(block(x, padding_mask=mask))
    for got, sequence, real in zip(y, x, mask, strict=True):
        alone = expected(block, sequence[real])
        np.testing.assert_allclose(got[real], alone, atol=5e-5)


def test_padding_takes_no_capacity():
    settings = dict(top_k=1, dispatch="capacity", capacity=1, capacity_group="batch")
    block, x = make(feed_forward=mixture(**settings))
    x[0, :3] = x[0, 3:] = x[0, 0]  # all tokens want one expert
    mask = np.array([[0, 0, 0, 1, 1, 1], [0] * 6], bool)
    _, statistics = block(x, padding_mask=mask, return_statistics=True)
    assert float(statistics.tokens) == 3
    assert float(ops.sum(statistics.assignments)) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_takes_the_mask_of_an_embedding(kind):
    block, _ = make(kind)
    embedding = keras.layers.Embedding(9, DIM, mask_zero=True)
    ids = np.array([[0, 0, 3, 4, 5, 6]])
    embedded = embedding(ids)
    y = to_numpy(block(embedded))
    alone = expected(block, to_numpy(embedded)[0, 2:])
    np.testing.assert_allclose(y[0, 2:], alone, atol=5e-5)
    # And hands it on.
    mean = to_numpy(keras.layers.GlobalAveragePooling1D()(block(embedded)))
    np.testing.assert_allclose(mean[0], alone.mean(axis=0), atol=5e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_cached_steps_equal_one_pass(kind):
    block, x = make(kind)
    cache = tuple(ops.zeros((2, LENGTH + 2, 2, 2)) for _ in range(2))
    y, cache = block(x[:, :3], cache=cache, cache_index=0)
    outputs = [y]
    for t in range(3, LENGTH):
        y, cache = block(x[:, t : t + 1], cache=cache, cache_index=t)
        outputs.append(y)
    y = to_numpy(ops.concatenate(outputs, axis=1))
    for got, sequence in zip(y, x, strict=True):
        np.testing.assert_allclose(got, expected(block, sequence), atol=5e-5)


class TestStatistics:
    def test_of_a_mixture(self):
        block, x = make(feed_forward=mixture(balance_loss=0.1))
        y, statistics = block(x, training=True, return_statistics=True)
        assert isinstance(statistics, RoutingStatistics)
        assert float(ops.sum(statistics.assignments)) == 2 * 2 * LENGTH
        assert not block.losses
        np.testing.assert_allclose(to_numpy(y), to_numpy(block(x)), atol=1e-5)
        block(x, training=True)
        assert len(block.losses) == 1

    def test_of_a_dense_block(self):
        block, x = make("dense")
        y, statistics = block(x, return_statistics=True)
        assert statistics is None
        np.testing.assert_allclose(to_numpy(y), to_numpy(block(x)), atol=1e-5)

    def test_with_a_cache(self):
        block, x = make()
        cache = tuple(ops.zeros((2, LENGTH, 2, 2)) for _ in range(2))
        y, updated, statistics = block(x, cache=cache, return_statistics=True)
        assert tuple(updated[0].shape) == (2, LENGTH, 2, 2)
        assert float(statistics.tokens) == 2 * LENGTH
        np.testing.assert_allclose(to_numpy(y), to_numpy(block(x)), atol=5e-5)


def test_dropout_only_in_training():
    block, x = make("dense", dropout=0.5)
    y = to_numpy(block(x))
    np.testing.assert_allclose(y[0], expected(block, x[0]), atol=5e-5)
    assert np.abs(to_numpy(block(x, training=True)) - y).max() > 1e-2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(norm="batch"), "`norm`.*'rms'.*norm='batch'"),
        (dict(norm_epsilon=0.0), "`norm_epsilon`.*norm_epsilon=0.0"),
        (dict(dropout=-0.1), "`dropout`.*dropout=-0.1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DecoderBlock(GroupedQueryAttention(2), FeedForward(4), **arguments)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("built", [False, True])
def test_config_round_trip(kind, built, tmp_path):
    block, x = make(kind, norm="layer", norm_epsilon=0.01, dropout=0.1)
    if not built:
        config = block.get_config()
        block = DecoderBlock.from_config(config)
    copy = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(block)
    )
    assert copy.attention.get_config() == block.attention.get_config()
    assert copy.feed_forward.get_config() == block.feed_forward.get_config()
    for name in ("norm", "norm_epsilon", "dropout"):
        assert copy.get_config()[name] == block.get_config()[name]
    inputs = keras.Input((None, DIM))
    model = keras.Model(inputs, block(inputs))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(to_numpy(loaded(x)), to_numpy(model(x)))


def test_symbolic_calls():
    block, x = make()
    inputs = keras.Input((LENGTH, DIM))
    y, statistics = block(inputs, return_statistics=True)
    model = keras.Model(inputs, [y, statistics.assignments])
    y, assignments = to_numpy(model(x))
    np.testing.assert_allclose(y, to_numpy(block(x)), atol=1e-6)
    _, statistics = block(x, return_statistics=True)
    np.testing.assert_array_equal(assignments, to_numpy(statistics.assignments))
    cache = tuple(keras.Input((9, 2, 2)) for _ in range(2))
    y, updated = block(inputs, cache=cache, cache_index=1)
    assert tuple(y.shape) == (None, LENGTH, DIM)
    assert [tuple(part.shape) for part in updated] == [(None, 9, 2, 2)] * 2


@pytest.mark.parametrize(("recompute", "times"), [(False, 1), (True, 2)])
def test_recomputing_happens(recompute, times):
    """A hidden feature that is not kept is computed again for the gradient."""
    runs = []

    def activation(x):
        when_run(lambda: runs.append(None))
        return ops.silu(x)

    block, x = make(
        feed_forward=FeedForward(6, activation=activation), recompute=recompute
    )
    runs.clear()
    with_gradients(lambda x: block(x, training=True), [x], np.ones_like(x))
    wait_for_runs()
    assert len(runs) == times
    runs.clear()
    block(x, training=False)
    wait_for_runs()
    assert len(runs) == 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_recomputing_changes_nothing(kind, mode):
    # Dropout, jitter and the router's choices draw from seeds, which must advance
    # once.
    def run(recompute):
        keras.utils.set_random_seed(0)
        feed_forward = FeedForward(6)
        if kind == "mixture":
            feed_forward = mixture(
                router_jitter=0.3,
                second_choice_threshold=0.5,
                balance_loss=0.1,
                z_loss=0.1,
                seed=1,
            )
        block, x = make(
            feed_forward=feed_forward,
            attention=dict(dropout=0.2),
            dropout=0.3,
            recompute=recompute,
        )
        state = block.non_trainable_variables

        def function(x, *weights):
            mapping = zip(
                block.trainable_variables + state, [*weights, *before], strict=True
            )
            with keras.StatelessScope([*mapping], collect_losses=True) as scope:
                y = block(x, training=True)
                total = sum(scope.losses) if scope.losses else 0.0
            return ops.concatenate(
                [ops.reshape(y, (-1,)), ops.reshape(total + 0.0 * y[0, 0, 0], (1,))]
            )

        before = [v.value for v in state]
        weights = [to_numpy(v.value).astype("f") for v in block.trainable_variables]
        dy = np.random.default_rng(2).normal(size=x.size + 1).astype("f")
        result = with_gradients(function, (x, *weights), dy, mode)
        block(x, training=True)
        return result, to_numpy([v.value for v in block.non_trainable_variables])

    (y, gradients), state = run(True)
    (y_expected, expected_gradients), expected_state = run(False)
    np.testing.assert_allclose(y, y_expected, atol=1e-5)
    for a, b in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    for a, b in zip(state, expected_state, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


class TestWithASource:
    """Cross-attention, and a dense block after the mixture."""

    S = 4

    def make(self, kind="mixture", **settings):
        block, x = make(
            kind,
            cross_attention=CrossAttention(4, 2),
            extra_feed_forward=FeedForward(5, "relu", gated=False),
            **settings,
        )
        source = np.random.default_rng(9).normal(size=(2, self.S, DIM))
        return block, x, source.astype("float32")

    def expected(self, block, sequence, source):
        x = np.asarray(sequence, "float64")
        x = x + attentions.expected(block.attention, norm_of(block.attention_norm, x))
        normed = norm_of(block.cross_attention_norm, x)
        x = x + attentions.expected(block.cross_attention, normed, source=source)
        normed = norm_of(block.feed_forward_norm, x)
        weights = [to_numpy(v.value) for v in block.feed_forward.trainable_variables]
        if block.is_mixture:
            x = x + reference_of(block.feed_forward)(normed, *weights)
        else:
            named = attentions.named(block.feed_forward)
            x = x + feed_forward(normed, named["up"], named["down"], named["gate"])
        normed = norm_of(block.extra_feed_forward_norm, x)
        named = attentions.named(block.extra_feed_forward)
        return x + feed_forward(normed, named["up"], named["down"], activation="relu")

    @pytest.mark.parametrize("kind", KINDS)
    def test_equals_its_parts(self, kind):
        block, x, source = self.make(kind, norm="layer")
        mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0]], bool)
        y = to_numpy(block(x, source=source, source_mask=mask))
        for i, real in enumerate(mask):
            wanted = self.expected(block, x[i], source[i][real])
            np.testing.assert_allclose(y[i], wanted, atol=5e-5)

    def test_cached_steps_equal_one_pass(self):
        block, x, source = self.make()
        own = tuple(ops.zeros((2, LENGTH, 2, 2)) for _ in range(2))
        cache = own, block.cross_attention.project_source(source)
        outputs = []
        for t in range(LENGTH):
            y, cache = block(x[:, t : t + 1], cache=cache, cache_index=t)
            outputs.append(y)
        y = to_numpy(ops.concatenate(outputs, axis=1))
        for i in range(2):
            wanted = self.expected(block, x[i], source[i])
            np.testing.assert_allclose(y[i], wanted, atol=5e-5)

    @pytest.mark.parametrize("mode", MODES)
    def test_recomputing_changes_nothing(self, mode):
        results = []
        bias = np.random.default_rng(4).normal(size=(1, 4, LENGTH, LENGTH)).astype("f")
        for recompute in (False, True):
            keras.utils.set_random_seed(0)
            block, x, source = self.make(recompute=recompute)
            variables = block.trainable_variables

            def function(x, source, bias, *weights, block=block, variables=variables):
                mapping = zip(variables, weights, strict=True)
                with keras.StatelessScope([*mapping]):
                    return block(x, source=source, position_bias=bias, training=True)

            weights = [to_numpy(v.value).astype("f") for v in variables]
            dy = np.random.default_rng(2).normal(size=x.shape).astype("f")
            inputs = (x, source, bias, *weights)
            results.append(with_gradients(function, inputs, dy, mode))
        (y, gradients), (y_again, gradients_again) = results
        np.testing.assert_allclose(y, y_again, atol=1e-5)
        for a, b in zip(gradients, gradients_again, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
        # The source's and the bias's own gradients reach them.
        assert all(np.abs(g).max() > 1e-3 for g in gradients[:3])

    def test_config_round_trip(self, tmp_path):
        block, x, source = self.make()
        inputs = keras.Input((None, DIM)), keras.Input((None, DIM))
        model = keras.Model(inputs, block(inputs[0], source=inputs[1]))
        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        np.testing.assert_array_equal(
            to_numpy(loaded([x, source])), to_numpy(model([x, source]))
        )


def test_a_source_needs_cross_attention():
    block, x = make("dense")
    with pytest.raises(ValueError, match=r"`source` needs.*\(2, 6, 8\)"):
        block(x, source=x)
