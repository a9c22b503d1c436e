"""Mixtures over the devices of a mesh, on JAX.

n  devices of the expert axis           T  tokens of a device
N  = T K rows of a device, sorted by expert
E  experts                              e  = E / n, experts of a device
R  rows that a device sends each other one in a round
D  features                             H  hidden features of an expert

Tokens lie over all axes but that of the experts' hidden features. Each device routes
its own, and its rows travel along the expert axis to the devices that hold their
experts, and back, by all-to-all (GShard, [Lepikhin et al.,
2020](https://arxiv.org/abs/2006.16668), section 3.3): two on the way forward, two on
the way back, where tokens and the gradients of outputs travel together.

A buffer has one shape whatever the router says, so rows travel in rounds of R for
each pair of devices: as many rounds as the fullest pair needs, and no row is lost.
With a capacity R is its bound, and one round always suffices.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras
from jax import lax
from jax.sharding import PartitionSpec

from keras_moe.distribution.buffers import rows_a_round
from keras_moe.models._keras_hub import as_stored, scope_of


def spread(layout, layer, tokens, mask, how):
    """The routed part of a mixture, over the devices of a mesh.

    Args:
        layout: a `MixtureLayout`.
        layer: the `MixtureOfExperts`.
        tokens: float tensor `[tokens of all devices, D]`.
        mask: bool tensor of their number, or None.
        how: a `Pass`, of all devices.

    Returns:
        The outputs, and the statistics summed over all devices, or None.
    """
    count = tokens.shape[0]
    unit = _tokens_kept_together(layer, how, count)
    tokens, mask = _padded(tokens, mask, layout.num_token_shards * unit)
    weights, seeds, seed_axes = _router_and_seeds(layer, layout)
    kernels = tuple(k.value for k in layer.experts.kernels)

    def local(tokens, mask, weight_values, seed_values, kernels):
        own_seeds = [
            value + _of_device(axes)
            for value, axes in zip(seed_values, seed_axes, strict=True)
        ]
        known = zip([*weights, *seeds], [*weight_values, *own_seeds], strict=True)
        with scope_of(known) as scope:
            here = how._replace(shape=(tokens.shape[0] // unit, unit, tokens.shape[1]))
            compute = _computer(layout, layer, here, kernels)
            outputs, statistics = layer.route_and_compute(compute, tokens, mask, here)
        if layout.hidden_axis:
            outputs = lax.psum(outputs, layout.hidden_axis)
        # As far as one device's seed moved, so do all.
        moved = [
            value + (scope.get_current_value(seed) - own)
            for seed, value, own in zip(seeds, seed_values, own_seeds, strict=True)
        ]
        return outputs, lax.psum(statistics, layout.token_axes), moved

    rows = PartitionSpec(layout.token_axes)
    inner = PartitionSpec(layout.expert_axis, None, layout.hidden_axis)
    last = PartitionSpec(layout.expert_axis, layout.hidden_axis, None)
    of_kernels = (*[inner] * (len(kernels) - 1), last)
    outputs, statistics, moved = jax.shard_map(
        local,
        mesh=layout.mesh.backend_mesh,
        in_specs=(rows, rows, PartitionSpec(), PartitionSpec(), of_kernels),
        out_specs=(rows, PartitionSpec(), PartitionSpec()),
        # What is checked there gives wrong gradients of permuted replicated values.
        check_vma=False,
    )(tokens, mask, as_stored(weights), [s.value for s in seeds], kernels)
    for seed, value in zip(seeds, moved, strict=True):
        seed.assign(value)
    return outputs[:count], statistics


def _tokens_kept_together(layer, how, count):
    """Consecutive tokens that one device must hold, a capacity group's."""
    if layer.dispatch == "capacity":
        group_size, _ = layer.group_and_capacity(how)
        if how.per_sequence or layer.capacity_group != "batch":
            return max(min(group_size, count), 1)
    return 1


def _padded(tokens, mask, multiple):
    if mask is None:
        mask = jnp.ones(tokens.shape[:1], "bool")
    missing = -tokens.shape[0] % multiple
    if not missing:
        return tokens, mask
    return jnp.pad(tokens, ((0, missing), (0, 0))), jnp.pad(mask, (0, missing))


