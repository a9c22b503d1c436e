import keras
import numpy as np
import pytest
import torch
import transformers
from keras import ops

from keras_moe.layers import MixtureOfExperts
from keras_moe.models import MoEBackbone
from tests.models.small_models import (
    LATENT,
    SETTINGS,
    full,
    padded,
    random_ids,
    small_backbone,
    small_causal_lm,
)


def _mixture_indices(backbone):
    layers = backbone.transformer_layers
    return [i for i, layer in enumerate(layers) if layer.is_mixture]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"moe_every": 2, "moe_offset": 1}, [1, 3]),
        ({"dense_first_layers": 2}, [2, 3, 4]),
        ({"moe_every": 2, "dense_first_layers": 1}, [2, 4]),
        ({"dense_layers": [3, 1]}, [0, 2, 4]),
        ({"moe_every": 2, "dense_layers": [2], "dense_first_layers": 1}, [4]),
        ({"num_experts": 0}, []),
    ],
)
def test_layer_pattern(pattern, expected):
    settings = {**SETTINGS, "num_layers": 5, "dense_first_layers": 0, **pattern}
    backbone = MoEBackbone(**settings)
    assert _mixture_indices(backbone) == expected
    assert all(isinstance(m, MixtureOfExperts) for m in backbone.mixtures)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ({"top_k": 5}, "top_k"),
        ({"top_k": 0}, "top_k"),
        ({"num_layers": 0}, "num_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"hidden_dim": 18}, "hidden_dim"),
        ({"hidden_dim": 12}, "head_dim"),
        ({"moe_offset": 1}, "moe_offset"),
        ({"expert_dim": None}, "expert_dim"),
        ({"dense_dim": None}, "dense_dim"),
        ({"router": "best"}, "router"),
        ({"dispatch": "random"}, "dispatch"),
        ({"dispatch": "capacity"}, "capacity_factor"),
        ({"dispatch": "capacity", "capacity_factor": -1.0}, "capacity_factor"),
        ({"positions": "sinusoidal"}, "positions"),
        ({"norm": "batch"}, "norm"),
        ({"activation": "quadratic"}, "`activation`"),
        ({"context_length": 0}, "context_length"),
        ({"dropout": 1.0}, "dropout"),
        ({"initializer_stddev": 0.0}, "initializer_stddev"),
        ({"num_expert": 4}, "'num_expert'"),
        ({"attention": "linear"}, "`attention`.*'linear'"),
        ({"key_value_rank": 4}, "`key_value_rank` must be None.*4"),
        ({"attention": "latent"}, "`num_key_value_heads` must be None.*2"),
        ({**LATENT, "value_head_dim": None}, "`value_head_dim`.*None"),
        ({**LATENT, "positions": "relative_bias"}, "`positions`.*relative_bias"),
        ({"sliding_layers": [0]}, "`sliding_layers` needs a `sliding_window`"),
        ({"sliding_window": 4, "sliding_layers": [2]}, "sliding_layers.*2"),
        ({"dense_layers": [0, 9]}, "dense_layers.*9"),
        ({"embedding_multiplier": 0}, "embedding_multiplier"),
        ({"rope_scaling": {"type": "magic"}}, "rope_scaling.*'magic'"),
        ({"expert_groups": 3}, "`num_experts` must be a multiple of `expert_groups`"),
    ],
)
def test_bad_settings_are_named(override, named):
    with pytest.raises(ValueError, match=named):
        small_backbone(**override)


