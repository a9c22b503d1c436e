import keras
import numpy as np
import pytest
from keras import ops

import keras_moe
from keras_moe.layers import CrossAttention, DecoderBlock, EncoderBlock
from keras_moe.models import MoEBackbone, MoESeq2SeqBackbone
from tests.models.small_models import (
    SEQ2SEQ,
    random_ids,
    small_seq2seq_backbone,
    small_seq2seq_lm,
    source_and_target,
)

SOURCES = [random_ids(7, seed=1), random_ids(4, seed=2)]
TARGETS = [random_ids(5, seed=3), random_ids(6, seed=4)]
OUTPUTS = ("encoder_sequence_output", "decoder_sequence_output")


def inputs():
    return source_and_target(SOURCES, TARGETS)


def states(backbone, batch):
    outputs = backbone(batch)
    return [ops.convert_to_numpy(outputs[name]) for name in OUTPUTS]


@pytest.mark.parametrize(
    "pattern, encoder, decoder",
    [
        ({}, [1], [1, 3]),
        ({"moe_every": 1, "moe_offset": 0}, [0, 1, 2], [0, 1, 2, 3]),
        ({"dense_first_layers": 2}, [], [3]),
        (
            {
                "moe_every": 1,
                "moe_offset": 0,
                "encoder_dense_layers": [0, 2],
                "decoder_dense_layers": [1],
            },
            [1],
            [0, 2, 3],
        ),
        ({"num_experts": 0}, [], []),
    ],
)
def test_layer_patterns(pattern, encoder, decoder):
    backbone = small_seq2seq_backbone(encoder_layers=3, decoder_layers=4, **pattern)
    for blocks, expected, kind in (
        (backbone.encoder_transformer_layers, encoder, EncoderBlock),
        (backbone.decoder_transformer_layers, decoder, DecoderBlock),
    ):
        assert all(isinstance(block, kind) for block in blocks)
        assert [i for i, b in enumerate(blocks) if b.is_mixture] == expected
    for block in backbone.encoder_transformer_layers:
        assert not block.attention.causal and block.cross_attention is None
    for block in backbone.decoder_transformer_layers:
        assert block.attention.causal
        assert isinstance(block.cross_attention, CrossAttention)
    assert len(backbone.mixtures) == len(encoder + decoder)


VARIANTS = {
    "switch": {},
    "capacity": {
        "dispatch": "capacity",
        "capacity_factor": 1.0,
        "capacity_group": "sequence",
    },
    "gshard": {"top_k": 2, "norm": "layer", "num_key_value_heads": 2},
    "st_moe": {
        "top_k": 2,
        "expert_gated": True,
        "activation": "gelu",
        "extra_dense": True,
        "tied_embeddings": False,
    },
    "rotary": {"positions": "rotary", "attention_scale": None, "output_norms": True},
    "nowhere": {"positions": None, "attention_bias": "all", "query_key_norm": "head"},
    "separate": {"tied_embeddings": False, "shared_embeddings": False},
    "dense": {"num_experts": 0, "dropout": 0.1, "attention_soft_cap": 2.0},
}


# With a capacity, tokens bear upon each other, and padding on the size of a group.
DROPLESS = {name: v for name, v in VARIANTS.items() if name != "capacity"}


@pytest.mark.parametrize("overrides", DROPLESS.values(), ids=DROPLESS)
def test_padding_changes_nothing(overrides):
    backbone = small_seq2seq_backbone(**overrides)
    together = states(backbone, inputs())
    for i, rows in enumerate(zip(SOURCES, TARGETS, strict=True)):
        alone = states(backbone, source_and_target(*([row] for row in rows)))
        for got, wanted, row in zip(together, alone, rows, strict=True):
            np.testing.assert_allclose(got[i, : len(row)], wanted[0], atol=2e-5)


