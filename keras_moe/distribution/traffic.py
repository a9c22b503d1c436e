"""What a training step sends between the devices of a mesh, from settings alone.

n  devices of a collective      P  bytes of the whole tensor it works on
T  tokens of a device           K  choices a token      N = T K rows of a device
D  features                     E  experts              e  devices of the expert axis
R  rows that a device sends each other one in a round (see `buffers`)
V  vocabulary                   m  devices of the model axis

What a device sends, with links used as well as they can be ([Patarasuk and Yuan,
2009](https://doi.org/10.1016/j.jpdc.2008.09.002); [Chan et al.,
2007](https://doi.org/10.1002/cpe.1206)):

- all-gather, P the result: of it a device holds `P / n`, which in a ring it passes on
  `n - 1` times: `P (n - 1) / n`. No less will do, as each of the others' parts must
  arrive and what arrives was sent.
- reduce-scatter, P the operand: the same ring the other way: `P (n - 1) / n`.
- all-reduce, P the operand: a reduce-scatter and an all-gather: `2 P (n - 1) / n`.
- all-to-all, P the operand: a device keeps its own `1 / n`: `P (n - 1) / n`.
"""

import math
from typing import NamedTuple

import keras
import numpy as np

from keras_moe import architecture, checks
from keras_moe.dispatch import expert_capacity
from keras_moe.distribution.buffers import rows_a_round
from keras_moe.distribution.layouts import Layout, as_tuple, axis_sizes, layout_map

PLATFORMS = ("gpu", "tpu", "cpu")
AXES = ("batch", "expert", "model")
FLOAT32 = _INT32 = 4  # bytes

_PARTS_SENT = {"all_to_all": 1, "all_gather": 1, "reduce_scatter": 1, "all_reduce": 2}
KINDS = tuple(_PARTS_SENT)


class Transfer(NamedTuple):
    """What one kind of collective sends for one purpose in a training step.

    Attributes:
        kind: str, one of `KINDS`.
        purpose: str: `"weights"` (gathered from where they are stored), `"gradients"`,
            `"rows"` (to experts and back), `"expert counts"`, `"statistics"` (of
            routing), `"activations"` (sums over the model axis), `"embeddings"` or
            `"loss"`.
        axes: tuple of str, the axes of the mesh over which it runs.
        devices: int, n.
        sent_bytes: int, what a device sends.
    """

    kind: str
    purpose: str
    axes: tuple
    devices: int
    sent_bytes: int

    def bytes_between_nodes(self, devices_in_node):
        """Those that must leave the node, a device's share.

        All-to-all: of the n devices `n - f` are elsewhere. The others: a node of f
        devices together sends what a ring of `n / f` nodes sends, each device `1 / f`
        of it.

        Args:
            devices_in_node: int, f, those of the n that share a node.
        """
        share = (self.devices - devices_in_node) / (self.devices - 1)
        return (
            self.sent_bytes
            * share
            / (1 if self.kind == "all_to_all" else devices_in_node)
        )


class Spread:
    """A model over a mesh.

    Args:
        mesh: a `keras.distribution.DeviceMesh`, an `ExpertParallel`, or a dict of the
            sizes of the axes `"batch"`, `"expert"` and `"model"`, of devices that need
            not be there.

    Attributes:
        sizes: dict of the axes' names to their sizes, innermost last.
        batch_axes: tuple of str, over which the batch lies.

    Raises:
        ValueError: for anything else, and for axes of other names or sizes.
    """

    def __init__(self, mesh):
        self._distribution = None
        batch_axes = None
        if isinstance(mesh, dict):
            mesh = _of_no_devices(mesh)
        elif isinstance(mesh, keras.distribution.ModelParallel):
            self._distribution = mesh
            batch_axes = getattr(mesh, "batch_axes", (mesh.batch_dim_name,))
            mesh = mesh.device_mesh
        elif not isinstance(mesh, keras.distribution.DeviceMesh):
            raise ValueError(
                "`mesh` must be a `keras.distribution.DeviceMesh`, a "
                "`keras_moe.distribution.ExpertParallel`, or a dict of the sizes of "
                f"axes. Received: mesh={mesh!r}"
            )
        self.mesh = mesh
        self.sizes = axis_sizes(mesh)
        for name in self.sizes:
            checks.one_of("an axis of mesh", name, AXES)
        if batch_axes is None:
            batch_axes = (axis for axis in self.sizes if axis != "model")
        self.batch_axes = tuple(batch_axes)
        if not self.batch_axes:
            raise ValueError(
                "`mesh` must have an axis for the batch, 'batch' or 'expert'. "
                f"Received: the axes {tuple(self.sizes)}"
            )
        self._map = layout_map(mesh) if self._distribution is None else None

    def count(self, axes):
        """The devices of several axes together."""
        return math.prod(self.sizes[axis] for axis in axes)

    def ordered(self, axes):
        """Axes in the mesh's order, those of one device left out."""
        return tuple(a for a, n in self.sizes.items() if n > 1 and a in axes)

    def axes_of(self, weight):
        """The axes over which each dimension of a weight lies, a list of tuples.

        Raises:
            ValueError: where they do not divide it.
        """
        if self._distribution is None:
            layout = self._map[weight.path]
        else:
            layout = self._distribution.get_variable_layout(weight)
        if layout is None:
            return [()] * len(weight.shape)
        layout = Layout(layout.axes, self.mesh, getattr(layout, "optional", ()))
        return [*map(as_tuple, layout.fitted(weight.shape, weight.path).axes)]

    def check_batch(self, batch_size):
        """Refuses a batch that its axes do not divide, as the distribution does."""
        count = self.count(self.batch_axes)
        if batch_size % count:
            raise ValueError(
                f"The mesh's axes {self.batch_axes} of {count} devices must divide "
                f"`batch_size`. Received: batch_size={batch_size}"
            )