@pytest.mark.parametrize("positions", ["rotary", "relative_bias"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(positions, side):
    backbone = small_backbone(positions=positions)
    rows = [random_ids(5, seed=1), random_ids(8, seed=2)]
    inputs = padded(rows, 11, side)
    outputs = ops.convert_to_numpy(backbone(inputs))
    for i, row in enumerate(rows):
        alone = ops.convert_to_numpy(backbone(full(row[None])))[0]
        together = outputs[i][inputs["padding_mask"][i]]
        np.testing.assert_allclose(together, alone, atol=2e-5)


@pytest.mark.parametrize("positions", ["rotary", "relative_bias"])
def test_no_token_sees_a_later_one(positions):
    backbone = small_backbone(positions=positions)
    ids = random_ids(1, 9)
    changed = ids.copy()
    changed[0, 6:] = (ids[0, 6:] + 7) % 50
    before, after = (ops.convert_to_numpy(backbone(full(i)))[0] for i in (ids, changed))
    np.testing.assert_allclose(after[:6], before[:6], atol=1e-6)
    assert np.abs(after[6:] - before[6:]).max() > 1e-2


def test_multipliers_of_embeddings_and_logits():
    """Equal to the same model with the matrices multiplied, where these are apart."""
    factors = {"embedding_multiplier": 4.0, "output_multiplier": 0.5}
    plain, scaled = small_causal_lm(), small_causal_lm(**factors)
    scaled.set_weights(plain.get_weights())
    embedding = plain.backbone.token_embedding
    embedding.embeddings.assign(embedding.embeddings * 4.0)
    embedding.reverse_embeddings.assign(embedding.reverse_embeddings * 0.5)
    inputs = full(random_ids(2, 7))
    expected = ops.convert_to_numpy(plain(inputs))
    np.testing.assert_allclose(
        ops.convert_to_numpy(scaled(inputs)), expected, atol=1e-5
    )
    scored = scaled.score(inputs["token_ids"])
    np.testing.assert_allclose(ops.convert_to_numpy(scored), expected, atol=1e-5)


def test_equals_transformers_mixtral():
    config = transformers.MixtralConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=8,
        num_local_experts=5,
        num_experts_per_tok=2,
        rope_theta=5e4,
        rms_norm_eps=1e-5,
        initializer_range=0.2,
        sliding_window=None,
    )
    torch.manual_seed(0)
    theirs = transformers.MixtralForCausalLM(config).eval()
    ours = MoEBackbone(
        vocabulary_size=50,
        hidden_dim=24,
        expert_dim=20,
        num_layers=2,
        num_query_heads=6,
        num_key_value_heads=3,
        head_dim=8,
        num_experts=5,
        top_k=2,
        rope_theta=5e4,
        norm_epsilon=1e-5,
    )
    weights = {n: p.detach().numpy() for n, p in theirs.state_dict().items()}
    ours.token_embedding.set_weights(
        [weights["model.embed_tokens.weight"], weights["lm_head.weight"].T]
    )
    ours.layer_norm.set_weights([weights["model.norm.weight"]])
    for i, layer in enumerate(ours.transformer_layers):
        names = [n for n in weights if n.startswith(f"model.layers.{i}.")]
        part = {n.removeprefix(f"model.layers.{i}."): weights[n] for n in names}
        attention = layer.attention
        for name, dense in (("q", "query"), ("k", "key"), ("v", "value")):
            kernel = part[f"self_attn.{name}_proj.weight"].T.reshape(24, -1, 8)
            getattr(attention, dense).set_weights([kernel])
        kernel = part["self_attn.o_proj.weight"].T.reshape(6, 8, 24)
        attention.output_dense.set_weights([kernel])
        layer.attention_norm.set_weights([part["input_layernorm.weight"]])
        layer.feed_forward_norm.set_weights([part["post_attention_layernorm.weight"]])
        mixture = layer.feed_forward
        mixture.router.set_weights([part["mlp.gate.weight"].T])
        gate_up = part["mlp.experts.gate_up_proj"].transpose(0, 2, 1)
        down = part["mlp.experts.down_proj"].transpose(0, 2, 1)
        mixture.experts.set_weights([gate_up[..., :20], gate_up[..., 20:], down])
    inputs = padded([random_ids(12, seed=3), random_ids(7, seed=4)], 12, "right")
    with torch.no_grad():
        expected = theirs(
            torch.tensor(inputs["token_ids"]).long(),
            attention_mask=torch.tensor(inputs["padding_mask"]).long(),
        ).logits.numpy()
    hidden = ours(inputs)
    logits = ops.convert_to_numpy(ours.token_embedding(hidden, reverse=True))
    real = inputs["padding_mask"]
    np.testing.assert_allclose(logits[real], expected[real], atol=1e-4)


def test_routing_statistics_count_the_tokens():
    backbone = small_backbone(num_layers=3)
    inputs = padded([random_ids(5), random_ids(9)], 10, "right")
    statistics = backbone.routing_statistics(inputs)
    assert len(statistics) == len(backbone.mixtures) == 2
    for layer in statistics:
        assert float(layer.tokens) == 14
        assert float(ops.sum(layer.assignments)) == 28
        assert float(layer.dropped) == 0


def test_what_is_too_long_or_out_of_range_is_refused():
    backbone = small_backbone(context_length=8)
    assert backbone(full(random_ids(2, 8))).shape == (2, 8, 16)
    with pytest.raises(ValueError, match=r"context_length.*\(8\).*9"):
        backbone(full(random_ids(2, 9)))
    with pytest.raises(ValueError, match="vocabulary_size.*50"):
        backbone(full(np.full((1, 3), 50)))
    with pytest.raises(ValueError, match="-1"):
        backbone(full(np.full((1, 3), -1)))


def test_an_empty_batch_gives_an_empty_result():
    backbone = small_backbone()
    assert tuple(backbone(full(random_ids(0, 4))).shape) == (0, 4, 16)


def test_settings_survive_a_round_trip(tmp_path):
    backbone = small_backbone(
        positions="relative_bias",
        norm="layer",
        tied_embeddings=True,
        expert_gated=False,
        dense_gated=True,
        dispatch="capacity",
        capacity_factor=1.5,
        eval_capacity_factor=2.0,
        capacity_group="sequence",
        dropout=0.1,
    )
    again = MoEBackbone.from_config(backbone.get_config())
    assert again.get_config() == backbone.get_config()
    assert [w.shape for w in again.weights] == [w.shape for w in backbone.weights]
    backbone.save(tmp_path / "backbone.keras")
    loaded = keras.saving.load_model(tmp_path / "backbone.keras")
    inputs = full(random_ids(2, 6))
    np.testing.assert_array_equal(
        ops.convert_to_numpy(loaded(inputs)), ops.convert_to_numpy(backbone(inputs))
    )


def test_tied_embeddings_save_a_matrix():
    untied, tied = (
        small_backbone(tied_embeddings=t).count_params() for t in (False, True)
    )
    assert untied - tied == 50 * 16


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "bfloat16"])
def test_half_precision_stays_close(dtype):
    exact = small_backbone()
    half = small_backbone(dtype=dtype)
    half.set_weights(exact.get_weights())
    inputs = full(random_ids(2, 6))
    expected = ops.convert_to_numpy(exact(inputs))
    got = ops.convert_to_numpy(ops.cast(half(inputs), "float32"))
    # A few roundings of 2**-8; a token near a tie may take another expert.
    close = np.isclose(got, expected, atol=0.15).all(-1)
    assert close.mean() > 0.7
    for mixture in half.mixtures:
        assert mixture.router.kernel.dtype == "float32"


