"""Plans against built models, real optimizers and caches, and published counts.

B  batch                S  sequence length      D  `hidden_dim`
V  vocabulary           H  query heads          G  key-value heads
d  head size            E  experts              K  choices a token
"""

import dataclasses
import functools
import json
import math
import re
import time
import tracemalloc

import keras
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import keras_moe
from keras_moe.models import MoEBackbone, MoECausalLM, MoESeq2SeqBackbone, presets
from tests.models import small_models

SIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int32": 4}
TINY = [name for name in presets.names() if name.endswith("_tiny_en")]

# Billions of parameters, total and active, counted from the published
# hyperparameters apart from this package; sources as in the presets' cards.
COUNTED = {
    "mixtral_8x7b": (46.703, 12.88),  # arXiv:2401.04088
    "mixtral_8x22b": (140.621, 39.152),  # Mistral AI, April 2024
    "deepseek_moe_2b": (1.974, 0.317),  # arXiv:2401.06066, section 4.1.3
    "deepseek_moe_16b": (16.376, 2.829),  # section 5.1.2
    "deepseek_moe_145b": (144.478, 22.053),  # section 7.1
    "glam_0.1b_64e": (1.908, 0.152),  # arXiv:2112.06905, table 4
    "glam_1.7b_32e": (13.958, 1.878),
    "glam_1.7b_64e": (26.844, 1.879),
    "glam_1.7b_128e": (52.615, 1.881),
    "glam_1.7b_256e": (104.158, 1.884),
    "glam_8b_64e": (142.943, 9.799),
    "glam_64b_64e": (1161.755, 96.603),
    "qwen1.5_moe_a2.7b": (14.316, 2.689),  # Qwen team, March 2024, public config
    "dbrx_132b": (131.597, 36.47),  # Databricks, March 2024, public config
    "grok_1": (315.7, 83.8),  # xAI, March 2024, public code
}


@st.composite
def drawn_settings(draw):
    """Random settings of a model small enough to build, of any kind."""

    def one_of(*values):
        return draw(st.sampled_from(values))

    query_heads, key_value_heads = one_of((1, 1), (3, None), (4, 2), (6, 1))
    experts = draw(st.integers(0, 5))
    config = {
        "vocabulary_size": draw(st.integers(1, 40)),
        "num_layers": draw(st.integers(1, 4)),
        "hidden_dim": 12,
        "num_query_heads": query_heads,
        "num_experts": experts,
        "dense_dim": draw(st.integers(1, 20)),
        "dense_gated": one_of(None, True, False),
        "expert_gated": one_of(True, False),
        "tied_embeddings": one_of(True, False),
        "norm": one_of("rms", "layer", "layer_no_bias"),
        "positions": one_of("rotary", "relative_bias"),
        "relative_buckets": one_of(8, 32),
        "output_norms": one_of(True, False),
        "attention_bias": one_of(None, "query_key_value", "all"),
        "head_dim": one_of(2, 4),
    }
    if experts:
        moe_every = draw(st.integers(1, 3))
        config |= {
            "top_k": draw(st.integers(1, experts)),
            "expert_dim": draw(st.integers(1, 20)),
            "num_shared_experts": draw(st.integers(0, 2)),
            "moe_every": moe_every,
            "moe_offset": draw(st.integers(0, moe_every - 1)),
            "dense_first_layers": draw(st.integers(0, 2)),
            "dense_layers": draw(st.sampled_from([None, [0]])),
            "selection_bias": one_of(True, False),
        }
        if config["num_shared_experts"]:
            config["shared_expert_dim"] = one_of(None, 7)
            config["shared_expert_gate"] = one_of(True, False)
    if one_of(True, False):
        config |= {
            "attention": "latent",
            "positions": "rotary",
            "query_rank": one_of(None, 5),
            "key_value_rank": draw(st.integers(1, 7)),
            "rope_head_dim": 2,
            "value_head_dim": draw(st.integers(1, 6)),
        }
    else:
        config |= {
            "num_key_value_heads": key_value_heads,
            "query_key_norm": one_of(None, "head", "full"),
        }
        if one_of(True, False):
            config["head_dim"] = None  # 12 / H
            if 12 // query_heads % 2:  # which rotary positions do not take
                config["positions"] = "relative_bias"
    return config


@functools.cache
def backbone_of(dtype):
    """A small backbone with vectors, matrices, banks of them, and a bias of choices."""
    return small_models.small_backbone(
        dtype=dtype, positions="relative_bias", norm="layer", selection_bias=True
    )


