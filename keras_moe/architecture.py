"""What a backbone's settings mean: what follows from them, and what they must be.

Settings are a dict by the names of the arguments of a backbone's class, such as
`MoEBackbone`. Everything here is asked of them alone: no weight and no layer is made.
A model is one stack of blocks or two, and what is asked of a layer is asked of the
settings of its stack.
"""

import inspect

from keras_moe import checks
from keras_moe.layers import routers
from keras_moe.layers.attention import BIASES, POSITIONS, QUERY_KEY_NORMS
from keras_moe.layers.mixture_of_experts import check_mixture
from keras_moe.layers.relative_bias import check_buckets
from keras_moe.layers.rotary import check_scaling
from keras_moe.layers.transformer_block import NORMS

_NOT_SETTINGS = ("self", "dtype", "kwargs")
_OF_LAYERS = ("dtype", "name", "trainable")

# How routers are taught, of which no checkpoint says anything.
ROUTER_TRAINING = (
    "balance_choices",
    "balance_loss",
    "bias_update_rate",
    "second_choice_threshold",
    "z_loss",
)
# All that is of training alone: a checkpoint of Transformers may know no such setting,
# or another in its place.
TRAINING = (
    *ROUTER_TRAINING,
    "dropout",
    "expert_dropout",
    "initializer_scale",
    "initializer_stddev",
    "inner_dropout",
    "recompute",
    "router_jitter",
)

# What each kind of attention needs, and what only it knows.
_LATENT_SETTINGS = ("key_value_rank", "rope_head_dim", "value_head_dim", "query_rank")
_GROUPED_QUERY_SETTINGS = (
    "attention_scale",
    "num_key_value_heads",
    "query_key_norm",
    "clip_query_key_value",
)


def names(backbone_cls):
    """The names of all settings of a class of backbones, a tuple."""
    parameters = inspect.signature(backbone_cls.__init__).parameters
    return tuple(name for name in parameters if name not in _NOT_SETTINGS)


def check_names(given, backbone_cls):
    """Refuses names that are no settings: Keras would take them in silence."""
    for name in given:
        checks.one_of("setting", name, (*names(backbone_cls), *_OF_LAYERS))


def complete(settings, backbone_cls):
    """All settings of a class: those given, and the defaults of the others.

    Raises:
        ValueError: for names that are no settings, and where one without a default
            is missing.
    """
    check_names(settings, backbone_cls)
    parameters = inspect.signature(backbone_cls.__init__).parameters
    found = {}
    for name in names(backbone_cls):
        found[name] = settings.get(name, parameters[name].default)
    missing = [n for n, value in found.items() if value is inspect.Parameter.empty]
    if missing:
        raise ValueError(
            f"Settings must hold {', '.join(map(repr, missing))}. Received: "
            f"{settings.get('name', 'settings')} without"
        )
    return found


# --- What follows ---

# Settings of a decoder alone, as the stacks of an encoder-decoder have them.
_OF_DECODERS = {
    "attention": "grouped_query",
    "query_rank": None,
    "key_value_rank": None,
    "rope_head_dim": None,
    "value_head_dim": None,
    "rope_scaling": None,
    "sliding_window": None,
    "sliding_layers": None,
}


def has_encoder(settings):
    """Whether they, or their names, are those of an encoder-decoder."""
    return "encoder_layers" in settings


