"""DeepSeekMoE, DeepSeek-V2 and DeepSeek-V3.

([Dai et al., 2024](https://arxiv.org/abs/2401.06066),
[DeepSeek-AI, 2024](https://arxiv.org/abs/2405.04434),
[DeepSeek-AI, 2024](https://arxiv.org/abs/2412.19437))
"""

import dataclasses
import functools
import re
import warnings

from keras_moe import architecture
from keras_moe.checkpoints.families import common

_DEFAULTS = {**common.DEFAULTS, "moe_layer_freq": 1}
_LATENT_DEFAULTS = {
    **_DEFAULTS,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
_ALIASES = {"num_experts": "n_routed_experts", "num_local_experts": "n_routed_experts"}


def _shared_settings(read, rope_kinds=("linear", "yarn", "llama3")):
    read.harmless("aux_loss_alpha", "seq_aux", "ep_size")
    read.only("mlp_bias", False)
    return {
        **common.size_settings(read),
        **common.rope_settings(read, kinds=rope_kinds),
        "num_experts": read.integer("n_routed_experts"),
        "num_shared_experts": read.integer("n_shared_experts", 0, minimum=0),
        "top_k": read.integer("num_experts_per_tok"),
        "expert_dim": read.integer("moe_intermediate_size"),
        "dense_dim": read.integer("intermediate_size"),
        "dense_first_layers": read.integer("first_k_dense_replace", minimum=0),
        "moe_every": read.integer("moe_layer_freq"),
        "attention_bias": "all" if read.flag("attention_bias") else None,
    }


def _shared_config(s):
    shared = architecture.shared_dim(s)
    return {
        **common.size_config(s),
        **common.rope_config(s),
        "n_routed_experts": s["num_experts"],
        # Transformers knows the shared experts by their number alone.
        "n_shared_experts": shared // s["expert_dim"],
        "num_experts_per_tok": s["top_k"],
        "moe_intermediate_size": s["expert_dim"],
        "intermediate_size": s["dense_dim"] or s["expert_dim"],
        "first_k_dense_replace": min(s["dense_first_layers"], s["num_layers"]),
        "attention_bias": s["attention_bias"] == "all",
    }


def _deepseek_settings(read):
    read.only("scoring_func", "softmax")
    read.only("topk_method", "greedy")
    read.only("routed_scaling_factor", 1.0)
    return {
        # The code that comes with the checkpoint knows no other scaling that we do.
        **_shared_settings(read, rope_kinds=("linear",)),
        "head_dim": read.integer("head_dim", None),
        # Of a single expert its code leaves the gate as it is.
        "normalize_gates": read.flag("norm_topk_prob")
        and read.integer("num_experts_per_tok") > 1,
    }


def _deepseek_config(s):
    return {
        **_shared_config(s),
        "head_dim": architecture.head_dim(s),
        "moe_layer_freq": s["moe_every"],
        "norm_topk_prob": architecture.normalizes_gates(s),
    }


DEEPSEEK = common.Family(
    model_type="deepseek",
    architecture=None,
    settings=_deepseek_settings,
    config=_deepseek_config,
    entries=functools.partial(common.decoder, shared="shared_experts"),
    # Those of the code that comes with the checkpoint; without a number of experts
    # it makes a dense model.
    defaults={
        **_DEFAULTS,
        "vocab_size": 102400,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "moe_intermediate_size": 1407,
        "num_hidden_layers": 30,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "first_k_dense_replace": 0,
        "max_position_embeddings": 2048,
    },
    aliases=_ALIASES,
)


def _latent_settings(read):
    heads = read.integer("num_attention_heads")
    # Of what is cached there is one for all heads; the number must not say otherwise.
    read.only("num_key_value_heads", heads)
    # Transformers writes the rotated part's size here, and others nothing.
    read.harmless("head_dim", "qk_head_dim")
    return {
        **_shared_settings(read),
        "num_key_value_heads": None,
        "attention": "latent",
        "head_dim": read.integer("qk_nope_head_dim"),
        "rope_head_dim": read.integer("qk_rope_head_dim"),
        "value_head_dim": read.integer("v_head_dim"),
        "query_rank": read.integer("q_lora_rank", None),
        "key_value_rank": read.integer("kv_lora_rank"),
        "gate_scale": read.number("routed_scaling_factor"),
    }


def _latent_config(s):
    return {
        **_shared_config(s),
        "num_key_value_heads": s["num_query_heads"],
        "qk_nope_head_dim": s["head_dim"],
        "qk_rope_head_dim": s["rope_head_dim"],
        "v_head_dim": s["value_head_dim"],
        "q_lora_rank": s["query_rank"],
        "kv_lora_rank": s["key_value_rank"],
        "routed_scaling_factor": s["gate_scale"],
    }


def _latent_attention(table, theirs, ours, interleaved=True):
    s = table.settings
    features, heads = (s["hidden_dim"],), s["num_query_heads"]
    plain, rotary, values = s["head_dim"], s["rope_head_dim"], s["value_head_dim"]
    query_rank, rank = s["query_rank"], s["key_value_rank"]
    pairs = rotary if interleaved else 0
    bias = s["attention_bias"] == "all"
    queries = (heads, plain + rotary)
    if query_rank is None:
        table.linear(
            f"{theirs}.q_proj", f"{ours}.query", features, queries, rotary=pairs
        )
    else:
        table.linear(
            f"{theirs}.q_a_proj", f"{ours}.query_down", features, (query_rank,), bias
        )
        table.add(
            f"{theirs}.q_a_layernorm.weight",
            f"{ours}.query_down_norm.scale",
            (query_rank,),
        )
        table.linear(
            f"{theirs}.q_b_proj",
            f"{ours}.query_up",
            (query_rank,),
            queries,
            rotary=pairs,
        )
    table.linear(
        f"{theirs}.kv_a_proj_with_mqa",
        f"{ours}.key_value_down",
        features,
        (rank + rotary,),
        bias,
        rotary=pairs,
    )
    table.add(
        f"{theirs}.kv_a_layernorm.weight", f"{ours}.key_value_down_norm.scale", (rank,)
    )
    table.linear(
        f"{theirs}.kv_b_proj", f"{ours}.key_value_up", (rank,), (heads, plain + values)
    )
    table.linear(
        f"{theirs}.o_proj", f"{ours}.output_dense", (heads, values), features, bias
    )


def _ignored(name, settings):
    """Also the layers past the last, which predict several tokens at once."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    past = layer is not None and int(layer[1]) >= settings["num_layers"]
    return past or common.may_be_ignored(name, settings)


def _v2_settings(read):
    if read.flag("norm_topk_prob"):
        warnings.warn(
            "`config.json` has norm_topk_prob=True, which Transformers ignores for "
            "this type of model, and so do we: the gates are not normalised.",
            stacklevel=2,
        )
    read.only("scoring_func", "softmax")
    read.only("moe_layer_freq", 1)
    method = read.get("topk_method", "greedy")
    groups = {"expert_groups": 1, "top_k_groups": 1}
    if method == "group_limited_greedy":
        groups = {
            "expert_groups": read.integer("n_group"),
            "top_k_groups": read.integer("topk_group"),
        }
    elif method != "greedy":
        read.refuse("topk_method", "'greedy' or 'group_limited_greedy'")
    read.harmless("n_group", "topk_group")
    return {
        **_latent_settings(read),
        **groups,
        "group_scores": "max",
        "scores": "softmax",
        "normalize_gates": False,
    }


def _v2_config(s):
    grouped = s["expert_groups"] > 1
    return {
        **_latent_config(s),
        "norm_topk_prob": False,
        "topk_method": "group_limited_greedy" if grouped else "greedy",
        "n_group": s["expert_groups"] if grouped else None,
        "topk_group": s["top_k_groups"] if grouped else None,
    }


def _no_shared_experts(settings):
    """Where there are none, Transformers has them without features."""
    if architecture.shared_dim(settings):
        return {}
    D = settings["hidden_dim"]
    return {
        f"model.layers.{layer}.mlp.shared_experts.{name}_proj.weight": shape
        for layer in architecture.mixture_layers(settings)
        for name, shape in (("gate", (0, D)), ("up", (0, D)), ("down", (D, 0)))
    }


def _latent_entries(settings, interleaved=True, stacked=False):
    attention = functools.partial(_latent_attention, interleaved=interleaved)
    return common.decoder(settings, attention, shared="shared_experts", stacked=stacked)


DEEPSEEK_V2 = common.Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    settings=_v2_settings,
    config=_v2_config,
    entries=_latent_entries,
    stacked=functools.partial(_latent_entries, stacked=True),
    defaults={
        **_LATENT_DEFAULTS,
        "vocab_size": 102400,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "moe_intermediate_size": 1407,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "first_k_dense_replace": 0,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "routed_scaling_factor": 1.0,
    },
    aliases=_ALIASES,
    ignored=_ignored,
    empty=_no_shared_experts,
)


def _v3_settings(read):
    read.only("scoring_func", "sigmoid")
    read.only("topk_method", "noaux_tc")
    read.only("moe_layer_freq", 1)
    read.flag("rope_interleave")  # how tensors lie, see `_v3_variant`
    # Layers that predict several tokens at once, which generation can do without.
    read.harmless("num_nextn_predict_layers", "num_mtp_layers", "quantization_config")
    return {
        **_latent_settings(read),
        "scores": "sigmoid",
        "normalize_gates": read.flag("norm_topk_prob"),
        "selection_bias": True,
        "expert_groups": read.integer("n_group"),
        "top_k_groups": read.integer("topk_group"),
        "group_scores": "top_2",
    }


def _v3_config(s):
    return {
        **_latent_config(s),
        "norm_topk_prob": architecture.normalizes_gates(s),
        "n_group": s["expert_groups"],
        "topk_group": s["top_k_groups"],
        "rope_interleave": True,
        "num_nextn_predict_layers": 0,
    }


def _v3_variant(config):
    if config.get("rope_interleave", True):
        return DEEPSEEK_V3
    # Rotary features lie in halves, as ours do.
    entries = functools.partial(_latent_entries, interleaved=False)
    stacked = functools.partial(entries, stacked=True)
    return dataclasses.replace(DEEPSEEK_V3, entries=entries, stacked=stacked)


DEEPSEEK_V3 = common.Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    settings=_v3_settings,
    config=_v3_config,
    entries=_latent_entries,
    stacked=functools.partial(_latent_entries, stacked=True),
    defaults={
        **_LATENT_DEFAULTS,
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "max_position_embeddings": 4096,
        "first_k_dense_replace": 3,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "routed_scaling_factor": 2.5,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "rope_interleave": True,
    },
    aliases=_ALIASES,
    variant=_v3_variant,
    ignored=_ignored,
    empty=_no_shared_experts,
)
