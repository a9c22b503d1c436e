"""What a model takes: parameters, operations and bytes, from its settings alone.

B  batch                S  sequence length      D  `hidden_dim`
V  vocabulary           H  query heads          G  key-value heads
d  head size            E  experts              K  choices a token
F  hidden width of a feed-forward network or an expert
and of latent attention
R  rank of the latent of keys and values        Q  rank of the queries' own
n  features of a head without positions         r  features with rotary positions
v  features of a value

Settings give the shape of every weight, and all figures follow from the shapes.
Nothing is allocated and no backend is asked.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

from keras_moe import architecture, checks
from keras_moe.distribution.device_plan import DevicePlan, device_plan
from keras_moe.models import MoEBackbone, MoESeq2SeqBackbone, presets
from keras_moe.units import bytes_text, count_text

# Bytes of a weight and of an activation.
_DTYPES = {
    "float64": (8, 8),
    "float32": (4, 4),
    "bfloat16": (2, 2),
    "float16": (2, 2),
    "mixed_bfloat16": (4, 2),
    "mixed_float16": (4, 2),
}
_FLOAT32 = 4  # bytes: what a router computes in, whatever the dtype

# How many copies of a weight's shape a Keras optimizer keeps, in the weight's dtype.
# Adafactor keeps one, and its factors besides.
_SLOTS = {
    "sgd": 0,
    "sgd_momentum": 1,
    "adam": 2,
    "adamw": 2,
    "lion": 1,
    "adafactor": 1,
}

_NORM_VECTORS = {"rms": 1, "layer": 2, "layer_no_bias": 1}  # [D] each


class Part(NamedTuple):
    """The parameters of one part of a model.

    Attributes:
        name: str: `"embeddings"`, `"attention"`, `"norms"`, `"dense"` (feed-forward
            blocks), `"routers"`, `"experts"` or `"shared experts"`.
        total: int, all of them.
        active: int, those that one token uses.
    """

    name: str
    total: int
    active: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a model takes in training and in serving; `print` shows a table.

    Attributes:
        name: str, the preset's.
        batch_size: int, B, sequences.
        sequence_length: int, S, tokens.
        dtype: str.
        optimizer: str.
        parts: tuple of `Part`: the parameters of each part that the model has.
        total_parameters: int.
        active_parameters: int: those that one token uses: attention, norms, router,
            its `top_k` experts, shared experts, dense feed-forward blocks, and the
            embeddings, of input and output, whole.
        flops_per_token: int, floating-point operations of the forward pass, output
            logits included, two for each multiplication of a matrix product. Scores
            count every key of the sequence for each query, as they are computed and
            then masked. Lookups and element-wise work are left out. Training takes
            three times as many, and a further forward pass with `recompute=True`.
        weight_bytes: int.
        gradient_bytes: int, of all weights that the gradient trains, in their dtype.
        optimizer_bytes: int, the optimizer's variables but for a few scalars.
        cache_bytes: int, keys and values of `B S` tokens, in the dtype of the
            activations: `2 G d` a token and layer, with latent attention `R + r`.
            A sliding window does not shrink it: all tokens are kept.
        activation_bytes: int, what a training step keeps for the gradient at its
            peak, after the forward pass; see `plan`.
        score_bytes: int, those of them that are scores of attention, which a fused
            kernel does not keep.
        device: `DevicePlan`: what each device of a mesh takes; None without one.
    """

    name: str
    batch_size: int
    sequence_length: int
    dtype: str
    optimizer: str
    parts: tuple
    total_parameters: int
    active_parameters: int
    flops_per_token: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    cache_bytes: int
    activation_bytes: int
    score_bytes: int
    device: DevicePlan | None = None

    @property
    def training_bytes(self):
        """Weights, gradients, the optimizer's variables and activations, an int."""
        return (
            self.weight_bytes
            + self.gradient_bytes
            + self.optimizer_bytes
            + self.activation_bytes
        )

    @property
    def serving_bytes(self):
        """Weights and cache, an int; the layer being computed comes on top."""
        return self.weight_bytes + self.cache_bytes

    def to_dict(self):
        """All figures as a dict that JSON can hold, by name."""
        figures = dataclasses.asdict(dataclasses.replace(self, device=None))
        figures.pop("device")
        if self.device is not None:
            figures["device"] = self.device.to_dict()
        return {
            **figures,
            "parts": {
                part.name: {"total": part.total, "active": part.active}
                for part in self.parts
            },
            "training_bytes": self.training_bytes,
            "serving_bytes": self.serving_bytes,
        }

    def __str__(self):
        total = Part("total", self.total_parameters, self.active_parameters)
        parameters = [
            (part.name, count_text(part.total), count_text(part.active))
            for part in (*self.parts, total)
        ]
        memory = [
            ("weights", self.weight_bytes, self.weight_bytes),
            ("gradients", self.gradient_bytes, None),
            (self.optimizer, self.optimizer_bytes, None),
            ("activations", self.activation_bytes, None),
            ("  of them scores", self.score_bytes, None),
            ("key-value cache", None, self.cache_bytes),
            ("total", self.training_bytes, self.serving_bytes),
        ]
        memory = [(name, *map(bytes_text, row)) for name, *row in memory]
        rows = [
            ("parameters", "all", "a token's"),
            *((f"  {name}", *row) for name, *row in parameters),
            ("operations a token", f"{self.flops_per_token / 1e9:.4g} GFLOP", ""),
            ("memory", "training", "serving"),
            *((f"  {name}", *row) for name, *row in memory),
        ]
        lines = [f"{a:<20}{b:>14}{c:>14}".rstrip() for a, b, c in rows]
        sequences = "sequence" if self.batch_size == 1 else "sequences"
        title = (
            f"{self.name}: {self.batch_size} {sequences} of {self.sequence_length} "
            f"tokens in {self.dtype}"
        )
        if self.device is not None:
            lines += ["", str(self.device)]
        return "\n".join([title, *lines])


