"""The TensorFlow formulations.

N rows, D features in, H features out, E groups.
"""

import functools

import tensorflow as tf

# Rows of a block, ascending: about the mean rows of a group, so that few are empty.
_BLOCKS = (16, 32, 64)


def grouped_matmul(x, w, group_sizes):
    @tf.custom_gradient
    def product(x, w):
        def gradient(dy):
            dy = tf.convert_to_tensor(dy)  # of a gather it comes as indexed slices
            return (
                _rows_times_groups(dy, w, group_sizes, transpose=True),
                _rows_times_rows(x, dy, group_sizes, w.shape[1:]),
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


def _with_block_size(formulation, num_rows, num_groups):
    """Calls `formulation(block)` with the block size that suits the rows there are.

    Where their number is not known before the program runs, the choice is part of
    the program; XLA knows it in any case, and compiles one.
    """
    if isinstance(num_rows, int):
        index = sum(num_rows > block * num_groups for block in _BLOCKS[:-1])
        return formulation(_BLOCKS[index])
    index = sum(tf.cast(num_rows > b * num_groups, tf.int32) for b in _BLOCKS[:-1])
    branches = [functools.partial(formulation, block) for block in _BLOCKS]
    return tf.switch_case(index, branches)


def _block_of(x, first_row, shape):
    """`shape[0]` rows of `x` from `first_row` on."""
    # Never `tf.slice` or `x[i]` with an index that data decides: XLA takes it for a
    # constant of the program, and compiles anew for every value.
    return tf.ensure_shape(tf.gather(x, first_row + tf.range(shape[0])), shape)


def _num_rows(x):
    return tf.shape(x)[0] if x.shape[0] is None else x.shape[0]


def _blockwise_rows_times_groups(x, w, group_sizes, transpose):
    num_rows, num_groups = _num_rows(x), w.shape[0]
    # Of `w`: inside another loop, a gradient has no static shape.
    features_in, features = w.shape[2:0:-1] if transpose else w.shape[1:]
    ends = tf.cumsum(group_sizes)
    starts = ends - group_sizes

    def formulation(block):
        blocks = (group_sizes + block - 1) // block
        block_ends = tf.cumsum(blocks)
        first_block = block_ends - blocks
        padded = tf.pad(x, ((0, block), (0, 0)))  # the last block may reach past it

        def body(i, products):
            e = tf.reduce_sum(tf.cast(block_ends <= i, tf.int32))
            row = tf.gather(starts, e) + (i - tf.gather(first_block, e)) * block
            rows = _block_of(padded, row, (block, features_in))
            product = tf.matmul(rows, tf.gather(w, e), transpose_b=transpose)
            return i + 1, products.write(i, product)

        products = tf.TensorArray(
            x.dtype,
            size=num_rows // block + num_groups + 1,
            element_shape=(block, features),
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
        place = tf.gather(first_block, group) * block + row - tf.gather(starts, group)
        y = tf.reshape(products.stack(), (-1, features))
        y = tf.gather(y, tf.where(valid, place, 0))
        y = tf.where(valid[:, None], y, tf.zeros((), y.dtype))
        return tf.ensure_shape(y, (None, features))

    return _with_block_size(formulation, num_rows, num_groups)


def _rows_times_rows(x, dy, group_sizes, shape):
    """`x[rows of e].T @ dy[rows of e]` for every e: the gradient of `w`."""
    if tf.executing_eagerly():
        parts, start = [], 0
        for size in group_sizes.numpy().tolist():
            end = start + size
            parts.append(tf.matmul(x[start:end], dy[start:end], transpose_a=True))
            start = end
        return tf.stack(parts)
    num_groups = group_sizes.shape[0]
    starts = tf.cumsum(group_sizes, exclusive=True)
    zero = tf.zeros((), x.dtype)

    def formulation(block):
        sides = [tf.pad(t, ((0, block), (0, 0))) for t in (x, dy)]

        def add_block(e, i, total):
            row = tf.gather(starts, e) + i * block
            inside = i * block + tf.range(block) < tf.gather(group_sizes, e)
            # Rows of the next group may hold infinities: zero both sides.
            left, right = (
                tf.where(inside[:, None], _block_of(side, row, (block, features)), zero)
                for side, features in zip(sides, shape, strict=True)
            )
            product = tf.matmul(left, right, transpose_a=True)
            return i + 1, total + tf.cast(product, tf.float32)

        def group(e, products):
            blocks = (tf.gather(group_sizes, e) + block - 1) // block
            _, total = tf.while_loop(
                lambda i, _: i < blocks,
                functools.partial(add_block, e),
                (tf.constant(0), tf.zeros(shape, tf.float32)),
            )
            return e + 1, products.write(e, tf.cast(total, x.dtype))

        products = tf.TensorArray(x.dtype, size=num_groups, element_shape=shape)
        _, products = tf.while_loop(
            lambda e, _: e < num_groups, group, (tf.constant(0), products)
        )
        return products.stack()

    return _with_block_size(formulation, _num_rows(x), num_groups)


def top_k(x, k):
    # Documented: ties go to the lower index. XLA orders -0.0 below 0.0.
    return tf.math.top_k(tf.where(x == 0, tf.zeros((), x.dtype), x), k)