def stacks(settings):
    """The settings of each stack of blocks: the decoder's, or the encoder's before it.

    They are those of the model as `MoEBackbone` names them, with `num_layers` and
    `dense_layers` of the stack, and

    - `causal`: whether a token sees none after it;
    - `cross_attention`: whether it sees the states of an encoder;
    - `shares_bias`: whether all layers add the same relative bias;
    - `inner_dropout`: of attention weights, and of hidden features of dense layers.
    """
    if not has_encoder(settings):
        of_stack = dict(
            causal=True,
            cross_attention=False,
            shares_bias=False,
            shared_embeddings=True,
            inner_dropout=0.0,
        )
        return ({**settings, **of_stack},)
    expert_dropout = settings["expert_dropout"]
    if expert_dropout is None:
        expert_dropout = settings["dropout"]
    return tuple(
        {
            **_OF_DECODERS,
            **settings,
            "num_layers": settings[f"{name}_layers"],
            "dense_layers": settings[f"{name}_dense_layers"],
            "causal": name == "decoder",
            "cross_attention": name == "decoder",
            "shares_bias": True,
            "inner_dropout": settings["dropout"],
            "expert_dropout": expert_dropout,
        }
        for name in ("encoder", "decoder")
    )


def output_multiplier(settings):
    """What logits are multiplied by."""
    if settings["output_multiplier"] is not None:
        return settings["output_multiplier"]
    return settings["hidden_dim"] ** -0.5 if settings["tied_embeddings"] else 1.0


def is_mixture(settings, layer):
    """Whether a layer, from 0, is a mixture."""
    return (
        settings["num_experts"] > 0
        and layer >= settings["dense_first_layers"]
        and layer % settings["moe_every"] == settings["moe_offset"]
        and layer not in (settings["dense_layers"] or ())
    )


def mixture_layers(settings):
    """The layers that are mixtures, a tuple of their indices."""
    layers = range(settings["num_layers"])
    return tuple(layer for layer in layers if is_mixture(settings, layer))


def sliding_layers(settings):
    """The layers whose attention has a window, a tuple of their indices."""
    if settings["sliding_window"] is None:
        return ()
    if settings["sliding_layers"] is None:
        return tuple(range(settings["num_layers"]))
    return tuple(sorted(settings["sliding_layers"]))


def dense_gated(settings):
    """Whether dense layers are gated."""
    given = settings["dense_gated"]
    return settings["expert_gated"] if given is None else given


def head_dim(settings):
    """The features of a head."""
    if settings["head_dim"] is not None:
        return settings["head_dim"]
    return settings["hidden_dim"] // settings["num_query_heads"]


def num_key_value_heads(settings):
    """The heads of keys and values."""
    return settings["num_key_value_heads"] or settings["num_query_heads"]


def shared_dim(settings):
    """The hidden width of all shared experts together, 0 without any."""
    if not settings["num_shared_experts"]:
        return 0
    given = settings["shared_expert_dim"]
    return given or settings["num_shared_experts"] * settings["expert_dim"]


def normalizes_gates(settings):
    """Whether the gates of the chosen experts are made to sum to one."""
    if settings["gates_from"] == "top_k" and settings["scores"] == "softmax":
        return True
    return routers.normalizes_gates(settings["normalize_gates"], settings["top_k"])


# --- What they must be ---


