"""DBRX ([Databricks, 2024](https://www.databricks.com/blog/introducing-dbrx)).

Its projections of queries, keys and values are one tensor, and so are the matrices of
all experts.

The base of the rotary angles stands within `attn_config` where a checkpoint is as it
was published, and is read there. Transformers 5.23 reads it at the top alone: of such a
checkpoint (base 500000) it takes its own default, 10000, in silence, and so computes
another model. Without any base both take 10000. An export states it in both places.
"""

from keras_moe import architecture
from keras_moe.checkpoints.config_reader import ConfigReader
from keras_moe.checkpoints.families import common
from keras_moe.checkpoints.tables import Table

_ATTENTION_DEFAULTS = {"kv_n_heads": 1, "rope_theta": 10000.0}
_FFN_DEFAULTS = {
    "ffn_hidden_size": 3584,
    "moe_num_experts": 4,
    "moe_top_k": 1,
    "moe_normalize_expert_weights": 1.0,
}


def _settings(read):
    attention = _part(read, "attn_config", _ATTENTION_DEFAULTS)
    ffn = _part(read, "ffn_config", _FFN_DEFAULTS)
    heads = read.integer("n_heads")
    read.only("tie_word_embeddings", False)
    # Nothing is dropped from the embeddings, whatever this says, and the other stands
    # within the attention's.
    read.harmless("emb_pdrop", "num_key_value_heads")
    activation = ffn.get("ffn_act_fn", {"name": "silu"})
    if not isinstance(activation, dict) or set(activation) != {"name"}:
        ffn.refuse("ffn_act_fn", "an activation's name alone")
    attention.harmless("attn_pdrop")
    ffn.harmless("hidden_size", "moe_loss_weight")
    ffn.only("uniform_expert_assignment", False)
    # Where it is missing they are normalised, and where it is null they are not.
    norm = ffn.get("moe_normalize_expert_weights")
    ffn.only("moe_normalize_expert_weights", 1, 1.0)
    # Given at the top in newer configurations, and within the attention's in older.
    theta = attention.number("rope_theta")
    attention.harmless("rope_parameters")
    settings = {
        "vocabulary_size": read.integer("vocab_size"),
        "num_layers": read.integer("n_layers"),
        "hidden_dim": read.integer("d_model"),
        "num_query_heads": heads,
        "num_key_value_heads": attention.integer("kv_n_heads"),
        "clip_query_key_value": attention.number("clip_qkv", None),
        "norm": "layer_no_bias",
        "norm_epsilon": 1e-5,
        "tied_embeddings": False,
        "dropout": read.number("resid_pdrop", 0.0),
        "activation": ConfigReader(activation).activation("name"),
        "num_experts": ffn.integer("moe_num_experts"),
        "top_k": ffn.integer("moe_top_k"),
        "expert_dim": ffn.integer("ffn_hidden_size"),
        "normalize_gates": norm is not None,
        "router_jitter": ffn.number("moe_jitter_eps", 0.0),
        "initializer_stddev": read.number("initializer_range"),
        "context_length": read.integer("max_seq_len"),
        **common.rope_settings(read, theta=theta, context_key="max_seq_len"),
    }
    attention.finish()
    ffn.finish()
    return settings


def _part(read, key, defaults):
    part = read.get(key, {})
    if not isinstance(part, dict):
        read.refuse(key, "an object")
    return ConfigReader(part, defaults)


def _config(s):
    normalizes = architecture.normalizes_gates(s)
    return {
        "vocab_size": s["vocabulary_size"],
        "n_layers": s["num_layers"],
        "d_model": s["hidden_dim"],
        "n_heads": s["num_query_heads"],
        "max_seq_len": s["context_length"] or 32768,
        "resid_pdrop": s["dropout"],
        "emb_pdrop": 0.0,
        "initializer_range": s["initializer_stddev"],
        "tie_word_embeddings": False,
        "attn_config": {
            "clip_qkv": s["clip_query_key_value"],
            "kv_n_heads": architecture.num_key_value_heads(s),
            "rope_theta": s["rope_theta"],
        },
        "ffn_config": {
            "ffn_act_fn": {"name": common.to_activation(s["activation"])},
            "ffn_hidden_size": s["expert_dim"],
            "moe_num_experts": s["num_experts"],
            "moe_top_k": s["top_k"],
            "moe_jitter_eps": s["router_jitter"] or None,
            "moe_normalize_expert_weights": 1.0 if normalizes else None,
        },
        **common.rope_config(s),
    }


def _entries(settings):
    s = settings
    table = Table(s)
    common.embeddings(table, "transformer.wte", "transformer.norm_f")
    for layer in range(s["num_layers"]):
        theirs, ours = f"transformer.blocks.{layer}", f"transformer_layers.{layer}"
        table.norm(f"{theirs}.norm_attn_norm.norm_1", f"{ours}.attention_norm")
        table.norm(f"{theirs}.norm_attn_norm.norm_2", f"{ours}.feed_forward_norm")
        _attention(table, f"{theirs}.norm_attn_norm.attn", f"{ours}.attention")
        _mixture(table, f"{theirs}.ffn", f"{ours}.feed_forward")
    return table.entries


def _attention(table, theirs, ours):
    s = table.settings
    features, size = (s["hidden_dim"],), architecture.head_dim(s)
    heads = s["num_query_heads"]
    groups = architecture.num_key_value_heads(s)
    row = 0
    for name, count in (("query", heads), ("key", groups), ("value", groups)):
        outputs = (count, size)
        table.linear(f"{theirs}.Wqkv", f"{ours}.{name}", features, outputs, row=row)
        row += count * size
    table.linear(f"{theirs}.out_proj", f"{ours}.output_dense", (heads, size), features)


def _mixture(table, theirs, ours):
    s = table.settings
    features, hidden, experts = s["hidden_dim"], s["expert_dim"], s["num_experts"]
    table.linear(f"{theirs}.router.layer", f"{ours}.router", (features,), (experts,))
    for theirs_name, name in (("w1", "gate"), ("v1", "up"), ("w2", "down")):
        # The down projection lies the other way round than a linear layer's.
        down = name == "down"
        for expert in range(experts):
            table.add(
                f"{theirs}.experts.mlp.{theirs_name}",
                f"{ours}.experts.{name}_kernel",
                (hidden, features) if down else (features, hidden),
                inputs=0 if down else 1,
                index=expert,
                row=expert * hidden,
            )


DBRX = common.Family(
    model_type="dbrx",
    architecture="DbrxForCausalLM",
    settings=_settings,
    config=_config,
    entries=_entries,
    defaults={
        "vocab_size": 32000,
        "n_layers": 24,
        "d_model": 2048,
        "n_heads": 16,
        "max_seq_len": 2048,
        "initializer_range": 0.02,
    },
    tied=("transformer.wte.weight", "lm_head.weight"),
)