def plan(
    preset,
    batch_size=1,
    sequence_length=None,
    dtype="bfloat16",
    optimizer="adamw",
    mesh=None,
    platform="gpu",
):
    """What a model takes, computed from its settings without building it.

    **Activations** are those kept for the gradient by a training step on `B S`
    tokens: the inputs of every matrix product and of every function that is not
    linear. A token keeps, in the dtype of the activations unless said otherwise,

    - for each block `4 D`: its input, the middle, and their norms (`6 D` with
      `output_norms`);
    - for attention `(H + 2 G) d` for queries, keys and values and `H d` for the
      output. `query_key_norm` adds `(H + G) d`. Latent attention keeps
      `2 Q + 2 R + r` of latents and `H (2 n + r)` for queries and keys, and `2 H v`
      for values and output;
    - for the scores of attention `3 H S` in float32, masked, exponentiated and
      normalised. This is what grows with the length, and what a fused kernel, such
      as torch's, does not keep;
    - for a dense block of width F `4 F` gated, `2 F` plain;
    - for a mixture `K (2 D + 4 F)` gated, `K (2 D + 2 F)` plain, for the rows of its
      experts, what a dense block of their width keeps for shared experts, and in
      float32 `D + 2 E` for the router and `K D` for the sum of the experts;
    - once, `2 D` for the last norm, `V` for the logits and `V` in float32 for the
      loss.

    An encoder-decoder keeps this for both of its stacks, and a decoder block with
    cross-attention its norm, middle, queries, keys, values, output and scores as
    well. A token of it is one of the source together with one of the target: it uses
    both stacks, and the operations, the cache and the activations are those of such
    a pair.

    A mixed dtype adds the copies of all matrices that the products were computed
    with. With the setting `recompute=True` a block keeps its input alone, `D`, and
    the block that keeps most adds its own while it is recomputed. What is needed only
    for a moment comes on top, as do the masks of dropout. It is an estimate: of small
    models JAX was seen to keep 0.7 to 1.3 times as much, and torch 0.6 to 1.1 times
    what it is without the scores.

    **On a mesh** `device` of the plan says what each device holds, computes and sends
    in a training step, with the layout map of the backbone or of the distribution.
    Let P be the bytes of a tensor and n the devices of the axes that a collective
    runs over. All-gather (P the result), reduce-scatter and all-to-all send
    `P (n - 1) / n` from each device, all-reduce `2 P (n - 1) / n`, which is what rings
    send and no way sends less (derived in `keras_moe/distribution/traffic.py`).
    With `T = B S / n` tokens on a device of those that share the batch, they are

    - for weights stored over axes of the batch, an all-gather of their part of the
      model axis, P its bytes in the dtype of the products, twice with
      `recompute=True`; of the logits' table twice where a device's part of the
      vocabulary is larger than T;
    - for their gradients a reduce-scatter, and for those of weights that lie whole an
      all-reduce;
    - for a mixture whose experts lie over the expert axis four or five all-to-alls of
      `T K D` numbers: rows there and back, and on the way back gradients there and
      back, with the rows once more where rounds are not kept (`dropless`); two
      more with `recompute=True`. With them, the counts of rows for each expert
      from each device of the axis, in int32;
    - for routing statistics, an all-reduce of E numbers, and of 2 E more with a
      balance loss;
    - for the model axis, all-reduces of `T D` numbers where products come back to D,
      forward, and where they leave it, backward; of a mixture three;
    - for embeddings whose features are stored over axes of the batch, an all-gather of
      ids and two all-to-alls of `T D` numbers, or, where `V < T`, of the table, and
      its gradient as for weights.

    Rows are those of an even load. A few scalars, and ids over the model axis,
    are left out. Memory is what the parts of weights, summed gradients and the
    optimizer take, the weights as gathered, the activations above for T tokens and
    a device's part of heads, vocabulary and hidden features, and the buffers of one
    mixture's rows. Experts whose rows travel in rounds keep no hidden features: they
    are computed anew, once more forward. `device.step_seconds` bounds the time.

    Args:
        preset: what to plan for: the name of a preset, a folder with a
            `config.json`, a `MoEBackbone` or `MoESeq2SeqBackbone`, a task over one,
            or a dict of its settings.
        batch_size: int, B, sequences of a step or served at once.
        sequence_length: int, S, tokens of each, at most the preset's
            `context_length`, which is what None stands for. Of an encoder-decoder,
            tokens of each source and of each target.
        dtype: a dtype policy, by name or as an object: float32, bfloat16, float16,
            float64, mixed_bfloat16 or mixed_float16, of which the last two have
            float32 weights. It goes before the preset's own. Routers have float32
            weights in any case.
        optimizer: `"sgd"`, `"sgd_momentum"`, `"adam"`, `"adamw"`, `"lion"` or
            `"adafactor"`, with the variables that Keras's has.
        mesh: None, or a `keras.distribution.DeviceMesh`, a
            `keras_moe.distribution.ExpertParallel`, or, for devices that are not
            there, a dict of the sizes of axes, such as
            `{"batch": 4, "expert": 64, "model": 8}`, the innermost last. The batch
            is that of all devices.
        platform: `"gpu"`, `"tpu"` or `"cpu"`: what XLA compiles for. On the CPU it
            has no ragged all-to-all, so that whole buffers travel, makes no
            reduce-scatter of an all-reduce of which each device keeps a part, and
            sums gradients of several products over the model axis one by one.

    Returns:
        A `Plan`.

    Raises:
        ValueError: for an unknown preset, dtype or optimizer, sizes below 1, a
            sequence longer than the context, settings that do not fit together or
            whose weights are not known here, and a mesh whose axes are unknown or do
            not divide the batch, the experts, their hidden features or the heads.
        FileNotFoundError: for a folder without `config.json`.

    Example:

    ```python
    plan = keras_moe.plan("mixtral_8x7b", batch_size=8, sequence_length=4096)
    plan.total_parameters  # 46702792704
    plan.serving_bytes / 2**30  # GiB
    print(plan)

    plan = keras_moe.plan("mixtral_8x7b", 64, 4096, mesh={"batch": 4, "expert": 8})
    plan.device.training_bytes  # of each of the 32 devices
    plan.device.sent_by("kind")  # {"all_to_all": ..., ...}
    plan.device.step_seconds(flops_per_second=989e12, bytes_per_second=450e9)
    ```
    """
    name, stacks = _read(preset)
    checks.at_least("batch_size", batch_size, 1)
    sequence_length = _sequence_length(sequence_length, stacks[0]["context_length"])
    dtype = getattr(dtype, "name", dtype)
    checks.one_of("dtype", dtype, tuple(_DTYPES))
    checks.one_of("optimizer", optimizer, tuple(_SLOTS))
    weight_size, value_size = _DTYPES[dtype]
    tokens = batch_size * sequence_length
    weights = list(_weights(stacks))
    parts = _parts(weights)

    def weight_bytes(elements, kept=weights):
        """Bytes of `elements(weight)` numbers for each of the weights."""
        return sum(
            elements(w) * w.count * (_FLOAT32 if w.float32 else weight_size)
            for w in kept
        )

    trained = [w for w in weights if w.trainable]
    gradient_bytes = weight_bytes(lambda w: w.size, trained)
    optimizer_bytes = _SLOTS[optimizer] * gradient_bytes
    if optimizer == "adafactor":
        optimizer_bytes += weight_bytes(_factors, trained)
    score_bytes = tokens * _scores(stacks, sequence_length) * _FLOAT32
    activation_bytes = tokens * _activations(stacks, value_size)
    if weight_size != value_size:
        activation_bytes += _copied(stacks, weights) * value_size
    flops_per_token = _flops(stacks, weights, sequence_length)
    device = None
    if mesh is not None:
        device = device_plan(
            mesh,
            stacks,
            weights,
            batch_size,
            sequence_length,
            sizes=_DTYPES[dtype],
            slots=_SLOTS[optimizer],
            factors=_factors if optimizer == "adafactor" else lambda weight: 0,
            kept=lambda stacks: (
                _activations(stacks, value_size)
                + _scores(stacks, sequence_length) * _FLOAT32
            ),
            flops_per_token=flops_per_token,
            platform=platform,
        )
    return Plan(
        name=name,
        batch_size=batch_size,
        sequence_length=sequence_length,
        dtype=dtype,
        optimizer=optimizer,
        parts=parts,
        total_parameters=sum(part.total for part in parts),
        active_parameters=sum(part.active for part in parts),
        flops_per_token=flops_per_token,
        weight_bytes=weight_bytes(lambda w: w.size),
        gradient_bytes=gradient_bytes,
        optimizer_bytes=optimizer_bytes,
        cache_bytes=tokens * _cached(stacks[-1]) * value_size,
        activation_bytes=activation_bytes + score_bytes,
        score_bytes=score_bytes,
        device=device,
    )


