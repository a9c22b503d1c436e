"""A backbone's layers, from its settings.

Settings are those of one stack of blocks, as `architecture.stacks` gives them.
"""

import keras

from keras_moe import architecture
from keras_moe.layers import (
    CrossAttention,
    DecoderBlock,
    EncoderBlock,
    FeedForward,
    GroupedQueryAttention,
    LatentAttention,
    MixtureOfExperts,
    RelativeBias,
)
from keras_moe.layers.initializers import fresh
from keras_moe.layers.relative_bias import check_buckets
from keras_moe.layers.transformer_block import normalization

_MIXTURE_SETTINGS = (
    "top_k",
    "num_shared_experts",
    "router",
    "scores",
    "normalize_gates",
    "gates_from",
    "router_jitter",
    "dispatch",
    "capacity_factor",
    "eval_capacity_factor",
    "capacity",
    "capacity_group",
    "balance_loss",
    "z_loss",
    "balance_choices",
    "shared_expert_dim",
    "shared_expert_gate",
    "selection_bias",
    "bias_update_rate",
    "expert_groups",
    "top_k_groups",
    "group_scores",
    "gate_scale",
    "second_choice_threshold",
    "expert_dropout",
    "route_padding",
)


def token_embedding(settings, dtype):
    """The embedding of tokens, and the projection to logits."""
    return keras.layers.ReversibleEmbedding(
        settings["vocabulary_size"],
        settings["hidden_dim"],
        tie_weights=settings["tied_embeddings"],
        embeddings_initializer=_of_embeddings(settings),
        dtype=dtype,
        name="token_embedding",
    )


def decoder_embedding(settings, dtype):
    """The embedding of a decoder that does not share the encoder's."""
    return keras.layers.Embedding(
        settings["vocabulary_size"],
        settings["hidden_dim"],
        embeddings_initializer=_of_embeddings(settings),
        dtype=dtype,
        name="decoder_embedding",
    )


def _of_embeddings(settings):
    stddev = settings["initializer_stddev"]
    if settings["initializer_scale"] is not None:
        # T5's; as the projection to logits alone it would give them `sqrt(D)`.
        stddev = 1.0 if settings["tied_embeddings"] else settings["hidden_dim"] ** -0.5
    return fresh(keras.initializers.RandomNormal(stddev=stddev))


def final_norm(settings, dtype, name="final_norm"):
    """The norm after the last block."""
    return normalization(
        settings["norm"], settings["norm_epsilon"], dtype=dtype, name=name
    )


def shared_bias(settings, dtype, name):
    """The relative bias that all blocks of a stack share, None without one."""
    if settings["positions"] != "relative_bias":
        return None
    check_buckets(
        settings["relative_buckets"],
        settings["relative_max_distance"],
        not settings["causal"],
        names=("relative_buckets", "relative_max_distance"),
    )
    stddev = settings["initializer_stddev"]
    if settings["initializer_scale"] is not None:
        stddev = settings["hidden_dim"] ** -0.5
    return RelativeBias(
        settings["num_query_heads"],
        settings["relative_buckets"],
        settings["relative_max_distance"],
        bidirectional=not settings["causal"],
        initializer=keras.initializers.RandomNormal(stddev=stddev),
        dtype=dtype,
        name=name,
    )


def block(settings, index, dtype, name):
    """The `DecoderBlock` or `EncoderBlock` of a layer."""
    mixture = architecture.is_mixture(settings, index)
    extra = cross = None
    if mixture and settings["extra_dense"]:
        extra = _dense(settings, dtype, "extra_feed_forward")
    arguments = {}
    if settings["cross_attention"]:
        cross = CrossAttention(
            **_heads(settings), **_of_attention(settings, dtype, "cross_attention")
        )
        arguments["cross_attention"] = cross
    if mixture:
        feed_forward = _mixture(settings, dtype)
    else:
        feed_forward = _dense(settings, dtype, "feed_forward")
    return (DecoderBlock if settings["causal"] else EncoderBlock)(
        _self_attention(settings, index, dtype),
        feed_forward,
        norm=settings["norm"],
        norm_epsilon=settings["norm_epsilon"],
        output_norms=settings["output_norms"],
        dropout=settings["dropout"],
        recompute=settings["recompute"],
        extra_feed_forward=extra,
        dtype=dtype,
        name=name,
        **arguments,
    )


def _initializer(settings):
    if settings["initializer_scale"] is not None:
        return keras.initializers.VarianceScaling(
            settings["initializer_scale"], "fan_in", "truncated_normal"
        )
    return keras.initializers.RandomNormal(stddev=settings["initializer_stddev"])


def _dense(settings, dtype, name):
    return FeedForward(
        settings["dense_dim"],
        activation=settings["activation"],
        gated=architecture.dense_gated(settings),
        kernel_initializer=_initializer(settings),
        dropout=settings["inner_dropout"],
        dtype=dtype,
        name=name,
    )


def _mixture(settings, dtype):
    return MixtureOfExperts(
        settings["num_experts"],
        settings["expert_dim"],
        activation=settings["activation"],
        gated=settings["expert_gated"],
        kernel_initializer=_initializer(settings),
        dtype=dtype,
        name="mixture",
        **{name: settings[name] for name in _MIXTURE_SETTINGS},
    )


def _self_attention(settings, index, dtype):
    slides = index in architecture.sliding_layers(settings)
    arguments = dict(
        rope_theta=settings["rope_theta"],
        rope_scaling=settings["rope_scaling"],
        window=settings["sliding_window"] if slides else None,
        **_of_attention(settings, dtype, "attention"),
    )
    if settings["attention"] == "latent":
        return LatentAttention(
            settings["num_query_heads"],
            settings["head_dim"],
            settings["rope_head_dim"],
            settings["value_head_dim"],
            settings["key_value_rank"],
            settings["query_rank"],
            **arguments,
        )
    positions = settings["positions"]
    if positions == "relative_bias" and settings["shares_bias"]:
        positions = None
    return GroupedQueryAttention(
        positions=positions,
        relative_buckets=settings["relative_buckets"],
        relative_max_distance=settings["relative_max_distance"],
        causal=settings["causal"],
        **_heads(settings),
        **arguments,
    )


def _of_attention(settings, dtype, name):
    epsilon = {}
    if settings["attention"] != "latent":
        epsilon["norm_epsilon"] = settings["norm_epsilon"]
    return dict(
        bias=settings["attention_bias"],
        soft_cap=settings["attention_soft_cap"],
        dropout=settings["dropout"],
        weight_dropout=settings["inner_dropout"],
        kernel_initializer=_initializer(settings),
        dtype=dtype,
        name=name,
        **epsilon,
    )


def _heads(settings):
    return dict(
        num_query_heads=settings["num_query_heads"],
        num_key_value_heads=settings["num_key_value_heads"],
        head_dim=settings["head_dim"],
        query_key_norm=settings["query_key_norm"],
        clip=settings["clip_query_key_value"],
        scale=settings["attention_scale"],
    )
