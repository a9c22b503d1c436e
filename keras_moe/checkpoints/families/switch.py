"""Switch Transformers ([Fedus et al., 2021](https://arxiv.org/abs/2101.03961)).

Transformers' class departs from the paper, and settings read from its checkpoints
follow it:

- an expert accepts `expert_capacity` tokens of each sequence, a number, in training
  and outside; the paper's capacity is a factor of the tokens of a batch;
- padding is routed as any token is and takes capacity, `router_ignore_padding_tokens`
  or not;
- which layers are sparse follows from how many are wanted (`_sparse_step`);
- encoder and decoder share their embeddings only where the output does, too. A
  checkpoint of an older release may hold one table for both nonetheless. Where the
  three are said to be one and a checkpoint holds them apart, they stay apart, and
  logits are scaled as tied ones are.

What is of training: `dropout_rate` is `dropout`, which ours takes of experts as well
unless `expert_dropout` says otherwise; an `expert_dropout` of its own does not go out.
`router_jitter_noise` is `router_jitter`, which there falls on what the experts see as
well. Router losses, added there where `output_router_logits=True` asks for them, take
the tokens of all mixtures of a stack as one, and the balance loss each sequence alone;
ours are the paper's, of each mixture over a batch, and a sum over mixtures. So
`router_aux_loss_coef` and `router_z_loss_coef` are `balance_loss` and `z_loss` times
the mixtures of a stack (`_mixtures_a_stack`): the z-loss is then the same where both
stacks have as many, and the balance loss at an even load.
"""

from keras_moe import architecture
from keras_moe.checkpoints.families import common
from keras_moe.checkpoints.tables import Table

_PROJECTIONS = ("q", "k", "v", "o")
_PLAIN = ("wi", "wo")
_LOSSES = {"balance_loss": "router_aux_loss_coef", "z_loss": "router_z_loss_coef"}
_NO_PATTERN = {
    "moe_every": 1,
    "moe_offset": 0,
    "dense_first_layers": 0,
    "encoder_dense_layers": None,
    "decoder_dense_layers": None,
    "expert_dropout": None,
}
# What no sequence fills: an export's way to say that nothing is dropped.
_UNLIMITED = 2**30


def _settings(read):
    read.harmless(
        "add_router_probs",
        "classifier_dropout",
        "initializer_factor",
        "n_positions",
        "output_past",
        "router_ignore_padding_tokens",
        "add_cross_attention",
    )
    read.only("is_gated_act", False)
    read.only("router_bias", False)
    read.only("router_type", "tokens_masked")
    read.only("batch_prioritized_routing", False)
    read.only("router_dtype", "float32")
    activation = read.activation("dense_act_fn", "relu")
    read.only("feed_forward_proj", read.get("dense_act_fn", "relu"))
    width = read.integer("d_ff", 2048)
    tied = read.flag("tie_word_embeddings", True)
    sizes = {
        "vocabulary_size": read.integer("vocab_size", 32128),
        "hidden_dim": read.integer("d_model", 768),
        "num_query_heads": read.integer("num_heads", 12),
        "head_dim": read.integer("d_kv", 64),
        "relative_buckets": read.integer("relative_attention_num_buckets", 32),
        "relative_max_distance": read.integer("relative_attention_max_distance", 128),
        "num_experts": read.integer("num_experts", 8),
        "expert_dim": width,
        "dense_dim": width,
        "activation": activation,
        "norm_epsilon": read.number("layer_norm_epsilon", 1e-6),
        "tied_embeddings": tied,
        "shared_embeddings": tied,
        "router_jitter": read.number("router_jitter_noise", 0.01),
        "dropout": read.number("dropout_rate", 0.1),
    }
    pattern = _pattern(read)
    mixtures = _mixtures_a_stack({**_NO_PATTERN, **sizes, **pattern})
    return {
        **sizes,
        **pattern,
        **{
            ours: read.number(theirs, 0.001) / mixtures
            for ours, theirs in _LOSSES.items()
        },
        **_capacity(read.integer("expert_capacity", 64)),
        "positions": "relative_bias",
        "norm": "rms",
        "attention_scale": 1.0,
        "output_multiplier": None,
        "expert_gated": False,
        "top_k": 1,
        "normalize_gates": False,
    }


def _mixtures_a_stack(settings):
    """How many mixtures a stack that has some has on average; 1 where none has."""
    counts = [
        len(architecture.mixture_layers(s)) for s in architecture.stacks(settings)
    ]
    return (sum(counts) / sum(map(bool, counts))) if any(counts) else 1


def _capacity(capacity):
    if capacity >= _UNLIMITED:
        return {"dispatch": "dropless", "capacity": None}
    return {
        "dispatch": "capacity",
        "capacity": capacity,
        "capacity_group": "sequence",
        "route_padding": True,
    }


def _pattern(read):
    """The layers of both stacks, and which of them are mixtures."""
    encoder = read.integer("num_layers", 12)
    decoder = read.integer("num_decoder_layers", encoder)
    steps = [
        _sparse_step(read, name, layers)
        for name, layers in (("encoder", encoder), ("decoder", decoder))
    ]
    counts = {"encoder_layers": encoder, "decoder_layers": decoder}
    if steps[0] == steps[1] > 0:
        return {**counts, "moe_every": steps[0], "moe_offset": 1 % steps[0]}
    dense = [
        [i for i in range(layers) if not _is_sparse(i, step)]
        for layers, step in zip((encoder, decoder), steps, strict=True)
    ]
    return {
        **counts,
        "encoder_dense_layers": dense[0] or None,
        "decoder_dense_layers": dense[1] or None,
    }