@pytest.mark.parametrize("overrides", DROPLESS.values(), ids=DROPLESS)
def test_what_sees_what(overrides):
    backbone = small_seq2seq_backbone(**overrides)
    batch = inputs()
    source, target = states(backbone, batch)
    other = {name: value.copy() for name, value in batch.items()}
    other["decoder_token_ids"][0, 3] = (other["decoder_token_ids"][0, 3] + 1) % 50
    source_after, target_after = states(backbone, other)
    np.testing.assert_array_equal(source_after, source)
    np.testing.assert_allclose(target_after[0, :3], target[0, :3], atol=1e-5)
    assert np.abs(target_after[0, 3:5] - target[0, 3:5]).max() > 1e-3
    other = {name: value.copy() for name, value in batch.items()}
    other["encoder_token_ids"][0, 6] = (other["encoder_token_ids"][0, 6] + 1) % 50
    source_after, target_after = states(backbone, other)
    # Every token of a source, and of its target, but none of another.
    assert (np.abs(source_after[0] - source[0]).max(-1) > 1e-6).all()
    assert (np.abs(target_after[0] - target[0]).max(-1) > 1e-6)[:5].all()
    np.testing.assert_allclose(target_after[1], target[1], atol=1e-5)


def test_a_dense_one_is_t5():
    """Against T5 of Transformers, gated and with a table of buckets of its own size."""
    import torch
    import transformers

    config = transformers.T5Config(
        vocab_size=50,
        d_model=16,
        d_kv=6,
        d_ff=20,
        num_layers=2,
        num_decoder_layers=3,
        num_heads=3,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=6,
        feed_forward_proj="gated-silu",
        dropout_rate=0.0,
    )
    torch.manual_seed(0)
    theirs = transformers.T5ForConditionalGeneration(config).eval()
    backbone = MoESeq2SeqBackbone(
        vocabulary_size=50,
        encoder_layers=2,
        decoder_layers=3,
        hidden_dim=16,
        num_query_heads=3,
        head_dim=6,
        dense_dim=20,
        dense_gated=True,
        activation="silu",
        relative_buckets=8,
        relative_max_distance=6,
    )

    def assign(variable, tensor):
        array = tensor.detach().numpy()
        if variable.name == "kernel":
            array = array.T
        variable.assign(array.reshape(variable.shape))

    assign(backbone.token_embedding.embeddings, theirs.shared.weight)
    for name, stack in (("encoder", theirs.encoder), ("decoder", theirs.decoder)):
        first = stack.block[0].layer[0].SelfAttention
        bias = getattr(backbone, f"{name}_position_bias")
        assign(bias.embeddings, first.relative_attention_bias.weight)
        norm = getattr(backbone, f"{name}_layer_norm")
        assign(norm.scale, stack.final_layer_norm.weight)
        ours = getattr(backbone, f"{name}_transformer_layers")
        for block, their_block in zip(ours, stack.block, strict=True):
            *attentions, last = their_block.layer
            layers = [block.attention, block.cross_attention][: len(attentions)]
            norms = [block.attention_norm]
            if len(layers) == 2:
                norms.append(block.cross_attention_norm)
            for layer, norm, their_layer in zip(layers, norms, attentions, strict=True):
                assign(norm.scale, their_layer.layer_norm.weight)
                inner = (
                    getattr(their_layer, "SelfAttention", None)
                    or their_layer.EncDecAttention
                )
                for ours_name, theirs_name in zip(
                    ("query", "key", "value", "output_dense"), "qkvo", strict=True
                ):
                    kernel = getattr(layer, ours_name).kernel
                    assign(kernel, getattr(inner, theirs_name).weight)
            assign(block.feed_forward_norm.scale, last.layer_norm.weight)
            dense = last.DenseReluDense
            assign(block.feed_forward.gate.kernel, dense.wi_0.weight)
            assign(block.feed_forward.up.kernel, dense.wi_1.weight)
            assign(block.feed_forward.down.kernel, dense.wo.weight)
    batch = inputs()
    with torch.no_grad():
        expected = theirs(
            input_ids=torch.tensor(batch["encoder_token_ids"]).long(),
            attention_mask=torch.tensor(batch["encoder_padding_mask"]).long(),
            decoder_input_ids=torch.tensor(batch["decoder_token_ids"]).long(),
        ).logits.numpy()
    logits = backbone.logits(backbone(batch)["decoder_sequence_output"])
    real = batch["decoder_padding_mask"].astype(bool)
    logits = ops.convert_to_numpy(logits)[real]
    np.testing.assert_allclose(logits, expected[real], atol=1e-4)