def check(settings):
    """Refuses settings that no model can have, before anything is made of them."""
    counts = ["num_layers"]
    lists = ["sliding_layers", "dense_layers"]
    if has_encoder(settings):
        counts = ["encoder_layers", "decoder_layers"]
        lists = ["encoder_dense_layers", "decoder_dense_layers"]
    for name in ("vocabulary_size", *counts, "hidden_dim", "moe_every"):
        checks.at_least(name, settings[name], 1)
    for name in ("num_experts", "moe_offset", "dense_first_layers"):
        checks.at_least(name, settings[name], 0)
    if settings["context_length"] is not None:
        checks.at_least("context_length", settings["context_length"], 1)
    for name in ("initializer_stddev", "embedding_multiplier", "norm_epsilon"):
        checks.positive(name, settings[name])
    for name in ("initializer_scale", "output_multiplier"):
        if settings[name] is not None:
            checks.positive(name, settings[name])
    checks.one_of("norm", settings["norm"], NORMS)
    checks.fraction("dropout", settings["dropout"])
    checks.activation("activation", settings["activation"])
    if settings["moe_offset"] >= settings["moe_every"]:
        raise ValueError(
            "`moe_offset` must be below `moe_every` "
            f"({settings['moe_every']}). Received: moe_offset={settings['moe_offset']}"
        )
    for name, count in zip(lists, counts * (2 // len(counts)), strict=True):
        for index in settings[name] or ():
            checks.one_of(f"an entry of {name}", index, range(settings[count]))
    if has_encoder(settings):
        if settings["tied_embeddings"] and not settings["shared_embeddings"]:
            raise ValueError(
                "`shared_embeddings=False` needs `tied_embeddings=False`. Received: "
                f"tied_embeddings={settings['tied_embeddings']!r}"
            )
    for stack in stacks(settings):
        _check_attention(stack)
        _check_layers(stack)


def _check_layers(stack):
    mixtures = len(mixture_layers(stack))
    dense = stack["num_layers"] - mixtures
    if stack["extra_dense"]:
        dense += mixtures
    for count, kind, name in (
        (mixtures, "mixture", "expert_dim"),
        (dense, "dense", "dense_dim"),
    ):
        if count and stack[name] is None:
            raise ValueError(
                f"`{name}` is needed where there are {kind} layers. "
                f"Received: {name}=None"
            )
        if count:
            checks.at_least(name, stack[name], 1)
    if mixtures:
        check_mixture(stack)


def _check_attention(settings):
    checks.one_of("attention", settings["attention"], ("grouped_query", "latent"))
    latent = settings["attention"] == "latent"
    for name in _GROUPED_QUERY_SETTINGS if latent else _LATENT_SETTINGS:
        if settings[name] is not None:
            raise ValueError(
                f"`{name}` must be None with `attention={settings['attention']!r}`. "
                f"Received: {name}={settings[name]!r}"
            )
    checks.at_least("num_query_heads", settings["num_query_heads"], 1)
    checks.one_of("positions", settings["positions"], POSITIONS)
    checks.one_of("attention_bias", settings["attention_bias"], BIASES)
    checks.positive("rope_theta", settings["rope_theta"])
    for name in ("attention_soft_cap", "attention_scale", "clip_query_key_value"):
        if settings[name] is not None:
            checks.positive(name, settings[name])
    for name in ("sliding_window", "query_rank"):
        if settings[name] is not None:
            checks.at_least(name, settings[name], 1)
    if not latent:
        _check_heads(settings)
    else:
        for name in ("head_dim", *_LATENT_SETTINGS[:-1]):
            checks.at_least(name, settings[name], 1)
        checks.even("rope_head_dim", settings["rope_head_dim"])
        if settings["positions"] != "rotary":
            raise ValueError(
                '`positions` must be "rotary" with `attention="latent"`. '
                f"Received: positions={settings['positions']!r}"
            )
    check_scaling(settings["rope_scaling"])
    if settings["sliding_layers"] is not None and settings["sliding_window"] is None:
        raise ValueError(
            "`sliding_layers` needs a `sliding_window`. "
            f"Received: sliding_layers={settings['sliding_layers']!r}"
        )


def _check_heads(settings):
    heads, groups = settings["num_query_heads"], settings["num_key_value_heads"]
    if groups is not None:
        checks.at_least("num_key_value_heads", groups, 1)
        checks.divides("num_query_heads", heads, "num_key_value_heads", groups)
    if settings["head_dim"] is None:
        checks.divides("hidden_dim", settings["hidden_dim"], "num_query_heads", heads)
    else:
        checks.at_least("head_dim", settings["head_dim"], 1)
    checks.one_of("query_key_norm", settings["query_key_norm"], QUERY_KEY_NORMS)
    if settings["positions"] == "rotary":
        checks.even("head_dim", head_dim(settings))
    if settings["positions"] == "relative_bias":
        check_buckets(
            settings["relative_buckets"],
            settings["relative_max_distance"],
            not settings["causal"],
            names=("relative_buckets", "relative_max_distance"),
        )