def count_parameters(preset):
    """The parameters of a model, and how many of them one token uses.

    Args:
        preset: as for `plan`.

    Returns:
        `(total, active)`, two ints.
    """
    parts = _parts(_weights(_read(preset)[1]))
    return sum(part.total for part in parts), sum(part.active for part in parts)


# --- Settings ---


def stacks_of(preset):
    """The settings of a model's stacks of blocks, complete and checked.

    Args:
        preset: as for `plan`.

    Returns:
        A list of dicts, as `architecture.stacks` gives them.
    """
    return _read(preset)[1]


def _read(preset):
    """The name of a preset and the settings of its stacks, complete and checked."""
    if isinstance(preset, dict):
        config = preset
        if "config" in preset:  # as Keras writes an object
            config = presets.settings_of(preset, "preset")
        name = config.get("name", "settings")
    elif hasattr(preset, "get_config"):
        backbone = getattr(preset, "backbone", preset)
        if not isinstance(backbone, (MoEBackbone, MoESeq2SeqBackbone)):
            raise ValueError(
                "`preset` must be a `MoEBackbone` or a `MoESeq2SeqBackbone`, where it "
                f"is a model. Received: a {type(backbone).__name__}"
            )
        name, config = preset.name, backbone.get_config()
    else:
        if "://" in str(preset):
            raise ValueError(
                "`preset` must be here to be planned: a preset's name or a local "
                f"folder. Received: the handle {preset!r}"
            )
        name, config = str(preset), presets.settings(presets.preset_folder(preset))
    seq2seq = architecture.has_encoder(config)
    settings = architecture.complete(
        config, MoESeq2SeqBackbone if seq2seq else MoEBackbone
    )
    architecture.check(settings)
    stacks = architecture.stacks(settings)
    for stack in stacks:
        _fill_in(stack)
    return name, stacks