def test_all_layers_of_a_stack_share_a_bias():
    backbone = small_seq2seq_backbone()
    tables = [w for w in backbone.weights if "position_bias" in w.path]
    assert [tuple(w.shape) for w in tables] == [(32, 4)] * 2


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
def test_plans_what_is_built(overrides):
    backbone = small_seq2seq_backbone(**overrides)
    config = {**SEQ2SEQ, **overrides}
    for of in (backbone, config, keras.saving.serialize_keras_object(backbone)):
        plan = keras_moe.plan(of, sequence_length=8, dtype="float32")
        assert plan.total_parameters == backbone.count_params()
        assert plan.weight_bytes == 4 * backbone.count_params()


def test_operations_of_a_plan():
    # A token of the source and one of the target, by hand.
    plan = keras_moe.plan(
        {**SEQ2SEQ, "encoder_layers": 1, "decoder_layers": 1, "num_experts": 0},
        sequence_length=8,
        batch_size=2,
        dtype="float32",
    )
    attention, dense, scores = 4 * 16 * 24, 2 * 16 * 32, 2 * 8 * 24
    products = 3 * (attention + scores) + 2 * dense + 16 * 50
    assert plan.flops_per_token == 2 * products
    # Keys and values of the target, and of the source.
    assert plan.cache_bytes == 2 * 8 * 2 * 2 * 24 * 4


@pytest.mark.parametrize(
    "overrides, named",
    [
        ({"encoder_layers": 0}, "encoder_layers=0"),
        ({"decoder_layers": None}, "decoder_layers=None"),
        ({"encoder_dense_layers": [2]}, "encoder_dense_layers.*2"),
        ({"decoder_dense_layers": [0, 5]}, "decoder_dense_layers.*5"),
        ({"dense_dim": None}, "`dense_dim`"),
        ({"expert_dim": None}, "`expert_dim`"),
        (
            {
                "moe_every": 1,
                "moe_offset": 0,
                "extra_dense": True,
                "dense_dim": None,
            },
            "`dense_dim`",
        ),
        ({"shared_embeddings": False}, "shared_embeddings=False.*tied_embeddings"),
        ({"attention_scale": 0.0}, "attention_scale=0.0"),
        ({"initializer_scale": -1}, "initializer_scale=-1"),
        ({"expert_dropout": 1.0}, "expert_dropout=1.0"),
        ({"relative_buckets": 3}, "relative_buckets=3"),
        ({"relative_buckets": 33}, "relative_buckets.*even.*33"),
        ({"num_layers": 3}, "'num_layers'"),
        ({"sliding_window": 3}, "'sliding_window'"),
    ],
)
def test_bad_settings(overrides, named):
    with pytest.raises(ValueError, match=named):
        small_seq2seq_backbone(**overrides)


def _changed(name, value):
    batch = inputs()
    batch[name] = value
    return batch


@pytest.mark.parametrize(
    "batch, named",
    [
        (source_and_target(SOURCES, [TARGETS[0]]), "as many sources as targets"),
        (source_and_target([random_ids(13)], [TARGETS[0]]), "`encoder_token_ids`.*12"),
        (source_and_target([SOURCES[0]], [random_ids(13)]), "`decoder_token_ids`.*12"),
        (_changed("encoder_token_ids", np.full((2, 7), 50)), "`encoder_token_ids`.*50"),
        (_changed("decoder_token_ids", np.full((2, 6), -1)), "`decoder_token_ids`.*-1"),
        (
            _changed("encoder_padding_mask", np.array([[1] * 7, [0] * 7])),
            "`encoder_padding_mask`.*nothing but padding",
        ),
    ],
    ids=["batches", "source", "target", "source_ids", "target_ids", "padding"],
)
def test_bad_inputs(batch, named):
    _assert_refused(batch, named)