@pytest.mark.filterwarnings("ignore:.*enable_lora.*:UserWarning")
@pytest.mark.parametrize(
    ("settings", "adapted"),
    [
        ({}, ("query", "value")),
        (LATENT, ("query", "key_value_down", "key_value_up")),
        (
            {**LATENT, "query_rank": 5},
            ("query_down", "query_up", "key_value_down", "key_value_up"),
        ),
    ],
)
def test_lora_adapts_the_projections_of_attention(settings, adapted):
    causal_lm = small_causal_lm(**settings)
    inputs = full(random_ids(2, 6))
    before = ops.convert_to_numpy(causal_lm(inputs))
    causal_lm.backbone.enable_lora(4)
    np.testing.assert_array_equal(ops.convert_to_numpy(causal_lm(inputs)), before)
    projections = [
        getattr(layer.attention, name)
        for layer in causal_lm.backbone.transformer_layers
        for name in adapted
    ]
    trained = [w for p in projections for w in (p.lora_kernel_a, p.lora_kernel_b)]
    found = {id(w) for w in causal_lm.backbone.trainable_weights}
    assert found == {id(w) for w in trained}
    old = [ops.convert_to_numpy(w) for w in trained]
    frozen = [w.copy() for w in _frozen(causal_lm.backbone)]
    causal_lm.compile(optimizer=keras.optimizers.Adam(0.1))
    causal_lm.fit(inputs, random_ids(2, 6, seed=5), epochs=2, verbose=0)
    for weight, was in zip(trained, old, strict=True):
        assert np.abs(ops.convert_to_numpy(weight) - was).max() > 1e-3
    for weight, was in zip(_frozen(causal_lm.backbone), frozen, strict=True):
        np.testing.assert_array_equal(weight, was)
    # A step of one token, which uses kernels in its own way, agrees with a whole pass.
    logits = ops.convert_to_numpy(causal_lm(inputs))
    assert np.abs(logits - before).max() > 1e-3
    cache = causal_lm.build_cache(2, 6)
    token_ids = inputs["token_ids"]
    _, _, cache = causal_lm.call_with_cache(token_ids[:, :5], cache, 0)
    step, _, _ = causal_lm.call_with_cache(token_ids[:, 5:], cache, 5)
    step = ops.convert_to_numpy(step)[:, 0]
    np.testing.assert_allclose(step, logits[:, 5], atol=1e-4)


