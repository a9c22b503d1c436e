"""The TensorFlow formulations.

N rows, D features in, H features out, E groups, B rows in a block.
"""

import tensorflow as tf

_BLOCK = 64  # rows, as in the JAX formulation


def grouped_matmul(x, w, group_sizes):
    @tf.custom_gradient
    def product(x, w):
        def gradient(dy):
            return (
                _rows_times_groups(dy, w, group_sizes, transpose=True),
                _rows_times_rows(x, dy, group_sizes),
            )

        return _rows_times_groups(x, w, group_sizes, transpose=False), gradient

    return product(x, w)


# `tf.split` by sizes and a matmul a group is the fastest without XLA, but XLA,
# which Keras turns on by default, wants static shapes; so does a graph that may
# or may not be compiled later. Those take a loop over blocks of fixed size,
# which stops after the blocks in use.


def _rows_times_groups(x, w, group_sizes, transpose):
    if tf.executing_eagerly():
        return _split_rows_times_groups(x, w, group_sizes, transpose)
    return _blockwise_rows_times_groups(x, w, group_sizes, transpose)


def _split_rows_times_groups(x, w, group_sizes, transpose):
    parts, start = [], 0
    for e, size in enumerate(group_sizes.numpy().tolist()):
        if size:
            parts.append(
                tf.matmul(x[start : start + size], w[e], transpose_b=transpose)
            )
            start += size
    features = w.shape[1] if transpose else w.shape[2]
    parts.append(tf.zeros((x.shape[0] - start, features), x.dtype))
    return tf.concat(parts, 0)


def _blockwise_rows_times_groups(x, w, group_sizes, transpose):
    num_rows, num_groups = tf.shape(x)[0], w.shape[0]
    features = w.shape[1] if transpose else w.shape[2]
    ends = tf.cumsum(group_sizes)
    starts = ends - group_sizes
    blocks = (group_sizes + _BLOCK - 1) // _BLOCK
    block_ends = tf.cumsum(blocks)
    first_block = block_ends - blocks
    x = tf.pad(x, ((0, _BLOCK), (0, 0)))  # a group's last block may reach past it

    def body(i, products):
        e = tf.reduce_sum(tf.cast(block_ends <= i, tf.int32))
        row = starts[e] + (i - first_block[e]) * _BLOCK
        rows = tf.slice(x, tf.stack([row, 0]), (_BLOCK, x.shape[1]))
        product = tf.matmul(rows, tf.gather(w, e), transpose_b=transpose)
        return i + 1, products.write(i, product)

    products = tf.TensorArray(
        x.dtype,
        size=num_rows // _BLOCK + num_groups + 1,
        element_shape=(_BLOCK, features),
        clear_after_read=False,
    )
    _, products = tf.while_loop(
        lambda i, _: i < block_ends[-1], body, (tf.constant(0), products)
    )
    # Where each row's product lies among the blocks.
    row = tf.range(num_rows)
    group = tf.searchsorted(ends, row, side="right", out_type=tf.int32)
    valid = group < num_groups
    group = tf.minimum(group, num_groups - 1)
    place = tf.gather(first_block, group) * _BLOCK + row - tf.gather(starts, group)
    y = tf.reshape(products.stack(), (-1, features))
    y = tf.gather(y, tf.where(valid, place, 0))
    y = tf.where(valid[:, None], y, tf.zeros((), y.dtype))
    return tf.ensure_shape(y, (None, features))


def _rows_times_rows(x, dy, group_sizes):
    """`x[rows of e].T @ dy[rows of e]` for every e: the gradient of `w`."""
    if tf.executing_eagerly():
        parts, start = [], 0
        for size in group_sizes.numpy().tolist():
            end = start + size
            parts.append(tf.matmul(x[start:end], dy[start:end], transpose_a=True))
            start = end
        return tf.stack(parts)
    starts = tf.cumsum(group_sizes, exclusive=True)
    x = tf.pad(x, ((0, _BLOCK), (0, 0)))
    dy = tf.pad(dy, ((0, _BLOCK), (0, 0)))
    shape = (x.shape[1], dy.shape[1])

    def group(e, products):
        def add_block(i, total):
            row = starts[e] + i * _BLOCK
            inside = (i * _BLOCK + tf.range(_BLOCK) < group_sizes[e])[:, None]
            zero = tf.zeros((), x.dtype)
            left = tf.slice(x, tf.stack([row, 0]), (_BLOCK, shape[0]))
            right = tf.slice(dy, tf.stack([row, 0]), (_BLOCK, shape[1]))
            # Rows of the next group may hold infinities: zero both sides.
            left, right = (tf.where(inside, t, zero) for t in (left, right))
            product = tf.matmul(left, right, transpose_a=True)
            return i + 1, total + tf.cast(product, tf.float32)

        blocks = (group_sizes[e] + _BLOCK - 1) // _BLOCK
        _, total = tf.while_loop(
            lambda i, _: i < blocks,
            add_block,
            (tf.constant(0), tf.zeros(shape, tf.float32)),
        )
        return e + 1, products.write(e, tf.cast(total, x.dtype))

    num_groups = group_sizes.shape[0]
    products = tf.TensorArray(x.dtype, size=num_groups, element_shape=shape)
    _, products = tf.while_loop(
        lambda e, _: e < num_groups, group, (tf.constant(0), products)
    )
    return products.stack()


def top_k(x, k):
    # Documented: ties go to the lower index. XLA orders -0.0 below 0.0.
    return tf.math.top_k(tf.where(x == 0, tf.zeros((), x.dtype), x), k)
