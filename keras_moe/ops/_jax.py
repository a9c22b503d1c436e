"""The JAX formulations.

N  rows     D  features in      H  features out     E  groups
n  rows of a block
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from keras_moe.ops._blocks import block_at, sweeps
from keras_moe.ops._stages import stage_outputs


def choose_formulation(x, weights):
    # XLA on the CPU computes `ragged_dot` densely: every expert for every row.
    return "blocks" if jax.default_backend() == "cpu" else "library"


def _matmul(x, w):
    return lax.dot_general(
        x,
        w.astype(x.dtype),
        (((1,), (0,)), ((), ())),
        preferred_element_type=x.dtype,
    )


# --- Library: XLA's own grouped product, of all rows at once.


def _library(functions, x, weights, group_sizes):
    def matmul(x, w):
        return lax.ragged_dot(x, w.astype(x.dtype), group_sizes)

    valid = (jnp.arange(x.shape[0]) < jnp.sum(group_sizes))[:, None]
    rows = jnp.where(valid, x, 0)
    *_, (y,) = stage_outputs(functions, rows, weights, matmul)
    return jnp.where(valid, y, 0)


# --- Blocks: loops that visit the blocks of rows in use. Their trip counts depend on
# data, so reverse mode needs its rule spelled out.


# Compiled here, too: eagerly, the loops would be compiled anew at every call.
_compiled = functools.partial(jax.jit, inline=True, static_argnums=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocks(functions, x, weights, group_sizes):
    return _forward(functions, x, weights, group_sizes)


def _blocks_forward(functions, x, weights, group_sizes):
    y, between = _forward_keeping(functions, x, weights, group_sizes)
    return y, (x, weights, group_sizes, between)


def _blocks_backward(functions, residuals, dy):
    return *_backward(functions, *residuals, dy), None


_blocks.defvjp(_blocks_forward, _blocks_backward)


@_compiled
def _forward(functions, x, weights, group_sizes):
    return _run(functions, x, weights, group_sizes, slice(-1, None))[0][0]


@_compiled
def _forward_keeping(functions, x, weights, group_sizes):
    """The result, and what came out of each stage but the last."""
    *between, (y,) = _run(functions, x, weights, group_sizes, slice(None))
    return y, between


def _run(functions, x, weights, group_sizes, wanted):
    """The outputs of the `wanted` stages, `[N, ...]`."""

    def outputs(rows, weights):
        return stage_outputs(functions, rows, weights, _matmul)[wanted]

    def step(buffers, e, start, inside, first):
        values = outputs(_slice(x, start, inside), _of_group(weights, e))
        return jax.tree.map(
            lambda buffer, new: _update(buffer, new, start, inside), buffers, values
        )

    shapes = jax.eval_shape(lambda: outputs(x, _of_group(weights, 0)))
    buffers = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return _over_blocks(step, buffers, group_sizes, x.shape[0])


@_compiled
def _backward(functions, x, weights, group_sizes, between, dy):
    """The gradients of `x` and of the weights."""
    inputs = [(x,), *between]

    def step(carry, e, start, inside, first):
        dx, totals = carry
        # Rows of other groups may hold infinities: zero both sides.
        values, gradient = jax.tree.map(
            lambda t: jnp.where(inside[:, None], _slice(t, start, inside), 0),
            (inputs, (dy,)),
        )
        summed = []
        for function, value, stage, total in zip(
            reversed(functions),
            reversed(values),
            reversed(_of_group(weights, e)),
            reversed(totals),
            strict=True,
        ):
            _, pull_back = jax.vjp(functools.partial(function, _matmul), value, stage)
            gradient, of_weights = pull_back(gradient)
            summed.insert(
                0,
                jax.tree.map(
                    lambda t, new: _add_to_group(t, new, e, first), total, of_weights
                ),
            )
        return _update(dx, gradient[0], start, inside), tuple(summed)

    totals = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights)
    dx, totals = _over_blocks(
        step, (jnp.zeros_like(x), totals), group_sizes, x.shape[0]
    )
    return dx, jax.tree.map(lambda t, w: t.astype(w.dtype), totals, weights)


def _slice(rows, start, inside):
    return lax.dynamic_slice_in_dim(rows, start, inside.shape[0])


def _update(rows, new, start, inside):
    """`rows` with those of `new` from `start` on that are inside the block."""
    new = jnp.where(inside[:, None], new, _slice(rows, start, inside))
    return lax.dynamic_update_slice_in_dim(rows, new, start, axis=0)


def _of_group(weights, e):
    return jax.tree.map(
        lambda w: lax.dynamic_index_in_dim(w, e, keepdims=False), weights
    )


def _add_to_group(totals, new, e, first):
    new = new.astype(totals.dtype)
    if not first:
        new += lax.dynamic_index_in_dim(totals, e, keepdims=False)
    return lax.dynamic_update_index_in_dim(totals, new, e, axis=0)


def _over_blocks(step, carry, group_sizes, num_rows):
    """Applies `step(carry, group, start, inside, first)` to all blocks."""
    for sweep in sweeps(group_sizes.astype(jnp.int32), num_rows):

        def body(i, carry, sweep=sweep):
            return step(carry, *block_at(sweep, i, num_rows), sweep.first)

        carry = lax.fori_loop(0, jnp.sum(sweep.counts), body, carry)
    return carry


FORMULATIONS = {"blocks": _blocks, "library": _library}


def top_k(x, k):
    # XLA documents ties to the lower index, but orders -0.0 below 0.0.
    return lax.top_k(jnp.where(x == 0, 0.0, x), k)


def inverse_permutation(permutation):
    places = jnp.arange(permutation.shape[0], dtype=jnp.int32)
    return jnp.zeros_like(places).at[permutation].set(places, unique_indices=True)


def assign_parts(variable, parts):
    """Device by device, each taking its share of a part."""
    sharding, shape = variable.value.sharding, variable.shape
    shards = [(s.index, s.data) for s in variable.value.addressable_shards]
    for index, array in parts:
        shards = [(own, _with_part(old, own, index, array)) for own, old in shards]
    values = [value for _, value in shards]
    variable.assign(jax.make_array_from_single_device_arrays(shape, sharding, values))


def _with_part(value, own, index, array):
    """A device's share of a variable, with its share of a part.

    Args:
        value: the share, given away, so that the result takes its memory.
        own: the slices of the variable that the share is.
        index: int: where along the first axis the part lies; None for a whole one.
        array: the part.
    """
    if index is None:
        return jax.device_put(np.asarray(array[own], order="C"), value.sharding)
    row = index - (own[0].start or 0)
    if not 0 <= row < value.shape[0]:
        return value
    return _set_row(value, row, np.asarray(array[own[1:]], order="C"))


def unwritten_zeros(shape, dtype):
    return jnp.zeros(shape, dtype)


def sum_over_replicas(tensors):
    return tensors  # There are none: a program's sums are over all devices.


@functools.partial(jax.jit, donate_argnums=0)
def _set_row(value, index, array):
    return lax.dynamic_update_index_in_dim(value, array, index, 0)


def forget_traces():
    # `jit` remembers what it traced by the function, and bound methods compare equal:
    # while anyone holds a model's old `train_function`, a new one is served its trace.
    jax.clear_caches()