def active_parameters(backbone):
    """What a built model uses for a token: all but the experts it does not choose."""
    idle = sum(
        mixture.experts.count_params()
        // mixture.num_experts
        * (mixture.num_experts - mixture.top_k)
        for mixture in backbone.mixtures
    )
    return backbone.count_params() - idle


def bytes_of(variables):
    return sum(math.prod(v.shape) * SIZES[v.dtype] for v in variables)


def planned_small(**arguments):
    return keras_moe.plan(small_models.SETTINGS, sequence_length=10, **arguments)


def raises(*parts):
    return pytest.raises(ValueError, match="(?s)" + ".*".join(map(re.escape, parts)))


# --- Counts ---


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(drawn_settings())
def test_counts_are_those_of_built_models(config):
    backbone = MoEBackbone(**config)
    plan = keras_moe.plan(config, sequence_length=3, dtype="float32")
    assert plan.total_parameters == backbone.count_params()
    assert plan.active_parameters == active_parameters(backbone)
    assert plan.weight_bytes == bytes_of(backbone.weights)
    assert plan.gradient_bytes == bytes_of(backbone.trainable_weights)
    assert sum(part.total for part in plan.parts) == plan.total_parameters


@pytest.mark.parametrize("name", TINY)
def test_counts_of_the_small_presets(name):
    plan = keras_moe.plan(name)
    cls = MoESeq2SeqBackbone if name in MoESeq2SeqBackbone.presets else MoEBackbone
    backbone = cls.from_preset(name)
    assert plan.total_parameters == backbone.count_params()
    assert plan.active_parameters == active_parameters(backbone)
    figures = presets.describe(name)["figures"]  # counted when they were trained
    assert (plan.total_parameters, plan.active_parameters) == (
        figures["parameters"],
        figures["active"],
    )


def test_every_published_decoder_is_compared():
    found = MoEBackbone.presets.items()
    published = {name for name, described in found if "published" in described}
    assert {*COUNTED, "deepseek_v3"} == published


@pytest.mark.parametrize("name", COUNTED)
def test_counts_of_published_presets(name):
    plan = keras_moe.plan(name)
    total, active = COUNTED[name]
    assert plan.total_parameters / 1e9 == pytest.approx(total, rel=0.005)
    assert plan.active_parameters / 1e9 == pytest.approx(active, rel=0.005)


def test_counts_of_deepseek_v3():
    plan = keras_moe.plan("deepseek_v3")
    # Section 1 states 671B and 37B.
    assert plan.total_parameters / 1e9 == pytest.approx(671, rel=0.005)
    assert plan.active_parameters / 1e9 == pytest.approx(37, rel=0.05)
    # A layer's attention, by hand: two compressions of the query, with a norm, those
    # of keys and values, and the output.
    attention = 7168 * 1536 + 1536 + 1536 * 128 * 192
    attention += 7168 * (512 + 64) + 512 + 512 * 128 * (128 + 128) + 128 * 128 * 7168
    assert dict((p.name, p.total) for p in plan.parts)["attention"] == 61 * attention
    # No gradient trains the bias of the choices: 256 numbers in 58 layers.
    trained = plan.total_parameters - 58 * 256
    routers = 58 * 7168 * 256
    assert plan.gradient_bytes == 2 * trained + 2 * routers  # in float32


def test_counts_of_details():
    """Settings whose weights are few: each adds what it should, in 3 layers."""
    base = {
        "vocabulary_size": 10,
        "num_layers": 3,
        "hidden_dim": 12,
        "num_query_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "num_experts": 5,
        "top_k": 2,
        "expert_dim": 7,
        "num_shared_experts": 2,
    }

    def added(**overrides):
        total = keras_moe.plan({**base, **overrides}, sequence_length=1)
        return total.total_parameters - count

    count = keras_moe.plan(base, sequence_length=1).total_parameters
    assert added(attention_bias="query_key_value") == 3 * (6 + 2 + 2) * 4
    assert added(attention_bias="all") == 3 * ((6 + 2 + 2) * 4 + 12)
    assert added(query_key_norm="head") == 3 * 2 * 4
    assert added(query_key_norm="full") == 3 * (6 + 2) * 4
    assert added(shared_expert_gate=True) == 3 * 12
    assert added(shared_expert_dim=10) == 3 * 3 * 12 * (10 - 14)
    assert added(selection_bias=True) == 3 * 5
    assert added(output_norms=True) == 3 * 2 * 12
    assert added(norm="layer_no_bias") == 0
    assert added(norm="layer") == (3 * 2 + 1) * 12
    for ineffective in (
        {"sliding_window": 2, "sliding_layers": [0]},
        {"clip_query_key_value": 1.0},
        {"attention_soft_cap": 1.0},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"expert_groups": 5, "top_k_groups": 2, "group_scores": "max"},
        {"gate_scale": 2.0, "embedding_multiplier": 2.0, "output_multiplier": 2.0},
    ):
        assert added(**ineffective) == 0


