"""Small checkpoints with random weights, made by Transformers."""

import json

import numpy as np
import safetensors.numpy
import torch
import transformers
from keras import ops

V = 48  # vocabulary
_SIZES = {
    "vocab_size": V,
    "num_hidden_layers": 3,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
_MIXTRAL = {
    **_SIZES,
    "model_type": "mixtral",
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
}
_QWEN2 = {
    **_SIZES,
    "model_type": "qwen2_moe",
    "hidden_size": 20,
    "intermediate_size": 28,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 16,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "num_experts": 6,
    "num_experts_per_tok": 3,
}
_QWEN3 = {
    **_SIZES,
    "model_type": "qwen3_moe",
    "hidden_size": 20,
    "intermediate_size": 28,
    "moe_intermediate_size": 12,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "num_experts": 6,
    "num_experts_per_tok": 2,
}
_OLMOE = {
    **_SIZES,
    "model_type": "olmoe",
    "hidden_size": 24,
    "intermediate_size": 12,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "num_experts": 6,
    "num_experts_per_tok": 3,
}
_DBRX = {
    "vocab_size": V,
    "model_type": "dbrx",
    "n_layers": 3,
    "d_model": 24,
    "n_heads": 6,
    "max_seq_len": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LATENT = {
    **_SIZES,
    "hidden_size": 20,
    "intermediate_size": 28,
    "moe_intermediate_size": 12,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 7,
    "kv_lora_rank": 10,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
}
_V2 = {**_LATENT, "model_type": "deepseek_v2"}
_V3 = {
    **_LATENT,
    "model_type": "deepseek_v3",
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.7,
    "num_mtp_layers": 0,
}

CONFIGS = {
    "mixtral": {**_MIXTRAL, "head_dim": 8, "sliding_window": 5},
    "mixtral_tied": {
        **_MIXTRAL,
        "num_attention_heads": 3,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "linear",
            "rope_theta": 300.0,
            "factor": 2.5,
        },
    },
    "mixtral_llama3": {
        **_MIXTRAL,
        "num_experts_per_tok": 1,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "qwen2_moe": {**_QWEN2, "mlp_only_layers": [1], "norm_topk_prob": True},
    "qwen2_moe_window": {
        **_QWEN2,
        "decoder_sparse_step": 2,
        "num_hidden_layers": 4,
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 3,
        "qkv_bias": False,
        "tie_word_embeddings": True,
        "rope_parameters": _YARN,
    },
    "qwen3_moe": {**_QWEN3, "norm_topk_prob": True, "attention_bias": True},
    "qwen3_moe_window": {
        **_QWEN3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [1],
        "num_hidden_layers": 4,
        "use_sliding_window": True,
        "sliding_window": 6,
        "rope_parameters": {**_YARN, "beta_fast": 4.0, "truncate": False},
    },
    "olmoe": {**_OLMOE, "clip_qkv": 0.8},
    "olmoe_grouped": {
        **_OLMOE,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "attention_bias": True,
        "norm_topk_prob": True,
    },
    "dbrx": {
        **_DBRX,
        "attn_config": {"clip_qkv": 0.9, "kv_n_heads": 2, "rope_theta": 400.0},
        "rope_parameters": {"rope_type": "default", "rope_theta": 400.0},
        "ffn_config": {
            "ffn_hidden_size": 12,
            "moe_num_experts": 5,
            "moe_top_k": 3,
            "moe_jitter_eps": 0.01,
        },
    },
    "dbrx_unnormalised": {
        **_DBRX,
        "n_heads": 3,
        "attn_config": {"clip_qkv": 8, "kv_n_heads": 3, "rope_theta": 500.0},
        "rope_parameters": _YARN,
        "ffn_config": {
            "ffn_hidden_size": 12,
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "moe_normalize_expert_weights": None,
        },
    },
    "deepseek_v2": {**_V2, "q_lora_rank": None},
    "deepseek_v2_groups": {
        **_V2,
        "q_lora_rank": 11,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 1.6,
        "attention_bias": True,
        "rope_parameters": {**_YARN, "mscale": 0.7, "mscale_all_dim": 0.9},
    },
    "deepseek_v3": {**_V3, "q_lora_rank": 11, "norm_topk_prob": True},
    "deepseek_v3_yarn": {
        **_V3,
        "q_lora_rank": None,
        "first_k_dense_replace": 0,
        "n_shared_experts": 0,
        "norm_topk_prob": False,
        "tie_word_embeddings": True,
        "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "deepseek_v3_halves": {
        **_V3,
        "q_lora_rank": 11,
        "qk_rope_head_dim": 6,
        "rope_interleave": False,
    },
}


def make_model(name):
    """A model of Transformers whose every parameter is random and matters."""
    values = dict(CONFIGS[name])
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    state = dict(model.named_parameters())
    state.update(
        (key, buffer)
        for key, buffer in model.named_buffers()
        if key.endswith("e_score_correction_bias")
    )
    with torch.no_grad():
        for key, value in state.items():
            if value.ndim == 1 and key.endswith(".weight"):
                value.uniform_(0.5, 1.5, generator=generator)  # a norm
            else:
                value.normal_(0.0, 0.25, generator=generator)
    model.generation_config.eos_token_id = None
    return model


def make_deepseek(folder):
    """A checkpoint of DeepSeekMoE, and a model of Transformers that computes it.

    Transformers has no class for it. Qwen2-MoE is one with a gate on the shared
    experts; weights of zero make that gate a half, which doubled weights undo.
    """
    name = "deepseek"
    CONFIGS[name] = {
        **_QWEN2,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "shared_expert_intermediate_size": 24,
        "mlp_only_layers": [0],
        "qkv_bias": False,
    }
    model = make_model(name)
    del CONFIGS[name]
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "shared_expert_gate" in key:
                value.zero_()
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = {}
    for key, value in safetensors.numpy.load_file(file).items():
        if "shared_expert.down_proj" in key:
            value = value / 2
        if "shared_expert_gate" not in key:
            tensors[key.replace(".shared_expert.", ".shared_experts.")] = value
    safetensors.numpy.save_file(tensors, file, {"format": "pt"})
    config = {
        **{key: _QWEN2[key] for key in (*_SIZES, "hidden_size", "intermediate_size")},
        "architectures": ["DeepseekForCausalLM"],
        "model_type": "deepseek",
        "moe_intermediate_size": 12,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "n_routed_experts": 6,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "aux_loss_alpha": 0.001,
        "seq_aux": True,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return model


def prompts(length=14):
    """Token ids `[2, length]`."""
    return np.random.default_rng(5).integers(0, V, (2, length)).astype("int32")


def their_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor(ids).long()).logits.float().numpy()


def our_logits(causal_lm, ids):
    inputs = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    return ops.convert_to_numpy(causal_lm(inputs))


def assert_close(found, expected, tolerance=1e-4):
    tolerance *= max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