@pytest.mark.parametrize("of", [np.asarray, ops.convert_to_tensor, np.ndarray.tolist])
@pytest.mark.parametrize(
    "changes, named",
    [
        ({"decoder_token_ids": None}, "must be a dict of.*'decoder_token_ids'"),
        ({"encoder_padding_mask": np.ones((2, 6))}, "the shape of `encoder_token_ids`"),
        ({"decoder_padding_mask": np.ones((2, 7))}, "the shape of `decoder_token_ids`"),
        ({"decoder_padding_mask": np.ones((2,))}, "`decoder_padding_mask`.*rank 2"),
        (source_and_target(SOURCES, [TARGETS[0]]), "as many sources as targets"),
        (
            {
                "encoder_token_ids": np.zeros((2, 0), "int32"),
                "encoder_padding_mask": np.zeros((2, 0), "int32"),
            },
            "`encoder_token_ids`.*at least one token",
        ),
    ],
    ids=["missing", "source_mask", "target_mask", "rank", "batches", "empty"],
)
def test_inputs_that_do_not_fit(changes, named, of):
    batch = {**inputs(), **changes}
    _assert_refused({k: of(v) for k, v in batch.items() if v is not None}, named)


def _assert_refused(batch, named):
    seq2seq_lm = small_seq2seq_lm(context_length=12)
    for call in (
        seq2seq_lm,
        seq2seq_lm.backbone,
        seq2seq_lm.backbone.routing_statistics,
    ):
        with pytest.raises(ValueError, match=named):
            call(batch)
    with pytest.raises(ValueError, match=named):
        seq2seq_lm.generate(batch, stop_token_ids=None)


def test_a_source_of_padding_stays_finite():
    # As a tensor it is not looked into.
    backbone = small_seq2seq_backbone()
    batch = {name: ops.convert_to_tensor(value) for name, value in inputs().items()}
    batch["encoder_padding_mask"] = ops.zeros((2, 7), "int32")
    assert all(np.isfinite(s).all() for s in states(backbone, batch))


def test_routing_statistics():
    backbone = small_seq2seq_backbone()
    encoder, decoder = backbone.routing_statistics(inputs())
    assert float(encoder.tokens) == 11 and float(decoder.tokens) == 11
    assert float(ops.sum(encoder.assignments)) == 11
    padded = small_seq2seq_backbone(route_padding=True)
    encoder, decoder = padded.routing_statistics(inputs())
    assert float(encoder.tokens) == 14 and float(decoder.tokens) == 12


def test_initial_scale():
    """Switch, section 2.4: standard deviation sqrt(s / n), n the inputs."""
    backbone = MoESeq2SeqBackbone(
        **{
            **SEQ2SEQ,
            "hidden_dim": 64,
            "num_query_heads": 8,
            "head_dim": 16,
            "expert_dim": 96,
            "dense_dim": 80,
            "initializer_scale": 0.1,
            "vocabulary_size": 500,
        }
    )
    block, dense = (backbone.decoder_transformer_layers[i] for i in (1, 0))
    for variable, inputs_ in (
        (block.attention.key.kernel, 64),
        (block.cross_attention.value.kernel, 64),
        (block.attention.output_dense.kernel, 128),
        (block.feed_forward.experts.up_kernel, 64),
        (block.feed_forward.experts.down_kernel, 96),
        (block.feed_forward.router.kernel, 64),
        (dense.feed_forward.down.kernel, 80),
        # Logits are not divided by sqrt(16): queries are.
        (block.attention.query.kernel, 64 * 16),
    ):
        values = ops.convert_to_numpy(variable)
        deviation = np.sqrt(0.1 / inputs_)
        np.testing.assert_allclose(values.std(), deviation, rtol=0.1)
        assert np.abs(values).max() < 2.3 * deviation  # truncated
    embeddings = ops.convert_to_numpy(backbone.token_embedding.embeddings)
    np.testing.assert_allclose(embeddings.std(), 1.0, rtol=0.05)