def _fill_in(s):
    """Fills in the sizes that follow from others.

    Raises:
        ValueError: for a router whose weights are not known.
    """
    if s["attention"] == "grouped_query":
        s["num_key_value_heads"] = architecture.num_key_value_heads(s)
        s["head_dim"] = architecture.head_dim(s)
    if _mixtures(s) and s["router"] != "top_k":
        raise ValueError(
            "`router` must be 'top_k' to be planned: the weights of others are "
            f"not known. Received: router={s['router']!r}"
        )


def _sequence_length(length, context):
    if length is None:
        if context is None:
            raise ValueError(
                "`sequence_length` is needed where the preset sets no "
                "`context_length`. Received: sequence_length=None"
            )
        return context
    checks.at_least("sequence_length", length, 1)
    if context is not None and length > context:
        raise ValueError(
            "`sequence_length` must not exceed the preset's `context_length` "
            f"({context}). Received: sequence_length={length}"
        )
    return length


def _mixtures(s):
    return len(architecture.mixture_layers(s))


def _dense_layers(s):
    return s["num_layers"] - _mixtures(s)


def _dense_blocks(s):
    """Dense feed-forward blocks: of dense layers, and those that follow mixtures."""
    return s["num_layers"] if s["extra_dense"] else _dense_layers(s)