def _sparse_step(read, stack, layers):
    """Every how many layers a mixture stands, from the second on; 0 for none.

    As Transformers divides: 12 layers of which 5 are to be sparse give a step of 2
    and so 6, and none wanted gives one.
    """
    wanted = read.integer(f"num_sparse_{stack}_layers", 3, minimum=0)
    step = layers // wanted if wanted else layers
    return read.integer(f"{stack}_sparse_step", step, minimum=0)


def _is_sparse(layer, step):
    return step == 1 or (step > 1 and layer % step == 1)


def _config(s):
    config = {
        "vocab_size": s["vocabulary_size"],
        "d_model": s["hidden_dim"],
        "d_kv": architecture.head_dim(s),
        "d_ff": s["expert_dim"],
        "num_heads": s["num_query_heads"],
        "num_layers": s["encoder_layers"],
        "num_decoder_layers": s["decoder_layers"],
        "num_experts": s["num_experts"],
        "expert_capacity": _UNLIMITED if s["capacity"] is None else s["capacity"],
        "relative_attention_num_buckets": s["relative_buckets"],
        "relative_attention_max_distance": s["relative_max_distance"],
        "dense_act_fn": common.to_activation(s["activation"]),
        "layer_norm_epsilon": s["norm_epsilon"],
        "tie_word_embeddings": s["tied_embeddings"],
        "router_jitter_noise": s["router_jitter"],
        "dropout_rate": s["dropout"],
        **{theirs: s[ours] * _mixtures_a_stack(s) for ours, theirs in _LOSSES.items()},
        "router_bias": False,
        "is_encoder_decoder": True,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
    }
    for name, stack in zip(("encoder", "decoder"), architecture.stacks(s), strict=True):
        mixtures = architecture.mixture_layers(stack)
        step = 0
        if mixtures:
            step = mixtures[1] - mixtures[0] if len(mixtures) > 1 else 1
            if len(mixtures) == 1 and stack["num_layers"] > 1:
                step = stack["num_layers"]
        config[f"{name}_sparse_step"] = step
        # More than there are divides to 0.
        config[f"num_sparse_{name}_layers"] = (
            stack["num_layers"] // step if step else stack["num_layers"] + 1
        )
    return config


def _entries(settings):
    encoder, decoder = architecture.stacks(settings)
    table = Table(settings)
    shape = (settings["vocabulary_size"], settings["hidden_dim"])
    table.add("shared.weight", "token_embedding.embeddings", shape)
    if not settings["tied_embeddings"]:
        decoder_embedding = "token_embedding"
        if not settings["shared_embeddings"]:
            decoder_embedding = "decoder_embedding"
        path = "token_embedding.embeddings"
        table.add("encoder.embed_tokens.weight", path, shape)
        path = f"{decoder_embedding}.embeddings"
        table.add("decoder.embed_tokens.weight", path, shape)
        table.add(
            "lm_head.weight",
            "token_embedding.reverse_embeddings",
            shape[::-1],
            inputs=1,
        )
    for name, stack in (("encoder", encoder), ("decoder", decoder)):
        _add_stack(table, name, stack)
    return table.entries


def _add_stack(table, name, stack):
    first = f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    shape = (stack["relative_buckets"], stack["num_query_heads"])
    table.add(first, f"{name}_position_bias.embeddings", shape)
    table.norm(f"{name}.final_layer_norm", f"{name}_layer_norm")
    for layer in range(stack["num_layers"]):
        theirs = f"{name}.block.{layer}.layer"
        ours = f"{name}_transformer_layers.{layer}"
        sublayers = [("attention", "SelfAttention")]
        if stack["cross_attention"]:
            sublayers.append(("cross_attention", "EncDecAttention"))
        for index, (our_name, their_name) in enumerate(sublayers):
            table.norm(f"{theirs}.{index}.layer_norm", f"{ours}.{our_name}_norm")
            common.attention(
                table,
                f"{theirs}.{index}.{their_name}",
                f"{ours}.{our_name}",
                names=_PROJECTIONS,
            )
        last = f"{theirs}.{len(sublayers)}"
        table.norm(f"{last}.layer_norm", f"{ours}.feed_forward_norm")
        last = f"{last}.mlp", f"{ours}.feed_forward"
        if architecture.is_mixture(stack, layer):
            common.mixture(
                table,
                *last,
                names=_PLAIN,
                router="router.classifier",
                expert="experts.expert_{}",
            )
        else:
            common.feed_forward(table, *last, stack["dense_dim"], names=_PLAIN)


def _may_be_ignored(name, settings):
    """Repeated embeddings, and a bias of cross-attention that nothing reads."""
    return (
        name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
        or (name == "lm_head.weight" and settings["tied_embeddings"])
        or name.endswith("EncDecAttention.relative_attention_bias.weight")
    )


SWITCH = common.Family(
    model_type="switch_transformers",
    architecture="SwitchTransformersForConditionalGeneration",
    settings=_settings,
    config=_config,
    entries=_entries,
    ignored=_may_be_ignored,
    stand_ins={
        "encoder.embed_tokens.weight": ("shared.weight",),
        "decoder.embed_tokens.weight": ("shared.weight",),
    },
    tied=(
        "shared.weight",
        "encoder.embed_tokens.weight",
        "decoder.embed_tokens.weight",
        "lm_head.weight",
    ),
    has_encoder=True,
)