def _frozen(backbone):
    return [ops.convert_to_numpy(w) for w in backbone.non_trainable_weights]


def test_lora_and_quantisation_say_that_experts_are_left():
    causal_lm = small_causal_lm()
    with pytest.warns(UserWarning, match=r"enable_lora.*expert.*experts"):
        causal_lm.backbone.enable_lora(2)
    inputs = full(random_ids(2, 6))
    before = ops.convert_to_numpy(causal_lm(inputs))
    experts = [m.experts.get_weights() for m in causal_lm.backbone.mixtures]
    causal_lm.compile(optimizer=keras.optimizers.Adam(0.1))
    causal_lm.fit(inputs, random_ids(2, 6, seed=5), verbose=0)
    assert np.abs(ops.convert_to_numpy(causal_lm(inputs)) - before).max() > 1e-3
    for mixture, old in zip(causal_lm.backbone.mixtures, experts, strict=True):
        for got, expected in zip(mixture.experts.get_weights(), old, strict=True):
            np.testing.assert_array_equal(got, expected)

    causal_lm = small_causal_lm()
    before = ops.convert_to_numpy(causal_lm(inputs))
    with pytest.warns(UserWarning, match=r"quantize.*expert"):
        causal_lm.quantize("int8")
    after = ops.convert_to_numpy(causal_lm(inputs))
    assert 0 < np.abs(after - before).mean() < 0.2 * np.abs(before).mean()


def test_training_with_recomputation():
    # Seeds of dropout and jitter, losses and loads must be those of one pass.
    token_ids = random_ids(8, 6)
    targets = np.zeros((8, 6, SETTINGS["hidden_dim"]))

    def train(recompute):
        keras.utils.set_random_seed(0)
        backbone = small_backbone(
            balance_loss=0.1,
            z_loss=0.1,
            dropout=0.1,
            router_jitter=0.1,
            recompute=recompute,
        )
        backbone.compile(optimizer=keras.optimizers.SGD(0.1), loss="mse")
        losses = backbone.fit(
            full(token_ids), targets, batch_size=4, epochs=2, shuffle=False, verbose=0
        ).history["loss"]
        loads = [ops.convert_to_numpy(m.expert_load) for m in backbone.mixtures]
        return [np.array(losses), *loads, *backbone.get_weights()]

    for got, expected in zip(train(True), train(False), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)