# --- Weights ---


class _Weight(NamedTuple):
    """One variable, and how many layers have one like it.

    Attributes:
        part: str, the part of the model it belongs to.
        path: str, how its path in the model ends.
        shape: tuple of int.
        count: int.
        used: pair of int: a token uses so many of so many equal parts.
        multiplied: bool: it is the matrix of a product.
        float32: bool, whatever the dtype policy.
        trainable: bool, by the gradient.
    """

    part: str
    path: str
    shape: tuple
    count: int
    used: tuple = (1, 1)
    multiplied: bool = False
    float32: bool = False
    trainable: bool = True

    @property
    def size(self):
        """The number of its elements."""
        return math.prod(self.shape)

    @property
    def active(self):
        """How many of them a token uses."""
        part, whole = self.used
        return self.size * part // whole


def _weights(stacks):
    """Every variable of a model, as a `_Weight`."""
    s = stacks[0]
    D, V = s["hidden_dim"], s["vocabulary_size"]
    tied = s["tied_embeddings"]
    tokens, part = "token_embedding/embeddings", "embeddings"
    yield _Weight(part, tokens, (V, D), 1, multiplied=tied)  # tied: logits, too
    if not tied:
        reverse = "token_embedding/reverse_embeddings"
        yield _Weight(part, reverse, (D, V), 1, multiplied=True)
    if not s["shared_embeddings"]:
        yield _Weight(part, "decoder_embedding/embeddings", (V, D), 1)
    for s in stacks:
        yield from _stack(s)


def _stack(s):
    D = s["hidden_dim"]
    if s["attention"] == "latent":
        yield from _latent_attention(s)
    else:
        yield from _heads(s, "attention")
    if s["cross_attention"]:
        yield from _heads(s, "cross_attention")
    if s["positions"] == "relative_bias":
        tables = 1 if s["shares_bias"] else s["num_layers"]
        table = s["relative_buckets"], s["num_query_heads"]
        yield _Weight("attention", "relative_bias/embeddings", table, tables)
    norms = _sublayers(s) * (2 if s["output_norms"] else 1) + 1
    for name in ("scale", "bias")[: _NORM_VECTORS[s["norm"]]]:
        yield _Weight("norms", f"norm/{name}", (D,), norms)
    if _dense_blocks(s):
        width, gated = s["dense_dim"], architecture.dense_gated(s)
        yield from _feed_forward(
            "dense", "feed_forward", D, width, gated, _dense_blocks(s)
        )
    if _mixtures(s):
        yield from _mixture(s)


def _sublayers(s):
    """Sublayers with a norm and a residual, of all layers together."""
    attentions = 2 if s["cross_attention"] else 1
    return attentions * s["num_layers"] + _mixtures(s) + _dense_blocks(s)


