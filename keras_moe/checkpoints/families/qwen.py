"""Qwen2-MoE and Qwen3-MoE.

([Qwen Team, 2024](https://qwenlm.github.io/blog/qwen-moe/),
[Yang et al., 2025](https://arxiv.org/abs/2505.09388))
"""

import functools

from keras_moe import architecture
from keras_moe.checkpoints.families import common

_DEFAULTS = {
    **common.DEFAULTS,
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "decoder_sparse_step": 1,
}
_ALIASES = {"num_local_experts": "num_experts"}


def _shared_settings(read):
    return {
        **common.size_settings(read),
        **common.rope_settings(read),
        **common.dense_or_mixture(read),
        "head_dim": read.integer("head_dim", None),
        "num_experts": read.integer("num_experts"),
        "top_k": read.integer("num_experts_per_tok"),
        "expert_dim": read.integer("moe_intermediate_size"),
        "dense_dim": read.integer("intermediate_size"),
        "normalize_gates": read.flag("norm_topk_prob"),
    }


def _shared_config(s):
    return {
        **common.size_config(s),
        **common.rope_config(s),
        **common.qwen_pattern_config(s),
        "head_dim": architecture.head_dim(s),
        "num_experts": s["num_experts"],
        "num_experts_per_tok": s["top_k"],
        "moe_intermediate_size": s["expert_dim"],
        "intermediate_size": s["dense_dim"] or s["expert_dim"],
        "norm_topk_prob": architecture.normalizes_gates(s),
    }


def _qwen2_window(read):
    """The sliding window and the layers that have it, from three styles of keys."""
    layers = read.integer("num_hidden_layers")
    # Only layers of even index, among the first, where they are not listed.
    last = read.integer("max_window_layers", minimum=0)
    types = read.get("layer_types")
    in_use = read.flag("use_sliding_window")
    window = read.integer("sliding_window", None, minimum=0)
    if types is None:
        sliding = [i for i in range(layers) if i % 2 == 0 and i < last]
    elif len(types) == layers and set(types) <= _LAYER_TYPES:
        sliding = [i for i, kind in enumerate(types) if kind == "sliding_attention"]
    else:
        read.refuse("layer_types", f"{layers} times one of {sorted(_LAYER_TYPES)}")
    if not in_use or not window or not sliding:
        if types is not None and sliding:
            read.refuse("use_sliding_window", "true where `layer_types` has windows")
        return {"sliding_window": None, "sliding_layers": None}
    return {"sliding_window": window, "sliding_layers": sliding}


_LAYER_TYPES = {"full_attention", "sliding_attention"}


def _qwen2_settings(read):
    shared = _shared_settings(read)
    return {
        **shared,
        **_qwen2_window(read),
        "attention_bias": "query_key_value" if read.flag("qkv_bias") else None,
        "num_shared_experts": 1,
        "shared_expert_dim": read.integer("shared_expert_intermediate_size"),
        "shared_expert_gate": True,
    }


def _qwen2_config(s):
    window = s["sliding_window"]
    sliding = range(s["num_layers"])
    if s["sliding_layers"] is not None:
        sliding = s["sliding_layers"]
    return {
        **_shared_config(s),
        "qkv_bias": s["attention_bias"] == "query_key_value",
        "shared_expert_intermediate_size": architecture.shared_dim(s),
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": s["num_layers"],
        "layer_types": [
            "sliding_attention" if window and layer in sliding else "full_attention"
            for layer in range(s["num_layers"])
        ],
    }


QWEN2_MOE = common.Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    settings=_qwen2_settings,
    config=_qwen2_config,
    entries=functools.partial(common.decoder, shared="shared_expert"),
    stacked=functools.partial(common.decoder, shared="shared_expert", stacked=True),
    defaults={
        **_DEFAULTS,
        "intermediate_size": 5632,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_window_layers": 28,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts_per_tok": 4,
        "num_experts": 60,
        "qkv_bias": True,
    },
    aliases=_ALIASES,
)


def _qwen3_settings(read):
    # Here the window is that of all layers, whatever this says.
    read.harmless("max_window_layers")
    window = read.integer("sliding_window", None)
    return {
        **_shared_settings(read),
        "sliding_window": window if read.flag("use_sliding_window") else None,
        "attention_bias": "all" if read.flag("attention_bias") else None,
        "query_key_norm": "head",
    }


def _qwen3_config(s):
    return {
        **_shared_config(s),
        "use_sliding_window": s["sliding_window"] is not None,
        "sliding_window": s["sliding_window"],
        "attention_bias": s["attention_bias"] == "all",
    }


QWEN3_MOE = common.Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    settings=_qwen3_settings,
    config=_qwen3_config,
    entries=common.decoder,
    stacked=functools.partial(common.decoder, stacked=True),
    defaults={
        **_DEFAULTS,
        "intermediate_size": 6144,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "num_experts": 128,
    },
    aliases=_ALIASES,
)