def devices_in_node(sizes, axes, node_devices):
    """How many of the devices of a collective share a node.

    Args:
        sizes: dict of the mesh's axes to their sizes.
        axes: those over which the collective runs.
        node_devices: int: a node holds so many that follow each other in the mesh.
    """
    found, left = 1, node_devices
    for axis, size in reversed(sizes.items()):
        inside = math.gcd(size, left)
        found *= inside if axis in axes else 1
        left //= inside
        if inside < size:
            break
    return found


def _of_no_devices(sizes):
    for name, size in sizes.items():
        checks.at_least(f"mesh[{name!r}]", size, 1)
    if not sizes:
        raise ValueError("`mesh` must have an axis. Received: mesh={}")
    devices = np.arange(math.prod(sizes.values()))
    return keras.distribution.DeviceMesh(tuple(sizes.values()), [*sizes], devices)


class Shard(NamedTuple):
    """How a weight lies on a device.

    Attributes:
        weight: what has its `part`, `path`, `shape`, `size`, `count`, `multiplied`,
            `float32` and `trainable`.
        stored: int, the elements that a device keeps.
        gathered: int, the elements that it computes with.
        storage_axes: tuple of str, over which it is stored and gathered.
    """

    weight: NamedTuple
    stored: int
    gathered: int
    storage_axes: tuple


def shards(spread, weights):
    """The `Shard` of each of the weights."""
    found = []
    for weight in weights:
        axes = spread.axes_of(weight)
        everywhere = [axis for entry in axes for axis in entry]
        # Tokens lie over these, too, so what lies there is gathered to compute with
        # it; but for experts, to which the tokens travel.
        of_experts = axes[0] if weight.part == "experts" else ()
        storage = spread.ordered(
            {a for a in everywhere if a in spread.batch_axes and a not in of_experts}
        )
        stored = weight.size // spread.count(everywhere)
        found.append(Shard(weight, stored, stored * spread.count(storage), storage))
    return found


# --- Rows of mixtures ---


class Exchange(NamedTuple):
    """How the rows of a mixture travel.

    Attributes:
        rows: int, those that a device sends and receives at an even load, itself
            included.
        buffer: int, the places in the buffer for them, `e R`.
        once: bool, one round suffices, and its rows are kept for the gradient.
    """

    rows: int
    buffer: int
    once: bool


