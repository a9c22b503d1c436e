"""The JAX formulations.

N rows, D features in, H features out, E groups.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

# Rows of a block, ascending. A group is cut into blocks of the largest size, and
# what remains goes into one block of the smallest size that holds it.
_BLOCKS = (16, 32, 64, 128)


def grouped_matmul(x, w, group_sizes):
    if jax.default_backend() != "cpu":
        y = lax.ragged_dot(x, w, group_sizes)
        valid = jnp.arange(x.shape[0]) < jnp.sum(group_sizes)
        return jnp.where(valid[:, None], y, 0)
    return _blockwise(x, w, group_sizes)


# XLA on the CPU computes `ragged_dot` densely, every expert for every row. The
# loops below visit only the blocks in use. Their trip count depends on data, so
# reverse mode needs its rule spelled out.


@jax.custom_vjp
def _blockwise(x, w, group_sizes):
    return _rows_times_groups(x, w, group_sizes, contract=1)


def _blockwise_forward(x, w, group_sizes):
    return _blockwise(x, w, group_sizes), (x, w, group_sizes)


def _blockwise_backward(residuals, dy):
    x, w, group_sizes = residuals
    dx = _rows_times_groups(dy, w, group_sizes, contract=2)
    dw = _rows_times_rows(x, dy, group_sizes)
    return dx, dw, None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)


# Compiled here, too: eagerly, the loops would be compiled anew at every call.
_compiled = functools.partial(jax.jit, inline=True)


@functools.partial(_compiled, static_argnames="contract")
def _rows_times_groups(x, w, group_sizes, contract):
    """`x[rows of e] @ w[e]`, contracting axis `contract` of `w`."""
    num_rows, features = x.shape[0], w.shape[3 - contract]
    x = _pad(x)

    def write_product(y, e, row, inside):
        rows = lax.dynamic_slice_in_dim(x, row, inside.shape[0])
        matrix = lax.dynamic_index_in_dim(w, e, keepdims=False)
        product = lax.dot_general(
            rows,
            matrix,
            (((1,), (contract - 1,)), ((), ())),
            preferred_element_type=y.dtype,
        )
        # Rows past the group belong to others.
        kept = lax.dynamic_slice_in_dim(y, row, inside.shape[0])
        product = jnp.where(inside[:, None], product, kept)
        return lax.dynamic_update_slice_in_dim(y, product, row, axis=0)

    y = _pad(jnp.zeros((num_rows, features), x.dtype))
    return _over_blocks(write_product, y, group_sizes, num_rows)[:num_rows]


@_compiled
def _rows_times_rows(x, dy, group_sizes):
    """`x[rows of e].T @ dy[rows of e]` for every e: the gradient of `w`."""
    (num_rows, d), h = x.shape, dy.shape[1]
    x, dy = _pad(x), _pad(dy)

    def add_product(dw, e, row, inside):
        left, right = (
            # Rows of other groups may hold infinities: zero both sides.
            jnp.where(
                inside[:, None], lax.dynamic_slice_in_dim(t, row, inside.shape[0]), 0
            )
            for t in (x, dy)
        )
        product = lax.dot_general(
            left,
            right,
            (((0,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        total = lax.dynamic_index_in_dim(dw, e, keepdims=False) + product
        return lax.dynamic_update_index_in_dim(dw, total, e, axis=0)

    dw = jnp.zeros((group_sizes.shape[0], d, h), jnp.float32)
    return _over_blocks(add_product, dw, group_sizes, num_rows).astype(x.dtype)


def _pad(rows):
    """Room for the last block to reach past the last row."""
    return jnp.pad(rows, ((0, _BLOCKS[-1]), (0, 0)))


def _over_blocks(step, carry, group_sizes, num_rows):
    """Applies `step(carry, group, first row, rows inside the group)` to all blocks.

    Blocks of one size are a loop, whose trip count is the number of them in use.
    """
    ends = jnp.cumsum(group_sizes)
    starts = ends - group_sizes
    largest = _BLOCKS[-1]
    whole = group_sizes // largest
    rest = group_sizes - whole * largest

    def sweep(carry, size, counts, first_rows):
        last = jnp.cumsum(counts)

        def body(i, carry):
            e = jnp.searchsorted(last, i, side="right", method="compare_all")
            row = first_rows[e] + (i - (last[e] - counts[e])) * size
            inside = row + jnp.arange(size) < ends[e]
            return step(carry, e, row, inside)

        return lax.fori_loop(0, last[-1], body, carry)

    smaller = 0
    for size in _BLOCKS:
        if smaller < num_rows:  # no block of this size otherwise
            counts = ((rest > smaller) & (rest <= size)).astype(group_sizes.dtype)
            carry = sweep(carry, size, counts, starts + whole * largest)
        smaller = size
    if largest <= num_rows:
        carry = sweep(carry, largest, whole, starts)
    return carry


def top_k(x, k):
    # XLA documents ties to the lower index, but orders -0.0 below 0.0.
    return lax.top_k(jnp.where(x == 0, 0.0, x), k)