def _heads(s, name):
    """Of grouped-query attention, to itself or to a source."""
    D, H, G, d = _attention_sizes(s)
    add, product = _adder("attention", name, s["num_layers"])
    yield product("query/kernel", D, H, d)
    yield product("key/kernel", D, G, d)
    yield product("value/kernel", D, G, d)
    yield product("output_dense/kernel", H, d, D)
    if s["attention_bias"] is not None:
        yield add("query/bias", H, d)
        yield add("key/bias", G, d)
        yield add("value/bias", G, d)
    if s["attention_bias"] == "all":
        yield add("output_dense/bias", D)
    if s["query_key_norm"] == "head":
        yield add("query_norm/scale", d)
        yield add("key_norm/scale", d)
    elif s["query_key_norm"] == "full":
        yield add("query_norm/scale", H, d)
        yield add("key_norm/scale", G, d)


def _latent_attention(s):
    D, H, Q, R, n, r, v = _latent_sizes(s)
    add, product = _adder("attention", "attention", s["num_layers"])
    biased = s["attention_bias"] is not None
    if s["query_rank"] is None:
        yield product("query/kernel", D, H, n + r)
    else:
        yield product("query_down/kernel", D, Q)
        if biased:
            yield add("query_down/bias", Q)
        yield add("query_down_norm/scale", Q)
        yield product("query_up/kernel", Q, H, n + r)
    yield product("key_value_down/kernel", D, R + r)
    if biased:
        yield add("key_value_down/bias", R + r)
    yield add("key_value_down_norm/scale", R)
    yield product("key_value_up/kernel", R, H, n + v)
    yield product("output_dense/kernel", H, v, D)
    if s["attention_bias"] == "all":
        yield add("output_dense/bias", D)


def _feed_forward(part, name, D, F, gated, count):
    _, product = _adder(part, name, count)
    if gated:
        yield product("gate/kernel", D, F)
    yield product("up/kernel", D, F)
    yield product("down/kernel", F, D)


def _mixture(s):
    D, E, F, count = s["hidden_dim"], s["num_experts"], s["expert_dim"], _mixtures(s)
    chosen = (s["top_k"], E)
    router = functools.partial(_Weight, "routers", count=count, float32=True)
    yield router("router/kernel", (D, E), multiplied=True)
    if s["selection_bias"]:
        yield router("router/selection_bias", (E,), trainable=False)
    kernels = [("up", D, F), ("down", F, D)]
    for name, rows, columns in [("gate", D, F)] * s["expert_gated"] + kernels:
        path, shape = f"mixture/experts/{name}_kernel", (E, rows, columns)
        yield _Weight("experts", path, shape, count, used=chosen, multiplied=True)
    width = architecture.shared_dim(s)
    if width:
        gated = s["expert_gated"]
        yield from _feed_forward(
            "shared experts", "shared_experts", D, width, gated, count
        )
        if s["shared_expert_gate"]:
            path = "shared_expert_gate/kernel"
            yield _Weight("shared experts", path, (D, 1), count, multiplied=True)


def _adder(part, name, count):
    """Two functions that make a `_Weight` of a path: a vector's and a matrix's."""

    def add(path, *shape, **kwargs):
        return _Weight(part, f"{name}/{path}", shape, count, **kwargs)

    return add, functools.partial(add, multiplied=True)


def _attention_sizes(s):
    names = ("hidden_dim", "num_query_heads", "num_key_value_heads", "head_dim")
    return tuple(s[name] for name in names)


def _latent_sizes(s):
    D, H, n = s["hidden_dim"], s["num_query_heads"], s["head_dim"]
    r, v = s["rope_head_dim"], s["value_head_dim"]
    return D, H, s["query_rank"] or 0, s["key_value_rank"], n, r, v


def _parts(weights):
    total, active = {}, {}
    for w in weights:
        total[w.part] = total.get(w.part, 0) + w.size * w.count
        active[w.part] = active.get(w.part, 0) + w.active * w.count
    return tuple(Part(name, total[name], active[name]) for name in total)


def _factors(weight):
    """The elements of Adafactor's factors: sums over the last axis, and the one before.

    [Shazeer and Stern, 2018](https://arxiv.org/abs/1804.04235), section 3. Keras keeps
    them for every variable of two axes or more, as matrices over the last two.
    """
    if len(weight.shape) < 2:
        return 0
    *others, rows, columns = weight.shape
    return math.prod(others) * (rows + columns)