def exchange(spread, s, tokens, sequence_length, platform):
    """The `Exchange` of a mixture of a stack, None without an expert axis.

    Args:
        spread: `Spread`.
        s: the settings of the stack.
        tokens: int, those of all devices.
        sequence_length: int.
        platform: one of `PLATFORMS`.
    """
    size = spread.sizes.get("expert", 1)
    if size == 1:
        return None
    group, experts, chosen = s["capacity_group"], s["num_experts"], s["top_k"]
    together = 1
    if s["dispatch"] == "capacity" and group != "batch":
        together = sequence_length if group == "sequence" else group
    shards = spread.count(spread.batch_axes)
    # Padded, so that a device holds whole groups.
    tokens = -(-tokens // (shards * together)) * together
    num_rows, bound = tokens * chosen, None
    if s["dispatch"] == "capacity":
        group_size = tokens if group == "batch" else together
        capacity = s["capacity"] or expert_capacity(
            s["capacity_factor"], group_size, experts, chosen
        )
        bound = -(-tokens // group_size) * capacity * (experts // size)
    rows, once = rows_a_round(num_rows, size, bound)
    buffer = size * rows
    # XLA has no ragged all-to-all on the CPU, where whole buffers travel.
    sent = buffer if platform == "cpu" else min(buffer, num_rows)
    return Exchange(sent, buffer, once)


# --- Collectives ---


def transfers(spread, stacks, shards, tokens, sequence_length, value_size, platform):
    """The `Transfer`s of a training step.

    Args:
        spread: `Spread`.
        stacks: the settings of each stack.
        shards: list of `Shard`.
        tokens: int, those of all devices, of each stack.
        sequence_length: int.
        value_size: int, the bytes of an activation.
        platform: one of `PLATFORMS`.

    Returns:
        A tuple, one for each kind, purpose and axes.
    """
    log = _Log(spread)
    step = _Step(spread, stacks, tokens, sequence_length, value_size, platform)
    for shard in shards:
        _add_weight(log, step, shard)
    _add_embeddings(log, step, shards)
    for s in stacks:
        _add_mixtures(log, step, s)
    if step.model_axes:
        _add_sums(log, step)
    return log.transfers()


class _Log:
    """Bytes by kind, purpose and axes."""

    def __init__(self, spread):
        self._spread = spread
        self._bytes = {}

    def add(self, kind, purpose, axes, payload):
        """Notes a collective over axes on a tensor of so many bytes, P."""
        axes = self._spread.ordered(axes)
        if axes and payload:
            key = kind, purpose, axes
            self._bytes[key] = self._bytes.get(key, 0) + payload

    def transfers(self):
        result = []
        for (kind, purpose, axes), payload in self._bytes.items():
            n = self._spread.count(axes)
            sent = round(_PARTS_SENT[kind] * payload * (n - 1) / n)
            result.append(Transfer(kind, purpose, axes, n, sent))
        return tuple(sorted(result))


class _Step:
    """What the transfers of a step depend on."""

    def __init__(self, spread, stacks, tokens, sequence_length, value_size, platform):
        self.spread = spread
        self.stacks = stacks
        self.all_tokens = tokens
        self.tokens = tokens // spread.count(spread.batch_axes)
        self.sequence_length = sequence_length
        self.value_size = value_size
        self.platform = platform
        self.recompute = stacks[0]["recompute"]
        self.hidden_size = self.tokens * stacks[0]["hidden_dim"] * self.value_size
        self.model_axes = spread.ordered(("model",))

    @property
    def on_cpu(self):
        """Whether XLA leaves collectives as its partitioner wrote them."""
        return self.platform == "cpu"


def _add_weight(log, step, shard):
    """Weights are gathered where they are stored apart; gradients are summed."""
    weight, axes = shard.weight, set(step.spread.batch_axes)
    of_block = weight.part != "embeddings"
    lookup_alone = weight.part == "embeddings" and not weight.multiplied
    size = FLOAT32 if weight.float32 else step.value_size  # cast before they travel
    if lookup_alone:
        return
    gathered = shard.gathered * weight.count * size
    times = 2 if (step.recompute if of_block else _gathers_twice(step)) else 1
    log.add("all_gather", "weights", shard.storage_axes, times * gathered)
    if not weight.trainable:
        return
    if weight.part == "experts":
        axes -= set(step.spread.axes_of(weight)[0])
    if weight.part == "routers":  # of every device its own, the model axis included
        axes = set(step.spread.sizes)
    _add_gradient(log, step, shard, axes, gathered)


def _gathers_twice(step):
    """Whether the table of the logits travels for the backward pass once more.

    So the partitioner has it where a device's part of the vocabulary is larger than the
    number of its tokens: it then writes the two gathers differently, and none is saved.
    """
    m = step.spread.sizes.get("model", 1)
    vocabulary = step.stacks[0]["vocabulary_size"]
    return m > 1 and vocabulary // m > step.tokens


def _add_gradient(log, step, shard, axes, gathered):
    """A sum over axes, of which a device keeps what it stores."""
    if step.on_cpu or not shard.storage_axes:
        log.add("all_reduce", "gradients", axes, gathered)
        return
    log.add("reduce_scatter", "gradients", shard.storage_axes, gathered)
    kept = gathered * shard.stored // shard.gathered
    log.add("all_reduce", "gradients", axes - set(shard.storage_axes), kept)


def _add_embeddings(log, step, shards):
    """What a lookup sends: the table, or ids and what was found, whatever is less.

    A table of fewer rows than a device has tokens is gathered. Of a larger one ids
    travel, and each device looks up the tokens of all, in its features and its part of
    the vocabulary. The parts of the vocabulary are summed; features go back to their
    tokens by all-to-all, and their gradients the other way.
    """
    tables = [s for s in shards if s.weight.path.endswith("embedding/embeddings")]
    for index in range(len(step.stacks)):
        table = tables[min(index, len(tables) - 1)]
        axes = table.storage_axes
        vocabulary, _ = step.spread.axes_of(table.weight)
        table_size = table.gathered * step.value_size
        if table.weight.shape[0] < step.tokens and not step.spread.ordered(vocabulary):
            log.add("all_gather", "embeddings", axes, table_size)
            _add_gradient(log, step, table, set(step.spread.batch_axes), table_size)
            continue
        together = step.tokens * step.spread.count(axes)
        log.add("all_gather", "embeddings", axes, together * _INT32)
        log.add("all_to_all", "embeddings", axes, 2 * step.hidden_size)
        log.add("all_reduce", "embeddings", vocabulary, step.hidden_size)
        # Gradients for more tokens than there are rows are added up by each device of
        # the model axis for a part of the tokens; for fewer, for its rows.
        if axes and table.weight.shape[0] < together:
            rows = table.stored * step.spread.count(vocabulary) * step.value_size
            log.add("all_reduce", "gradients", vocabulary, rows)
        others = set(step.spread.batch_axes) - set(axes)
        log.add("all_reduce", "gradients", others, table.stored * step.value_size)


def _add_mixtures(log, step, s):
    count = len(architecture.mixture_layers(s))
    if not count:
        return
    D, E = s["hidden_dim"], s["num_experts"]
    numbers = E  # the load
    if s["balance_loss"]:  # probabilities, and their gradients
        numbers += (1 if s["balance_choices"] == "all" else 2) * E + E
    statistics = count * numbers * FLOAT32
    log.add("all_reduce", "statistics", step.spread.batch_axes, statistics)
    way = exchange(step.spread, s, step.all_tokens, step.sequence_length, step.platform)
    if way is None:
        return
    times = 2 if step.recompute else 1
    counts = times * count * step.spread.sizes["expert"] * E * _INT32
    log.add("all_reduce", "expert counts", ("expert",), counts)
    # There and back; on the way back rounds send the rows once more.
    ways = 2 * times + (2 if way.once else 3)
    rows = ways * count * way.rows * D * step.value_size
    log.add("all_to_all", "rows", ("expert",), rows)


def _add_sums(log, step):
    """Sums over the model axis of what its devices made of a part of the features.

    As in Megatron ([Shoeybi et al., 2019](https://arxiv.org/abs/1909.08053), section
    3): forward after the product that comes back to D, backward before those that
    leave it. The partitioner sums the gradients of each product apart; compilers for
    GPUs and TPUs add them first.
    """
    hidden, again = step.hidden_size, step.recompute
    sums = 0
    for s in step.stacks:
        layers, mixtures = s["num_layers"], len(architecture.mixture_layers(s))
        dense = layers - mixtures + (mixtures if s["extra_dense"] else 0)
        if s["attention"] == "latent":
            ranks = s["key_value_rank"] + s["rope_head_dim"]
            ranks += s["query_rank"] or s["hidden_dim"]
            sums += layers * hidden * (1 + again) + layers * (
                hidden // s["hidden_dim"] * ranks
            )
        else:
            sums += layers * hidden * (1 + again + (3 if step.on_cpu else 1))
        if s["cross_attention"]:  # queries, and keys and values of the source
            sums += layers * hidden * (1 + again + (3 if step.on_cpu else 2))
        gated = architecture.dense_gated(s)
        sums += dense * hidden * (1 + (2 if gated and step.on_cpu else 1))
        # The sum of the mixture's outputs has a sum for its gradient.
        sums += mixtures * hidden * 3
        if architecture.shared_dim(s):
            gated = s["expert_gated"]
            sums += mixtures * hidden * (1 + (2 if gated and step.on_cpu else 1))
    divides = step.stacks[0]["vocabulary_size"] % step.spread.sizes["model"] == 0
    sums += hidden if divides else 0  # of the logits' gradient
    log.add("all_reduce", "activations", step.model_axes, sums)
    if not divides:
        return
    # The softmax of the loss: maximum, sum, and two for its gradient.
    log.add("all_reduce", "loss", step.model_axes, 4 * step.tokens * FLOAT32)
