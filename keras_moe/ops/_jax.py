"""The JAX formulations.

N rows, D features in, H features out, E groups, B rows in a block.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

_BLOCK = 64  # rows; measured best of 16..256 for experts of 512 x 1024 on a CPU


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


def _block_size(num_rows):
    return max(1, min(_BLOCK, num_rows))


def _rows_times_groups(x, w, group_sizes, contract):
    """`x[rows of e] @ w[e]`, contracting axis `contract` of `w`."""
    num_rows = x.shape[0]
    features = w.shape[3 - contract]
    block = _block_size(num_rows)
    starts = jnp.cumsum(group_sizes) - group_sizes
    blocks = (group_sizes + block - 1) // block
    block_ends = jnp.cumsum(blocks)
    # A block may reach past its group: the next group's blocks, which come
    # later, overwrite those rows; past the last group they are masked.
    x = jnp.pad(x, ((0, block), (0, 0)))

    def body(i, y):
        e = jnp.searchsorted(block_ends, i, side="right", method="compare_all")
        row = starts[e] + (i - (block_ends[e] - blocks[e])) * block
        rows = lax.dynamic_slice_in_dim(x, row, block)
        matrix = lax.dynamic_index_in_dim(w, e, keepdims=False)
        product = lax.dot_general(
            rows,
            matrix,
            (((1,), (contract - 1,)), ((), ())),
            preferred_element_type=y.dtype,
        )
        return lax.dynamic_update_slice_in_dim(y, product, row, axis=0)

    y = jnp.zeros((num_rows + block, features), x.dtype)
    y = lax.fori_loop(0, block_ends[-1], body, y)[:num_rows]
    valid = jnp.arange(num_rows) < jnp.sum(group_sizes)
    return jnp.where(valid[:, None], y, 0)


def _rows_times_rows(x, dy, group_sizes):
    """`x[rows of e].T @ dy[rows of e]` for every e: the gradient of `w`."""
    (num_rows, d), h = x.shape, dy.shape[1]
    block = _block_size(num_rows)
    starts = jnp.cumsum(group_sizes) - group_sizes
    x = jnp.pad(x, ((0, block), (0, 0)))
    dy = jnp.pad(dy, ((0, block), (0, 0)))

    def add_block(e, i, total):
        row = starts[e] + i * block
        inside = i * block + jnp.arange(block) < group_sizes[e]
        left = jnp.where(inside[:, None], lax.dynamic_slice_in_dim(x, row, block), 0)
        right = lax.dynamic_slice_in_dim(dy, row, block)
        # Rows of the next group may hold infinities: zero both sides.
        right = jnp.where(inside[:, None], right, 0)
        return total + lax.dot_general(
            left,
            right,
            (((0,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )

    def body(e, dw):
        blocks = (group_sizes[e] + block - 1) // block
        total = jnp.zeros((d, h), jnp.float32)
        total = lax.fori_loop(0, blocks, functools.partial(add_block, e), total)
        return lax.dynamic_update_index_in_dim(dw, total.astype(dw.dtype), e, axis=0)

    dw = jnp.zeros((group_sizes.shape[0], d, h), x.dtype)
    return lax.fori_loop(0, group_sizes.shape[0], body, dw)


def top_k(x, k):
    # XLA documents ties to the lower index, but orders -0.0 below 0.0.
    return lax.top_k(jnp.where(x == 0, 0.0, x), k)