# --- Operations, cache and activations, a token ---


def _attentions(s):
    """How often a layer attends: to its own sequence, and to a source."""
    return 2 if s["cross_attention"] else 1


def _flops(stacks, weights, sequence_length):
    products = sum(w.active * w.count for w in weights if w.multiplied)
    attended = 0
    for s in stacks:
        if s["attention"] == "latent":
            _, H, _, _, n, r, v = _latent_sizes(s)
            features = H * (n + r + v)
        else:
            _, H, _, d = _attention_sizes(s)
            features = H * 2 * d
        attended += s["num_layers"] * _attentions(s) * features
    return 2 * (products + sequence_length * attended)


def _cached(s):
    """Numbers that the cache holds for a token, in all layers."""
    if s["attention"] == "latent":
        numbers = s["key_value_rank"] + s["rope_head_dim"]
    else:
        numbers = 2 * s["num_key_value_heads"] * s["head_dim"] * _attentions(s)
    return s["num_layers"] * numbers


def _scores(stacks, sequence_length):
    """Numbers that a token's scores of attention keep for the gradient."""
    blocks = []
    for s in stacks:
        numbers = 3 * s["num_query_heads"] * sequence_length * _attentions(s)
        blocks += [numbers] * s["num_layers"]
    return max(blocks) if stacks[0]["recompute"] else sum(blocks)


def _activations(stacks, size):
    """Bytes that a token keeps for the gradient beside the scores.

    `size` is that of an activation.
    """
    D, V = stacks[0]["hidden_dim"], stacks[0]["vocabulary_size"]
    blocks = []
    for s in stacks:
        sublayer = (3 if s["output_norms"] else 2) * D  # its middle, and its norms
        shared = _attentions(s) * (sublayer + _attention_activations(s))
        dense = mixture = 0
        if _dense_blocks(s):
            dense = sublayer + _hidden(s["dense_dim"], architecture.dense_gated(s))
            dense *= size
        if _mixtures(s):
            mixture = sublayer * size + _mixture_activations(s, size)
            if s["extra_dense"]:
                mixture += dense
        blocks += [shared * size + dense] * _dense_layers(s)
        blocks += [shared * size + mixture] * _mixtures(s)
    ends = (2 * D * len(stacks) + V) * size + V * _FLOAT32
    if s["recompute"]:
        return ends + len(blocks) * D * size + max(blocks)
    return ends + sum(blocks)


def _attention_activations(s):
    if s["attention"] == "latent":
        _, H, Q, R, n, r, v = _latent_sizes(s)
        return 2 * Q + 2 * R + r + H * (2 * n + r) + 2 * H * v
    _, H, G, d = _attention_sizes(s)
    kept = (2 * H + 2 * G) * d
    return kept if s["query_key_norm"] is None else kept + (H + G) * d


def _mixture_activations(s, size):
    D, E, K = s["hidden_dim"], s["num_experts"], s["top_k"]
    kept = K * (2 * D + _hidden(s["expert_dim"], s["expert_gated"]))
    kept += _hidden(architecture.shared_dim(s), s["expert_gated"])
    return kept * size + (D + 2 * E + K * D) * _FLOAT32


def _copied(stacks, weights):
    """The elements of the matrices that are copied to the dtype of the activations."""
    sizes = {"embeddings": 0, "attention": 0, "dense": 0, "experts": 0}
    for w in weights:
        if w.multiplied and not w.float32:
            part = "experts" if w.part == "shared experts" else w.part
            sizes[part] += w.size * w.count
    if not stacks[0]["recompute"]:
        return sum(sizes.values())

    def mean(part, count):
        return sizes[part] // max(sum(map(count, stacks)), 1)

    dense, mixture = mean("dense", _dense_blocks), mean("experts", _mixtures)
    block = max(dense, mixture + (dense if stacks[0]["extra_dense"] else 0))
    return sizes["embeddings"] + mean("attention", lambda s: s["num_layers"]) + block


def _hidden(width, gated):
    """Gate, up, activated gate and their product; or up and activated."""
    return (4 if gated else 2) * width