# --- What a preset may be ---


def test_every_way_to_name_a_model(tmp_path):
    backbone = small_models.small_backbone(context_length=20)
    backbone.save_to_preset(str(tmp_path))
    of_backbone = keras_moe.plan(backbone)
    assert of_backbone.sequence_length == 20
    written = json.loads((tmp_path / "config.json").read_text())
    for preset in (
        str(tmp_path),
        tmp_path,
        MoECausalLM(backbone),
        backbone.get_config(),
        written,
    ):
        plan = keras_moe.plan(preset)
        assert dataclasses.replace(plan, name=backbone.name) == of_backbone
    assert keras_moe.plan(str(tmp_path)).name == str(tmp_path)
    assert keras_moe.plan(written).name == backbone.name


# --- Operations ---


def test_operations_of_mixtral():
    S = 1024
    plan = keras_moe.plan("mixtral_8x7b", sequence_length=S)
    # By hand: a token's matrices, without the embedding it is looked up in, and two
    # products with every key and value.
    attention = 2 * 4096 * 32 * 128 + 2 * 4096 * 8 * 128
    mixture = 4096 * 8 + 2 * 3 * 4096 * 14336
    matrices = 32 * (attention + mixture) + 4096 * 32000
    assert plan.flops_per_token == 2 * matrices + 32 * (2 * S * 32 * 128) * 2


def test_operations_of_latent_attention_and_a_tied_model():
    S = 100
    config = presets.settings(presets.ROOT / "deepseek_v3")
    config |= {"num_layers": 1, "tied_embeddings": True}
    plan = keras_moe.plan(config, sequence_length=S)
    matrices = 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256
    matrices += 128 * 128 * 7168 + 3 * 7168 * 18432 + 129280 * 7168
    scores_and_values = S * 128 * (192 + 128)
    assert plan.flops_per_token == 2 * (matrices + scores_and_values)


def test_operations_follow_the_chosen_experts():
    def flops(**overrides):
        config = {**small_models.SETTINGS, **overrides}
        return keras_moe.plan(config, sequence_length=8).flops_per_token

    one_expert = 2 * 3 * 16 * 24
    assert flops(top_k=3) - flops(top_k=2) == one_expert
    assert flops(num_experts=9) - flops() == 2 * 16 * 5  # the router alone


# --- Bytes ---


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed_bfloat16", "float16"])
def test_bytes_of_weights(dtype):
    backbone = backbone_of(dtype)
    plan = keras_moe.plan(backbone, sequence_length=10, dtype=dtype)
    assert plan.weight_bytes == bytes_of(backbone.weights)
    assert plan.gradient_bytes == bytes_of(backbone.trainable_weights)
    policy = keras.DTypePolicy(dtype)
    assert keras_moe.plan(backbone, sequence_length=10, dtype=policy) == plan


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed_bfloat16"])
@pytest.mark.parametrize(
    "name,optimizer",
    [
        ("sgd", lambda: keras.optimizers.SGD()),
        ("sgd_momentum", lambda: keras.optimizers.SGD(momentum=0.9)),
        ("adam", lambda: keras.optimizers.Adam()),
        ("adamw", lambda: keras.optimizers.AdamW()),
        ("lion", lambda: keras.optimizers.Lion()),
        ("adafactor", lambda: keras.optimizers.Adafactor()),
    ],
)
def test_bytes_of_optimizers(name, optimizer, dtype):
    backbone = backbone_of(dtype)
    optimizer = optimizer()
    optimizer.build(backbone.trainable_variables)
    variables = [v for v in optimizer.variables if len(v.shape)]  # no scalars
    plan = keras_moe.plan(backbone, sequence_length=4, dtype=dtype, optimizer=name)
    assert plan.optimizer_bytes == bytes_of(variables)


