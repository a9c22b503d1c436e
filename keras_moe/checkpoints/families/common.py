"""What the families share: rotary settings, attention, feed-forward blocks, mixtures.

Shapes: D `hidden_dim`, H query heads, G key-value heads, d `head_dim`, E experts.
"""

import dataclasses
import math
from collections.abc import Callable

from keras_moe import architecture
from keras_moe.checkpoints.config_reader import ACTIVATIONS, ConfigReader, as_number
from keras_moe.checkpoints.tables import Table

GATED = ("gate_proj", "up_proj", "down_proj")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
# What most families' configurations mean where a key is missing.
DEFAULTS = {
    "attention_bias": False,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "norm_topk_prob": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
# Scaling of rotary angles: the checkpoint's keys and ours, by kind.
_ROPE_KEYS = {
    "linear": {"factor": "factor"},
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "original_context",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "mscale": "mscale",
        "mscale_all_dim": "mscale_all_dim",
        "attention_factor": "attention_factor",
        "truncate": "truncate",
    },
    "llama3": {
        "factor": "factor",
        "original_max_position_embeddings": "original_context",
        "low_freq_factor": "low_frequency_factor",
        "high_freq_factor": "high_frequency_factor",
    },
}
_ROPE_REQUIRED = {
    "linear": ("factor",),
    "yarn": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


def may_be_ignored(name, settings):
    """Tensors that repeat what is known: tied embeddings, rotary frequencies."""
    return (name == "lm_head.weight" and settings["tied_embeddings"]) or name.endswith(
        ".rotary_emb.inv_freq"
    )


@dataclasses.dataclass(frozen=True)
class Family:
    """How one `model_type` of Transformers is a backbone of ours.

    Attributes:
        model_type: str, as `config.json` has it.
        architecture: str or None, the class of Transformers; None where it has none,
            and the model's code comes with its checkpoint.
        settings: callable from a `ConfigReader` to a dict of settings.
        config: callable from settings, all of them, to a dict for `config.json`.
        entries: callable from settings, all of them, to a list of `Entry`.
        defaults: dict: what a key of `config.json` means that is missing.
        aliases: dict: other names that releases of Transformers write keys by.
        stacked: callable as `entries`, for checkpoints that hold the experts of a
            layer in one tensor, as Transformers 5 does in memory and writes with
            `save_original_format=False`. None where there are none.
        ignored: callable `(name, settings) -> bool`: whether a tensor that no entry
            names may be left aside.
        stand_ins: dict: by the name of a tensor that a checkpoint may not hold,
            those that have the same values, the first that is there serving.
        tied: names of the tensors that are one where `config.json` ties embeddings.
            As in Transformers, those that a checkpoint holds stay as they are, and
            the first that is there serves for those that it does not.
        has_encoder: bool: it is a `MoESeq2SeqBackbone`, else a `MoEBackbone`.
        variant: callable from a `config.json`, a dict, to the family whose tensors lie
            as it says; None where all lie alike.
        empty: callable from settings to the shapes by name of tensors without
            elements, which Transformers expects and our model has nothing for.
    """

    model_type: str
    architecture: str | None
    settings: Callable
    config: Callable
    entries: Callable
    stacked: Callable | None = None
    defaults: dict = dataclasses.field(default_factory=dict)
    aliases: dict = dataclasses.field(default_factory=dict)
    ignored: Callable = may_be_ignored
    stand_ins: dict = dataclasses.field(default_factory=dict)
    tied: tuple = ("model.embed_tokens.weight", "lm_head.weight")
    has_encoder: bool = False
    variant: Callable | None = None
    empty: Callable = lambda settings: {}

    def reader(self, config):
        """The `ConfigReader` of a `config.json` of this family."""
        return ConfigReader(config, self.defaults, self.aliases)


def size_settings(read):
    """The settings that every family but DBRX reads from the same keys."""
    heads = read.integer("num_attention_heads")
    return {
        "vocabulary_size": read.integer("vocab_size"),
        "num_layers": read.integer("num_hidden_layers"),
        "hidden_dim": read.integer("hidden_size"),
        "num_query_heads": heads,
        "num_key_value_heads": read.integer("num_key_value_heads", heads),
        "activation": read.activation(),
        "norm": "rms",
        "norm_epsilon": read.number("rms_norm_eps"),
        "tied_embeddings": read.flag("tie_word_embeddings"),
        "initializer_stddev": read.number("initializer_range"),
        "context_length": read.integer("max_position_embeddings", None),
    }


def size_config(s):
    """The inverse of `size_settings`."""
    return {
        "vocab_size": s["vocabulary_size"],
        "num_hidden_layers": s["num_layers"],
        "hidden_size": s["hidden_dim"],
        "num_attention_heads": s["num_query_heads"],
        "num_key_value_heads": architecture.num_key_value_heads(s),
        "hidden_act": to_activation(s["activation"]),
        "rms_norm_eps": s["norm_epsilon"],
        "tie_word_embeddings": s["tied_embeddings"],
        "initializer_range": s["initializer_stddev"],
        "max_position_embeddings": s["context_length"] or 32768,
    }


def to_activation(name):
    """The name of Transformers for a Keras activation; its own where there is none."""
    theirs = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    return theirs.get(name, name)


def rope_settings(
    read,
    theta=None,
    kinds=("linear", "yarn", "llama3"),
    context_key="max_position_embeddings",
):
    """`rope_theta` and `rope_scaling`, from keys of Transformers 4 or 5.

    Args:
        read: a `ConfigReader`.
        theta: float or None, the base where neither says one.
        kinds: the kinds of scaling that the family's own code has.
        context_key: str, the key of the context length.
    """
    key = "rope_scaling" if read.get("rope_scaling") else "rope_parameters"
    read.harmless("rope_scaling", "rope_parameters")
    parameters = read.get(key, {})
    if not isinstance(parameters, dict) or any(
        isinstance(value, dict) for value in parameters.values()
    ):
        read.refuse(key, "one set of parameters for all layers")
    theta = read.number("rope_theta", theta)
    parameters = dict(parameters)
    theta = as_number("rope_theta", parameters.pop("rope_theta", None) or theta)
    kind = parameters.pop("type", "default")
    kind = parameters.pop("rope_type", kind)
    parameters.pop("finetuned", None)  # how it was trained
    if parameters.pop("partial_rotary_factor", None) not in (None, 1.0):
        read.refuse(key, "a rotation of whole heads, `partial_rotary_factor` 1")
    read.only("partial_rotary_factor", 1.0)
    original = read.integer("original_max_position_embeddings", None)
    if kind == "default":
        # Left behind by other kinds, and without effect on this one.
        return {"rope_theta": theta, "rope_scaling": None}
    if kind not in kinds:
        known = ", ".join(map(repr, ("default", *kinds)))
        read.refuse(key, f"of type {known}, and not {kind!r}")
    # What another kind would read is left behind by it, and without effect.
    unknown = sorted(
        set(parameters) - {k for keys in _ROPE_KEYS.values() for k in keys}
    )
    if unknown:
        read.refuse(key, f"without {', '.join(unknown)} for type {kind!r}")
    for required in _ROPE_REQUIRED[kind]:
        if parameters.get(required) is None:
            read.refuse(key, f"with {required!r} for type {kind!r}")
    if kind != "linear":
        if original is not None:  # goes before the one within, as in Transformers
            parameters["original_max_position_embeddings"] = original
        context = read.integer(context_key)
        original = parameters.setdefault("original_max_position_embeddings", context)
        if parameters.get("factor") is None:
            parameters["factor"] = context / original
    scaling = {
        ours: parameters[theirs]
        for theirs, ours in _ROPE_KEYS[kind].items()
        if parameters.get(theirs) is not None
    }
    return {"rope_theta": theta, "rope_scaling": {"type": kind, **scaling}}


def rope_config(s):
    """The inverse of `rope_settings`, in the keys of Transformers 5 and 4."""
    parameters = {"rope_type": "default", "rope_theta": s["rope_theta"]}
    scaling = s["rope_scaling"]
    if scaling is not None:
        parameters["rope_type"] = scaling["type"]
        parameters.update(
            (theirs, scaling[ours])
            for theirs, ours in _ROPE_KEYS[scaling["type"]].items()
            if scaling.get(ours) is not None
        )
    config = {"rope_parameters": parameters, "rope_theta": s["rope_theta"]}
    if scaling is not None:
        config["rope_scaling"] = {
            key: value for key, value in parameters.items() if key != "rope_theta"
        }
    return config


def dense_or_mixture(read):
    """Which layers are mixtures, from Qwen's keys."""
    layers = read.integer("num_hidden_layers")
    step = read.integer("decoder_sparse_step")
    dense = read.get("mlp_only_layers", [])
    if not isinstance(dense, list) or not all(isinstance(i, int) for i in dense):
        read.refuse("mlp_only_layers", "a list of layers")
    return {
        "moe_every": step,
        "moe_offset": step - 1,
        "dense_layers": sorted({i for i in dense if 0 <= i < layers}) or None,
    }


def qwen_pattern_config(s):
    """The inverse of `dense_or_mixture`."""
    step = s["moe_every"]
    return {
        "decoder_sparse_step": step,
        "mlp_only_layers": [
            layer
            for layer in range(s["num_layers"])
            if (layer + 1) % step == 0 and not architecture.is_mixture(s, layer)
        ],
    }


def embeddings(table, embedding="model.embed_tokens", norm="model.norm"):
    """Adds the embeddings, the last norm and the output projection."""
    s = table.settings
    shape = (s["vocabulary_size"], s["hidden_dim"])
    table.add(f"{embedding}.weight", "token_embedding.embeddings", shape)
    if not s["tied_embeddings"]:
        table.add(
            "lm_head.weight",
            "token_embedding.reverse_embeddings",
            shape[::-1],
            inputs=1,
        )
    table.norm(norm, "layer_norm")


def attention(table, theirs, ours, names=PROJECTIONS):
    """Adds grouped-query attention with separate projections."""
    s = table.settings
    features, size = (s["hidden_dim"],), architecture.head_dim(s)
    heads = s["num_query_heads"]
    groups = architecture.num_key_value_heads(s)
    bias = s["attention_bias"]
    *inputs, output = names
    for their_name, name, count in zip(
        inputs, ("query", "key", "value"), (heads, groups, groups), strict=True
    ):
        table.linear(
            f"{theirs}.{their_name}",
            f"{ours}.{name}",
            features,
            (count, size),
            bias=bias is not None,
        )
    table.linear(
        f"{theirs}.{output}",
        f"{ours}.output_dense",
        (heads, size),
        features,
        bias=bias == "all",
    )
    if s["query_key_norm"]:
        for letter, name, count in (("q", "query", heads), ("k", "key", groups)):
            # Over a head, one weight for all of them, or over all heads together.
            shape = (count, size) if s["query_key_norm"] == "full" else (size,)
            table.add(
                f"{theirs}.{letter}_norm.weight",
                f"{ours}.{name}_norm.scale",
                shape,
                tensor_shape=(math.prod(shape),),
            )


def feed_forward(table, theirs, ours, hidden, names=GATED):
    """Adds a feed-forward block, gated where there are three names."""
    *inner, down = names
    features = (table.settings["hidden_dim"],)
    for their_name, name in zip(inner, ("gate", "up")[-len(inner) :], strict=True):
        table.linear(f"{theirs}.{their_name}", f"{ours}.{name}", features, (hidden,))
    table.linear(f"{theirs}.{down}", f"{ours}.down", (hidden,), features)


def mixture(
    table,
    theirs,
    ours,
    names=GATED,
    shared=None,
    router="gate",
    expert="experts.{}",
    stacked=False,
):
    """Adds a router and experts, and shared experts named `shared`.

    The experts are stored singly, or `stacked`: the tensor `gate_up_proj` holds of
    each the gate's rows and then the other's, and `down_proj` the rest.
    """
    s = table.settings
    features, hidden = s["hidden_dim"], s["expert_dim"]
    experts = s["num_experts"]
    table.linear(f"{theirs}.{router}", f"{ours}.router", (features,), (experts,))
    if s["selection_bias"]:
        table.add(
            f"{theirs}.gate.e_score_correction_bias",
            f"{ours}.router.selection_bias",
            (experts,),
            exact=True,
        )
    shapes = {"gate": (features, hidden), "up": (features, hidden)}
    shapes["down"] = (hidden, features)
    for kernel, name in zip([*shapes][-len(names) :], names, strict=True):
        for index in range(experts):
            tensor, where = f"{theirs}.{expert.format(index)}.{name}.weight", {}
            if stacked:
                part = "down" if kernel == "down" else "gate_up"
                tensor = f"{theirs}.experts.{part}_proj"
                row = {"gate": 2 * index, "up": 2 * index + 1, "down": index}[kernel]
                where = {"row": row * shapes[kernel][1], "stacked": experts}
            table.add(
                tensor,
                f"{ours}.experts.{kernel}_kernel",
                shapes[kernel],
                inputs=1,
                index=index,
                **where,
            )
    if shared is not None and architecture.shared_dim(s):
        feed_forward(
            table,
            f"{theirs}.{shared}",
            f"{ours}.shared_experts",
            architecture.shared_dim(s),
        )
    if s["shared_expert_gate"]:
        table.linear(
            f"{theirs}.shared_expert_gate",
            f"{ours}.shared_expert_gate",
            (features,),
            (1,),
        )


def decoder(
    settings,
    add_attention=attention,
    block="mlp",
    names=GATED,
    shared=None,
    stacked=False,
):
    """The entries of a decoder named as Llama's.

    Args:
        settings: dict, all settings of a `MoEBackbone`.
        add_attention: callable as `attention`.
        block: str, the name of the second sublayer.
        names: the names of an expert's matrices: gate, up, down.
        shared: str or None, the name of the shared experts.
        stacked: bool, whether all experts of a layer are in one tensor.
    """
    table = Table(settings)
    embeddings(table)
    for layer in range(settings["num_layers"]):
        theirs, ours = f"model.layers.{layer}", f"transformer_layers.{layer}"
        table.norm(f"{theirs}.input_layernorm", f"{ours}.attention_norm")
        table.norm(f"{theirs}.post_attention_layernorm", f"{ours}.feed_forward_norm")
        add_attention(table, f"{theirs}.self_attn", f"{ours}.attention")
        second = f"{theirs}.{block}", f"{ours}.feed_forward"
        if architecture.is_mixture(settings, layer):
            mixture(table, *second, names=names, shared=shared, stacked=stacked)
        else:
            feed_forward(table, *second, settings["dense_dim"])
    return table.entries
