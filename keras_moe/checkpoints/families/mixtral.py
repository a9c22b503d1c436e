"""Mixtral ([Jiang et al., 2024](https://arxiv.org/abs/2401.04088))."""

import functools

from keras_moe import architecture
from keras_moe.checkpoints.families import common


def _settings(read):
    return {
        **common.size_settings(read),
        **common.rope_settings(read),
        "head_dim": read.integer("head_dim", None),
        "sliding_window": read.integer("sliding_window", None),
        "num_experts": read.integer("num_local_experts"),
        "top_k": read.integer("num_experts_per_tok"),
        "expert_dim": read.integer("intermediate_size"),
        "normalize_gates": True,
        "router_jitter": read.number("router_jitter_noise", 0.0),
    }


def _config(s):
    return {
        **common.size_config(s),
        **common.rope_config(s),
        "head_dim": architecture.head_dim(s),
        "sliding_window": s["sliding_window"],
        "num_local_experts": s["num_experts"],
        "num_experts_per_tok": s["top_k"],
        "intermediate_size": s["expert_dim"],
        "router_jitter_noise": s["router_jitter"],
    }


def _entries(settings):
    return common.decoder(settings, block="block_sparse_moe", names=("w1", "w3", "w2"))


MIXTRAL = common.Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    settings=_settings,
    config=_config,
    entries=_entries,
    stacked=functools.partial(common.decoder, stacked=True),
    defaults={
        **common.DEFAULTS,
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
    },
    aliases={"num_experts": "num_local_experts"},
)