LATENT = {
    "attention": "latent",
    "num_key_value_heads": None,
    "head_dim": 6,
    "query_rank": 7,
    "key_value_rank": 5,
    "rope_head_dim": 2,
    "value_head_dim": 3,
}


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("overrides", [{}, LATENT], ids=["grouped_query", "latent"])
def test_bytes_of_the_cache(overrides, dtype):
    causal_lm = small_models.small_causal_lm(dtype=dtype, **overrides)
    cache = keras.tree.flatten(causal_lm.build_cache(3, 10))
    size = sum(
        math.prod(t.shape) * SIZES[keras.backend.standardize_dtype(t.dtype)]
        for t in cache
    )
    plan = keras_moe.plan(causal_lm, 3, 10, dtype=dtype)
    assert plan.cache_bytes == size


def test_a_window_does_not_shrink_the_cache():
    config = {**small_models.SETTINGS, "sliding_window": 2}
    windowed = keras_moe.plan(config, sequence_length=10)
    assert windowed.cache_bytes == planned_small().cache_bytes


def test_activations_of_latent_attention_by_hand():
    settings = {**small_models.SETTINGS, **LATENT}
    plan = keras_moe.plan(settings, sequence_length=5)
    without = keras_moe.plan({**settings, "num_layers": 1}, sequence_length=5)
    # The second layer: 4 heads, latents before and after their norms, and a mixture
    # of 2 + 1 experts of 24 in 16 dimensions.
    block = 4 * 16 + 2 * 7 + (2 * 5 + 2) + 4 * (6 + 2 + 6) + 4 * (3 + 3)
    block += 2 * (2 * 16 + 4 * 24) + 4 * 24
    in_float32 = 16 + 2 * 4 + 2 * 16 + 3 * 4 * 5
    added = plan.activation_bytes - without.activation_bytes
    assert added == 5 * (2 * block + 4 * in_float32)


def test_activations_by_hand():
    config = {
        "vocabulary_size": 50,
        "num_layers": 3,
        "hidden_dim": 16,
        "num_query_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 6,
        "top_k": 2,
        "expert_dim": 10,
        "dense_first_layers": 1,
        "dense_dim": 30,
    }
    B, S = 3, 7
    block = 4 * 16 + (4 + 2 + 2) * 8 + 4 * 8  # and a feed-forward part:
    dense = block + 4 * 30
    mixture = block + 2 * (2 * 16 + 4 * 10)
    in_float32 = 16 + 2 * 6 + 2 * 16  # of the router and the sum
    ends = 2 * 16 + 50
    scores = 4 * (3 * 4 * S)

    plan = keras_moe.plan(config, B, S)
    assert plan.score_bytes == B * S * 3 * scores
    kept = 2 * (dense + 2 * mixture + ends) + 4 * (2 * in_float32 + 50) + 3 * scores
    assert plan.activation_bytes == B * S * kept

    recomputed = keras_moe.plan({**config, "recompute": True}, B, S)
    assert recomputed.score_bytes == B * S * scores
    kept = 2 * (3 * 16 + mixture + ends) + 4 * (in_float32 + 50) + scores
    assert recomputed.activation_bytes == B * S * kept

    # bfloat16 copies of all matrices but the routers', not of the table looked up.
    mixed = keras_moe.plan(config, B, S, dtype="mixed_bfloat16")
    attention = (4 + 2 + 2 + 4) * 8 * 16
    matrices = 3 * attention + 3 * 16 * 30 + 2 * 6 * 3 * 16 * 10 + 16 * 50
    assert mixed.activation_bytes - plan.activation_bytes == 2 * matrices
    mixed = keras_moe.plan({**config, "recompute": True}, B, S, dtype="mixed_bfloat16")
    matrices = attention + 6 * 3 * 16 * 10 + 16 * 50  # of one block
    assert mixed.activation_bytes - recomputed.activation_bytes == 2 * matrices


def test_sums_of_bytes():
    plan = planned_small(batch_size=2, dtype="float32", optimizer="adam")
    weights = plan.weight_bytes
    assert plan.gradient_bytes == weights
    assert plan.optimizer_bytes == 2 * weights
    assert plan.training_bytes == 4 * weights + plan.activation_bytes
    assert plan.serving_bytes == weights + plan.cache_bytes


# --- Its cost, and what is shown ---


def test_nothing_is_allocated():
    keras_moe.plan("glam_64b_64e")  # imports and caches
    tracemalloc.start()
    start = time.perf_counter()
    plan = keras_moe.plan("glam_64b_64e", batch_size=64)
    seconds = time.perf_counter() - start
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert plan.weight_bytes > 2e12
    assert peak < 1e6
    assert seconds < 0.5


