"""OLMoE ([Muennighoff et al., 2024](https://arxiv.org/abs/2409.02060))."""

import functools

from keras_moe import architecture
from keras_moe.checkpoints.families import common


def _settings(read):
    return {
        **common.size_settings(read),
        **common.rope_settings(read),
        "head_dim": read.integer("head_dim", None),
        "attention_bias": "all" if read.flag("attention_bias") else None,
        "query_key_norm": "full",
        "clip_query_key_value": read.number("clip_qkv", None),
        "num_experts": read.integer("num_experts"),
        "top_k": read.integer("num_experts_per_tok"),
        "expert_dim": read.integer("intermediate_size"),
        "normalize_gates": read.flag("norm_topk_prob"),
    }


def _config(s):
    # The norms' widths follow `hidden_size / num_attention_heads` in Transformers.
    return {
        **common.size_config(s),
        **common.rope_config(s),
        "attention_bias": s["attention_bias"] == "all",
        "clip_qkv": s["clip_query_key_value"],
        "num_experts": s["num_experts"],
        "num_experts_per_tok": s["top_k"],
        "intermediate_size": s["expert_dim"],
        "norm_topk_prob": architecture.normalizes_gates(s),
    }


OLMOE = common.Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    settings=_settings,
    config=_config,
    entries=common.decoder,
    stacked=functools.partial(common.decoder, stacked=True),
    defaults={
        **common.DEFAULTS,
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "num_experts_per_tok": 8,
        "num_experts": 64,
    },
    aliases={"num_local_experts": "num_experts"},
)