def test_dropout_and_recomputation_in_training():
    def loss_of(**overrides):
        keras.utils.set_random_seed(0)
        backbone = small_seq2seq_backbone(**overrides)
        outputs = backbone(inputs(), training=True)
        return [ops.convert_to_numpy(outputs[name]) for name in OUTPUTS], backbone

    plain, _ = loss_of()
    dropped, backbone = loss_of(dropout=0.3, expert_dropout=0.5)
    assert all(np.abs(a - b).max() > 0.1 for a, b in zip(plain, dropped, strict=True))
    again, _ = loss_of(dropout=0.3, expert_dropout=0.5, recompute=True)
    for a, b in zip(dropped, again, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    mixture = backbone.mixtures[0]
    assert mixture.experts.dropout == 0.5
    # And the gradients, of what was dropped alike.
    steps = []
    for recompute in (False, True):
        keras.utils.set_random_seed(0)
        seq2seq_lm = small_seq2seq_lm(
            dropout=0.3,
            expert_dropout=0.5,
            recompute=recompute,
            router_jitter=0.1,
            balance_loss=0.1,
            z_loss=0.01,
        )
        seq2seq_lm.compile(optimizer=keras.optimizers.SGD(0.1))
        start = seq2seq_lm.get_weights()
        seq2seq_lm.fit(inputs(), random_ids(2, 6, seed=9), verbose=0)
        steps.append(seq2seq_lm.get_weights())
        moved = [np.abs(a - b).max() for a, b in zip(start, steps[-1], strict=True)]
        assert np.mean(np.array(moved) > 0) > 0.9
    for plain, anew in zip(*steps, strict=True):
        np.testing.assert_allclose(anew, plain, atol=1e-5)
    assert backbone.encoder_transformer_layers[0].feed_forward.dropout == 0.3
    kept = small_seq2seq_backbone(dropout=0.2).mixtures[0]
    assert kept.experts.dropout == 0.2


def test_decoders_take_the_new_settings_too():
    settings = {
        "vocabulary_size": 50,
        "num_layers": 2,
        "hidden_dim": 16,
        "num_query_heads": 2,
        "num_experts": 4,
        "expert_dim": 8,
        "dense_dim": 12,
        "extra_dense": True,
        "attention_scale": 1.0,
        "initializer_scale": 0.1,
        "expert_dropout": 0.1,
        "tied_embeddings": True,
        "output_multiplier": None,
    }
    backbone = MoEBackbone(**settings)
    ids = random_ids(2, 5)
    hidden = backbone({"token_ids": ids, "padding_mask": np.ones_like(ids)})
    logits = ops.convert_to_numpy(backbone.logits(hidden))
    table = ops.convert_to_numpy(backbone.token_embedding.embeddings)
    wanted = ops.convert_to_numpy(hidden) @ table.T / 4
    np.testing.assert_allclose(logits, wanted, atol=1e-5)
    plan = keras_moe.plan(settings, sequence_length=4)
    assert plan.total_parameters == backbone.count_params()


@pytest.mark.parametrize("variant", ["switch", "st_moe", "separate"])
def test_saving(variant, tmp_path):
    backbone = small_seq2seq_backbone(**VARIANTS[variant])
    expected = states(backbone, inputs())
    backbone.save_to_preset(str(tmp_path / "preset"))
    loaded = MoESeq2SeqBackbone.from_preset(str(tmp_path / "preset"))
    assert loaded.get_config() == backbone.get_config()
    for a, b in zip(states(loaded, inputs()), expected, strict=True):
        np.testing.assert_array_equal(a, b)
    smaller = MoESeq2SeqBackbone.from_preset(
        str(tmp_path / "preset"), load_weights=False, decoder_layers=1
    )
    assert len(smaller.decoder_transformer_layers) == 1