def test_table():
    lines = str(
        keras_moe.plan(
            "mixtral_8x7b", batch_size=2, sequence_length=4096, optimizer="sgd"
        )
    ).splitlines()
    assert lines[0] == "mixtral_8x7b: 2 sequences of 4096 tokens in bfloat16"
    cells = [re.split(r"\s{2,}", line.strip()) for line in lines[1:]]
    assert ["total", "46.7 B", "12.88 B"] in cells
    # Twice 12.88 billion less a table of 131 million, and scores: 32 4 S 32 128.
    assert ["operations a token", "27.64 GFLOP"] in cells
    assert 2 * (12.880 - 0.131) + 32 * 4 * 4096 * 32 * 128 / 1e9 == pytest.approx(
        27.64, abs=0.01
    )
    # 46.7 billion of two bytes, and of the routers' weights two bytes more.
    assert ["weights", "86.99 GiB", "86.99 GiB"] in cells
    # Keys and values of 8 heads of 128 in 32 layers, 2 bytes each.
    assert ["key-value cache", "1 GiB"] in cells
    assert 2 * 4096 * 32 * 2 * 8 * 128 * 2 == 2**30
    assert max(map(len, lines)) <= 80


def test_as_json():
    plan = keras_moe.plan("deepseek_moe_2b")
    values = json.loads(json.dumps(plan.to_dict()))
    assert values["total_parameters"] == plan.total_parameters
    assert values["training_bytes"] == plan.training_bytes
    assert values["serving_bytes"] == plan.serving_bytes
    assert sum(part["total"] for part in values["parts"].values()) == (
        plan.total_parameters
    )


def test_a_plan_is_frozen():
    with pytest.raises(AttributeError):
        planned_small().weight_bytes = 0


# --- Bad input ---


@pytest.mark.parametrize(
    "arguments,parts",
    [
        ({"batch_size": 0}, ["`batch_size` must be", "batch_size=0"]),
        ({"batch_size": 1.5}, ["`batch_size` must be", "batch_size=1.5"]),
        ({"sequence_length": 0}, ["`sequence_length` must be", "sequence_length=0"]),
        (
            {"sequence_length": 32769},
            ["`context_length` (32768)", "sequence_length=32769"],
        ),
        ({"dtype": "int8"}, ["`dtype` must be one of", "'bfloat16'", "dtype='int8'"]),
        ({"dtype": ["float32"]}, ["`dtype` must be one of", "dtype=['float32']"]),
        ({"dtype": None}, ["`dtype` must be one of", "dtype=None"]),
        (
            {"optimizer": "adamx"},
            ["`optimizer` must be one of", "'lion'", "optimizer='adamx'"],
        ),
        ({"mesh": (2, 4)}, ["`mesh` must be a", "DeviceMesh", "mesh=(2, 4)"]),
    ],
    ids=str,
)
def test_bad_arguments(arguments, parts):
    with raises(*parts):
        keras_moe.plan("mixtral_8x7b", **arguments)


