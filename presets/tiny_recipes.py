"""The recipes of the small presets: what each model is, and how long it trains."""

VOCABULARY = 1024  # tokens that a tokenizer learns; sentinels come on top

_COMMON = {
    "hidden_dim": 128,
    "num_query_heads": 4,
    "context_length": 256,
    "balance_loss": 0.01,
}
_DECODER = {**_COMMON, "vocabulary_size": VOCABULARY, "num_layers": 4}

RECIPES = {
    "mixtral_tiny_en": {
        "family": "mixtral",
        "paper": "https://arxiv.org/abs/2401.04088",
        "about": "Mixtral's block: grouped-query attention with rotary positions, "
        "RMS norms, eight SwiGLU experts of which a token takes two, gates "
        "normalised over the two.",
        "task": "next_token",
        "optimizer": "AdamW",
        "tokenizer": "sentencepiece",
        "epochs": 3,
        "settings": {
            **_DECODER,
            "num_key_value_heads": 2,
            "rope_theta": 1e6,
            "num_experts": 8,
            "top_k": 2,
            "expert_dim": 112,
            "norm_epsilon": 1e-5,
        },
    },
    "deepseek_moe_tiny_en": {
        "family": "deepseek_moe",
        "paper": "https://arxiv.org/abs/2401.06066",
        "about": "DeepSeekMoE's block: a dense first layer, then fine-grained experts "
        "of which a token takes three of sixteen with gates as the softmax gives "
        "them, and one shared expert that every token takes.",
        "task": "next_token",
        "optimizer": "AdamW",
        "tokenizer": "byte_pair",
        "epochs": 3,
        "settings": {
            **_DECODER,
            "num_experts": 16,
            "top_k": 3,
            "expert_dim": 56,
            "num_shared_experts": 1,
            "normalize_gates": False,
            "dense_first_layers": 1,
            "dense_dim": 224,
        },
    },
    "glam_tiny_en": {
        "family": "glam",
        "paper": "https://arxiv.org/abs/2112.06905",
        "about": "GLaM's blocks: dense layers with gated GELU and mixtures by turns, "
        "eight experts of two matrices of which a token takes two, a relative "
        "position bias in each layer, tied embeddings.",
        "task": "next_token",
        "optimizer": "AdamW",
        "tokenizer": "sentencepiece",
        "epochs": 4,  # positions are learned, which takes longer
        "settings": {
            **_DECODER,
            "num_experts": 8,
            "top_k": 2,
            "expert_dim": 288,
            "expert_gated": False,
            "dense_gated": True,
            "dense_dim": 192,
            "activation": "gelu",
            "moe_every": 2,
            "moe_offset": 1,
            "positions": "relative_bias",
            "tied_embeddings": True,
            "balance_choices": "first",
        },
    },
    "switch_tiny_en": {
        "family": "switch",
        "paper": "https://arxiv.org/abs/2101.03961",
        "about": "Switch's mixtures in an encoder and a decoder, here in every layer: "
        "eight experts of ReLU of which a token takes one with the gate that the "
        "softmax gives, limited capacity, a relative position bias a stack, tied "
        "embeddings.",
        "task": "fill_spans",
        "optimizer": "Adafactor",  # Switch's
        "tokenizer": "sentencepiece",
        "sentinels": 32,
        "epochs": 14,
        "settings": {
            **_COMMON,
            "vocabulary_size": VOCABULARY + 32,
            # Narrow, so that what feed-forward layers hold counts: at 128 features
            # and as many steps eight experts were no better than one.
            "hidden_dim": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "num_experts": 8,
            "top_k": 1,
            "expert_dim": 128,
            "normalize_gates": False,
            "dispatch": "capacity",
            "capacity_factor": 2.0,
            "eval_capacity_factor": 2.0,
            "capacity_group": 512,
            # Switch's 0.1 is for the stability of large models; small ones learn
            # slowly from it.
            "initializer_scale": 1.0,
        },
    },
}


def dense_twin(settings):
    """The settings with each mixture replaced by a dense layer of its active width.

    One expert that every token takes with gate 1 is that dense layer.
    """
    active = settings["top_k"] + settings.get("num_shared_experts", 0)
    return {
        **settings,
        "num_experts": 1,
        "top_k": 1,
        "num_shared_experts": 0,
        "expert_dim": active * settings["expert_dim"],
        "normalize_gates": True,
        "balance_loss": 0.0,
    }