def _router_and_seeds(layer, layout):
    """The router's weights, random seeds, and the axes over which each seed differs.

    A router draws for the tokens of a device, experts for its part of their features.
    """
    kernels = {id(kernel) for kernel in layer.experts.kernels}
    hidden = (layout.hidden_axis,) if layout.hidden_axis else ()
    weights, seeds, seed_axes = [], [], []
    for part, axes in ((layer.router, ()), (layer.experts, hidden)):
        for variable in part.variables:
            if variable.dtype == "uint32":
                seeds.append(variable)
                seed_axes.append((*layout.token_axes, *axes))
            elif id(variable) not in kernels:
                weights.append(variable)
    return weights, seeds, seed_axes


def _of_device(axes):
    """What is added to a seed, so that each device draws its own numbers."""
    index = lax.axis_index(axes).astype("uint32") if axes else jnp.uint32(0)
    return jnp.stack([index, jnp.zeros_like(index)])


def _computer(layout, layer, how, kernels):
    """`(rows, group_sizes) -> rows` for `route_and_compute`."""
    experts = functools.partial(_apply, layer.experts, how.training)

    def compute(rows, group_sizes):
        state = [s.value for s in layer.experts.variables if s.dtype == "uint32"]
        if layer.expert_dropout and how.training:
            layer.experts.hidden_dropout.seed_generator.next()
        if layout.expert_axis is None:
            return experts(rows, group_sizes, kernels, state)
        bound = None
        if layer.dispatch == "capacity":
            bound = _sent_at_most(layer, layout, how)
        size = layout.num_expert_shards
        exchange = _Exchange(
            layout.expert_axis,
            size,
            *rows_a_round(rows.shape[0], size, bound),
            ragged=_has_ragged(layout.mesh),
        )
        counts = _counts_of_all(exchange, group_sizes)
        run = _one_round if exchange.once else _all_rounds
        return run(experts, exchange, rows, kernels, counts, state)

    return compute


def _has_ragged(mesh):
    """Whether XLA has a ragged all-to-all for a mesh's devices."""
    return mesh.backend_mesh.devices.flat[0].platform != "cpu"


def _apply(layer, training, rows, group_sizes, kernels, state):
    seeds = [v for v in layer.variables if v.dtype == "uint32"]
    with keras.StatelessScope(state_mapping=[*zip(seeds, state, strict=True)]):
        return layer.apply(rows, group_sizes, kernels, training)