@pytest.mark.parametrize(
    "overrides,parts",
    [
        ({"top_k": 5}, ["`top_k` must be", "`num_experts` (4)", "top_k=5"]),
        ({"hiden_dim": 3}, ["`setting` must be one of", "setting='hiden_dim'"]),
        ({"num_layers": 0}, ["`num_layers` must be", "num_layers=0"]),
        ({"num_key_value_heads": 3}, ["multiple of", "num_key_value_heads=3"]),
        ({"hidden_dim": 18}, ["`hidden_dim` must be a multiple", "hidden_dim=18"]),
        ({"expert_dim": None}, ["`expert_dim` is needed", "expert_dim=None"]),
        ({"dense_dim": 0}, ["`dense_dim` must be", "dense_dim=0"]),
        ({"norm": "batch"}, ["`norm` must be one of", "norm='batch'"]),
        ({"router": "mine"}, ["`router` must be one of 'top_k'", "router='mine'"]),
        ({"expert_groups": 3}, ["`num_experts` must be a multiple of", "groups=3"]),
        ({"expert_groups": 2, "top_k_groups": 3}, ["`top_k_groups` must be at most"]),
        ({"group_scores": "mean"}, ["`group_scores` must be one of", "'mean'"]),
        ({"scores": "relu"}, ["`scores` must be one of", "'relu'"]),
        ({"gates_from": "some"}, ["`gates_from` must be one of", "'some'"]),
        ({"gate_scale": 0}, ["`gate_scale` must be", "gate_scale=0"]),
        ({"router_jitter": 1}, ["`router_jitter` must be", "router_jitter=1"]),
        ({"second_choice_threshold": 2.0}, ["`second_choice_threshold` must be"]),
        ({"bias_update_rate": 0.1}, ["`bias_update_rate` needs", "0.1"]),
        ({"balance_loss": -1.0}, ["`balance_loss` must be", "balance_loss=-1.0"]),
        ({"balance_choices": "best"}, ["`balance_choices` must be one of", "'best'"]),
        ({"dispatch": "capacity"}, ["needs either `capacity_factor` or `capacity`"]),
        ({"dispatch": "random"}, ["`dispatch` must be one of", "'random'"]),
        ({"capacity_factor": 1.0}, ["`capacity_factor` needs", '"dropless"']),
        (
            {"dispatch": "capacity", "capacity_factor": 1.0, "capacity_group": 0},
            ["`capacity_group` must be", "capacity_group=0"],
        ),
        ({"activation": "sillu"}, ["`activation` must be", "activation='sillu'"]),
        ({"dropout": 1.0}, ["`dropout` must be", "dropout=1.0"]),
        ({"norm_epsilon": 0.0}, ["`norm_epsilon` must be", "norm_epsilon=0.0"]),
        ({"head_dim": 3}, ["`head_dim` must be even", "head_dim=3"]),
        ({"rope_theta": -1}, ["`rope_theta` must be", "rope_theta=-1"]),
        ({"rope_scaling": {"type": "dynamic"}}, ["rope_scaling['type']", "'dynamic'"]),
        ({"rope_scaling": {"type": ["yarn"]}}, ["rope_scaling['type']", "['yarn']"]),
        ({"sliding_window": 0}, ["`sliding_window` must be", "sliding_window=0"]),
        ({"attention_soft_cap": 0}, ["`attention_soft_cap` must be", "cap=0"]),
        ({"clip_query_key_value": -2.0}, ["`clip_query_key_value` must be", "-2.0"]),
        ({"attention": "linear"}, ["`attention` must be one of", "'linear'"]),
        ({"attention_bias": "yes"}, ["`attention_bias` must be one of", "'yes'"]),
        ({"query_key_norm": "rms"}, ["`query_key_norm` must be one of", "'rms'"]),
        (
            {"shared_expert_dim": 8},
            ["`shared_expert_dim`", "need shared experts", "num_shared_experts=0"],
        ),
        (
            {"attention": "latent", "num_key_value_heads": None, "head_dim": 4},
            ["`key_value_rank` must be an integer", "key_value_rank=None"],
        ),
    ],
    ids=str,
)
def test_bad_settings(overrides, parts):
    config = {**small_models.SETTINGS, "num_shared_experts": 0, **overrides}
    with raises(*parts):
        keras_moe.plan(config, sequence_length=4)
    with raises(*parts):
        MoEBackbone(**config)


def test_settings_missing():
    with raises("Settings must hold 'vocabulary_size', 'num_layers'", "Received"):
        keras_moe.plan({"hidden_dim": 8, "num_query_heads": 2}, sequence_length=4)


def test_no_length():
    with raises("`sequence_length` is needed", "sequence_length=None"):
        keras_moe.plan(small_models.SETTINGS)


def test_unknown_presets(tmp_path):
    with raises("`preset` must be one of", "'mixtral_8x7b'", "'mixtrel_8x7b'"):
        keras_moe.plan("mixtrel_8x7b")
    with raises("`preset` must be a preset's name", "preset=3"):
        keras_moe.plan(3)
    with raises("`preset` must be here", "'hf://user/model'"):
        keras_moe.plan("hf://user/model")
    with raises("`preset` must be a `MoEBackbone`", "a Dense"):
        keras_moe.plan(keras.layers.Dense(3))
    with pytest.raises(FileNotFoundError, match="must hold `config.json`"):
        keras_moe.plan(tmp_path)
    (tmp_path / "config.json").write_text('{"layers": 3}')
    with raises("config.json", "must describe a `MoEBackbone`", "class_name=None"):
        keras_moe.plan(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "deepseek"}')
    with raises("config.json", "must have the key", "n_routed_experts=None"):
        keras_moe.plan(tmp_path)