def _sent_at_most(layer, layout, how):
    group_size, capacity = layer.group_and_capacity(how)
    groups = -(-how.shape[0] * how.shape[1] // group_size)
    return groups * capacity * (layer.num_experts // layout.num_expert_shards)


class _Exchange(NamedTuple):
    """What is fixed of an exchange of rows.

    Attributes:
        axis: str, the mesh's expert axis.
        size: int, n.
        rows: int, R.
        once: bool, whether one round suffices for any routing.
        ragged: bool, whether what is sent is only the rows there are.
    """

    axis: str
    size: int
    rows: int
    once: bool
    ragged: bool


def _counts_of_all(exchange, group_sizes):
    """int32 `[n, n, e]`: the rows from each device for each device's experts."""
    counts = jnp.zeros((exchange.size, group_sizes.shape[0]), "int32")
    counts = counts.at[lax.axis_index(exchange.axis)].set(group_sizes)
    counts = lax.psum(counts, exchange.axis)
    return counts.reshape(exchange.size, exchange.size, -1)


class _Round(NamedTuple):
    """Where the rows of a round lie.

    Attributes:
        sent: int32 `[n R]`: the row of each place that is sent, N for none.
        order: int32 `[n R]`: the places that are received, sorted by expert.
        group_sizes: int32 `[e]`: the rows received for each expert.
        sent_sizes: int32 `[n]`: the rows sent to each device.
        received_sizes: int32 `[n]`.
    """

    sent: Any
    order: Any
    group_sizes: Any
    sent_sizes: Any
    received_sizes: Any


def _round(exchange, counts, index, num_rows):
    """The `_Round` of an index, from 0."""
    me = lax.axis_index(exchange.axis)
    first = index * exchange.rows
    place = first + jnp.arange(exchange.rows, dtype="int32")

    out = counts[me].sum(axis=-1)
    start = jnp.cumsum(out) - out
    sent = jnp.where(place < out[:, None], start[:, None] + place, num_rows)

    # Rows from one device come sorted by expert.
    ends = jnp.cumsum(counts[:, me], axis=-1)
    search = functools.partial(jnp.searchsorted, side="right")
    expert = jax.vmap(search, in_axes=(0, None))(ends, place)
    reached = jnp.clip(ends - first, 0, exchange.rows)
    sizes = jnp.diff(reached, axis=-1, prepend=0)
    return _Round(
        sent=sent.reshape(-1),
        order=jnp.argsort(expert.reshape(-1)),
        group_sizes=sizes.sum(axis=0),
        sent_sizes=jnp.clip(out - first, 0, exchange.rows),
        received_sizes=reached[:, -1],
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ship(exchange, rows, sent_sizes, received_sizes):
    """All-to-all: `[n R, D]` by receiver becomes `[n R, D]` by sender."""
    if not exchange.ragged:
        return lax.all_to_all(rows, exchange.axis, 0, 0, tiled=True)
    places = jnp.arange(exchange.size, dtype="int32") * exchange.rows
    here = jnp.full_like(places, lax.axis_index(exchange.axis) * exchange.rows)
    return lax.ragged_all_to_all(
        rows,
        jnp.zeros_like(rows),
        places,
        sent_sizes,
        here,
        received_sizes,
        axis_name=exchange.axis,
    )


def _ship_forward(exchange, rows, sent_sizes, received_sizes):
    shipped = _ship(exchange, rows, sent_sizes, received_sizes)
    return shipped, (sent_sizes, received_sizes)


def _ship_backward(exchange, sizes, gradient):
    # The way back. JAX's own rule for a ragged one has the devices exchange offsets.
    sent_sizes, received_sizes = sizes
    return _ship(exchange, gradient, received_sizes, sent_sizes), None, None


_ship.defvjp(_ship_forward, _ship_backward)


def _send(exchange, at, rows):
    """Rows `[N, D]`, those of a round, at the devices of their experts."""
    buffer = rows.at[at.sent].get(mode="fill", fill_value=0)
    return _ship(exchange, buffer, at.sent_sizes, at.received_sizes)


def _send_back(exchange, at, buffer, rows):
    """`rows` with those of a round that come back."""
    buffer = _ship(exchange, buffer, at.received_sizes, at.sent_sizes)
    return rows.at[at.sent].set(buffer, mode="drop")


def _received(experts, at, buffer, kernels, state):
    """What this device's experts make of the rows it received."""
    rows = experts(buffer[at.order], at.group_sizes, kernels, state)
    return jnp.zeros_like(rows).at[at.order].set(rows, unique_indices=True)


def _one_round(experts, exchange, rows, kernels, counts, state):
    at = _round(exchange, counts, 0, rows.shape[0])
    buffer = _received(experts, at, _send(exchange, at, rows), kernels, state)
    return _send_back(exchange, at, buffer, jnp.zeros_like(rows))


# --- Rounds as many as needed: reverse mode needs its rule spelled out. It computes
# the experts anew, as a round's rows are kept nowhere.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _all_rounds(experts, exchange, rows, kernels, counts, state):
    def step(index, result):
        at = _round(exchange, counts, index, rows.shape[0])
        seeds = _of_round(state, index)
        buffer = _received(experts, at, _send(exchange, at, rows), kernels, seeds)
        return _send_back(exchange, at, buffer, result)

    return lax.fori_loop(0, _rounds(exchange, counts), step, jnp.zeros_like(rows))


def _forward(experts, exchange, rows, kernels, counts, state):
    result = _all_rounds(experts, exchange, rows, kernels, counts, state)
    return result, (rows, kernels, counts, state)


def _backward(experts, exchange, residuals, gradient):
    rows, kernels, counts, state = residuals
    both = jnp.concatenate([rows, gradient], axis=1)

    def step(index, carry):
        of_rows, of_kernels = carry
        at = _round(exchange, counts, index, rows.shape[0])
        seeds = _of_round(state, index)
        buffer, of_buffer = jnp.split(_send(exchange, at, both), 2, axis=1)
        _, pull_back = jax.vjp(
            lambda b, k: _received(experts, at, b, k, seeds), buffer, kernels
        )
        of_buffer, new = pull_back(of_buffer)
        of_rows = _send_back(exchange, at, of_buffer, of_rows)
        return of_rows, jax.tree.map(jnp.add, of_kernels, new)

    zeros = jax.tree.map(jnp.zeros_like, (rows, kernels))
    of_rows, of_kernels = lax.fori_loop(0, _rounds(exchange, counts), step, zeros)
    return of_rows, of_kernels, None, None


_all_rounds.defvjp(_forward, _backward)


def _rounds(exchange, counts):
    return jnp.max(-(-counts.sum(axis=-1) // exchange.rows))


def _of_round(state, index):
    # Not in a seed's second word, which counts steps; above what devices add.
    return [s + jnp.stack([index << 16, 0]).astype(s.dtype) for s in state]
