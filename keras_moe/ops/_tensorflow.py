"""The TensorFlow formulations.

N  rows     D  features in      H  features out     E  groups
"""

import contextlib
import math

import keras
import numpy as np
import tensorflow as tf
from keras.src.backend.common import global_state
from tensorflow.compiler.tf2xla.python import xla
from tensorflow.python.ops import control_flow_util

from keras_moe.ops._blocks import block_at, block_sizes, sweeps
from keras_moe.ops._stages import stage_outputs

_ALIGNMENT = 64  # bytes: what memory must lie at that TensorFlow is to share


def choose_formulation(x, weights):
    # XLA wants static shapes; without it, a group's rows can be what they are.
    return "blocks" if _within_xla() else "groups"


def _within_xla():
    return not tf.executing_eagerly() and control_flow_util.GraphOrParentsInXlaContext(
        tf.compat.v1.get_default_graph()
    )


def _matmul(x, w):
    return tf.matmul(x, tf.cast(w, x.dtype))


def _differentiable(forward, backward):
    """A formulation, of its forward part and its backward part.

    Args:
        forward: callable `(functions, x, weights, group_sizes)` to the result and
            whatever the gradient needs.
        backward: callable `(functions, x, weights, group_sizes, kept, dy)` to the
            gradients of `x` and of each weight.
    """

    def formulation(functions, x, weights, group_sizes):
        @tf.custom_gradient
        def run(x, *flat_weights):
            stages = tf.nest.pack_sequence_as(weights, flat_weights)
            y, kept = forward(functions, x, stages, group_sizes)

            def gradient(dy):
                dy = tf.convert_to_tensor(dy)  # of a lookup it comes as indexed slices
                return backward(functions, x, stages, group_sizes, kept, dy)

            return y, gradient

        # Tensors: of a variable, TensorFlow asks for a gradient of its own kind.
        return run(x, *map(tf.convert_to_tensor, tf.nest.flatten(weights)))

    return formulation


def _output_specs(functions, x, weights):
    """All stages' outputs without rows: their structure, dtypes and features."""
    return stage_outputs(functions, x[:0], _matrices(weights, 0), _matmul)


def _chain_back(functions, inputs, weights, gradient):
    """The gradients of the first input and of each weight, for rows of one group."""
    of_weights = []
    for function, values, stage in zip(
        reversed(functions), reversed(inputs), reversed(weights), strict=True
    ):
        with tf.GradientTape() as tape:
            tape.watch((values, stage))
            outputs = function(_matmul, values, stage)
        gradient, of_stage = tape.gradient(
            outputs,
            (values, stage),
            output_gradients=gradient,
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        of_weights = [*of_stage, *of_weights]
    return gradient[0], of_weights


# --- Groups: a loop over the groups in use, their rows of any number.


class _Groups:
    """The groups that have rows, in order.

    Neither rows nor matrices are copied: a slice along the first axis shares the
    memory of what it is taken from.
    """

    def __init__(self, group_sizes):
        self.ends = tf.cumsum(group_sizes)
        self.starts = self.ends - group_sizes
        self.used = tf.cast(tf.where(group_sizes > 0)[:, 0], tf.int32)
        self.count = tf.size(self.used)

    def loop(self, step, arrays):
        """Applies `step(i, group, rows of it, arrays)` to the i-th group in use."""

        def body(i, *arrays):
            e = self.used[i]
            return i + 1, *step(i, e, slice(self.starts[e], self.ends[e]), arrays)

        _, *arrays = tf.while_loop(
            lambda i, *_: i < self.count, body, (tf.constant(0), *arrays)
        )
        return arrays

    def arrays(self, specs):
        """For each of `specs` an array of such rows: of each group in use, and one."""
        return [
            tf.TensorArray(
                spec.dtype,
                size=self.count + 1,
                element_shape=(None, spec.shape[1]),
                infer_shape=False,
            )
            for spec in specs
        ]


def _groups_forward(functions, x, weights, group_sizes):
    groups = _Groups(group_sizes)
    specs = _output_specs(functions, x, weights)
    flat_specs = tf.nest.flatten(specs)

    def step(i, e, rows, arrays):
        outputs = stage_outputs(functions, x[rows], _matrices(weights, e), _matmul)
        return [
            array.write(i, value)
            for array, value in zip(arrays, tf.nest.flatten(outputs), strict=True)
        ]

    # Tensors, not the arrays, for the gradient: a SavedModel takes no others.
    outputs = [
        _all_rows(groups, array, spec, x)
        for array, spec in zip(
            groups.loop(step, groups.arrays(flat_specs)), flat_specs, strict=True
        )
    ]
    *between, (y,) = tf.nest.pack_sequence_as(specs, outputs)
    return y, between


def _groups_backward(functions, x, weights, group_sizes, between, dy):
    groups = _Groups(group_sizes)

    def step(i, e, rows, results):
        inputs = tf.nest.map_structure(lambda t: t[rows], [(x,), *between])
        dx, dw = _chain_back(functions, inputs, _matrices(weights, e), (dy[rows],))
        of_rows, *of_weights = results
        return of_rows.write(i, dx), *(
            array.write(e, new) for array, new in zip(of_weights, dw, strict=True)
        )

    # What is never written, that of a group without rows, reads as zero.
    of_weights = [
        tf.TensorArray(w.dtype, size=w.shape[0], element_shape=w.shape[1:])
        for w in tf.nest.flatten(weights)
    ]
    dx, *of_weights = groups.loop(step, [*groups.arrays([x]), *of_weights])
    return _all_rows(groups, dx, x, x), *(array.stack() for array in of_weights)


def _matrices(weights, e):
    return tf.nest.map_structure(lambda w: w[e], weights)


def _all_rows(groups, array, spec, x):
    """The rows of all groups, and zeros for those of `x` in no group."""
    rest = tf.zeros((tf.shape(x)[0] - groups.ends[-1], spec.shape[1]), spec.dtype)
    rows = array.write(groups.count, rest).concat()
    return tf.ensure_shape(rows, (x.shape[0], spec.shape[1]))


# --- Blocks: loops over blocks of rows of a few fixed sizes, for XLA.


def _blocks_forward(functions, x, weights, group_sizes):
    rows = _with_room(x)

    def step(buffers, e, start, inside, first):
        block = _slice(rows, start, inside.shape[0])
        matrices = _matrices_of_block(weights, e)
        outputs = stage_outputs(functions, block, matrices, _matmul)
        return [
            _update(buffer, value, start, inside)
            for buffer, value in zip(buffers, tf.nest.flatten(outputs), strict=True)
        ]

    specs = _output_specs(functions, x, weights)
    buffers = [
        tf.zeros((tf.shape(rows)[0], spec.shape[1]), spec.dtype)
        for spec in tf.nest.flatten(specs)
    ]
    buffers = _over_blocks(step, buffers, group_sizes, rows, x)
    *between, (y,) = tf.nest.pack_sequence_as(specs, buffers)
    return _without_room(y, x), between


def _blocks_backward(functions, x, weights, group_sizes, between, dy):
    rows = [(_with_room(x),), *between], (_with_room(dy),)

    def step(carry, e, start, inside, first):
        dx, *totals = carry

        # Rows of other groups may hold infinities: zero both sides.
        def rows_inside(t):
            block = _slice(t, start, inside.shape[0])
            return tf.where(inside, block, tf.zeros((), t.dtype))

        inputs, gradient = tf.nest.map_structure(rows_inside, rows)
        matrices = _matrices_of_block(weights, e)
        new, dw = _chain_back(functions, inputs, matrices, gradient)
        return _update(dx, new, start, inside), *(
            _add_to_group(total, new, e, first)
            for total, new in zip(totals, dw, strict=True)
        )

    flat_weights = tf.nest.flatten(weights)
    totals = [tf.zeros(w.shape, tf.float32) for w in flat_weights]
    dx, *totals = _over_blocks(
        step, [tf.zeros_like(rows[0][0][0]), *totals], group_sizes, rows[0][0][0], x
    )
    return _without_room(dx, x), *(
        tf.cast(total, w.dtype) for total, w in zip(totals, flat_weights, strict=True)
    )


def _with_room(rows):
    """At least as many rows as the largest block, where their number is unknown."""
    if rows.shape[0] is not None:
        return rows
    largest = block_sizes(None, 1)[-1]
    return tf.pad(rows, ((0, tf.maximum(largest - tf.shape(rows)[0], 0)), (0, 0)))


def _without_room(rows, x):
    if x.shape[0] is None:
        rows = rows[: tf.shape(x)[0]]
    return tf.ensure_shape(rows, (x.shape[0], rows.shape[1]))


# Never `tf.slice` or `x[i]` with an index that data decides: XLA takes it for a
# constant of the program, and compiles anew for every value.


def _slice(rows, start, size):
    features = rows.shape[1]
    rows = xla.dynamic_slice(rows, tf.stack([start, 0]), [size, features])
    return tf.ensure_shape(rows, (size, features))


def _update(rows, new, start, inside):
    """`rows` with those of `new` from `start` on that are inside the block."""
    new = tf.where(inside, new, _slice(rows, start, new.shape[0]))
    return tf.ensure_shape(
        xla.dynamic_update_slice(rows, new, tf.stack([start, 0])), rows.shape
    )


def _matrix_of_block(bank, e):
    shape = bank.shape[1:]
    return tf.reshape(xla.dynamic_slice(bank, tf.stack([e, 0, 0]), [1, *shape]), shape)


def _matrices_of_block(weights, e):
    return tf.nest.map_structure(lambda w: _matrix_of_block(w, e), weights)


def _add_to_group(totals, new, e, first):
    new = tf.cast(new, totals.dtype)
    if not first:
        new += _matrix_of_block(totals, e)
    return tf.ensure_shape(
        xla.dynamic_update_slice(totals, new[None], tf.stack([e, 0, 0])), totals.shape
    )


def _over_blocks(step, carry, group_sizes, rows, x):
    """Applies `step(carry, group, start, inside, first)` to all blocks."""
    num_rows = tf.shape(rows)[0]
    for sweep in sweeps(group_sizes, x.shape[0]):

        def body(i, *carry, sweep=sweep):
            e, start, inside = block_at(sweep, i, num_rows)
            return i + 1, *step(carry, e, start, inside[:, None], sweep.first)

        blocks = tf.reduce_sum(sweep.counts)
        _, *carry = tf.while_loop(
            lambda i, *_, blocks=blocks: i < blocks, body, (tf.constant(0), *carry)
        )
    return carry


FORMULATIONS = {
    "groups": _differentiable(_groups_forward, _groups_backward),
    "blocks": _differentiable(_blocks_forward, _blocks_backward),
}


def top_k(x, k):
    # Documented: ties go to the lower index. XLA orders -0.0 below 0.0.
    return tf.math.top_k(tf.where(x == 0, tf.zeros((), x.dtype), x), k)


def inverse_permutation(permutation):
    # Not `tf.math.invert_permutation`, which XLA takes for a constant's.
    size = tf.size(permutation)
    indices = tf.cast(permutation, tf.int32)[:, None]
    inverse = tf.scatter_nd(indices, tf.range(size), size[None])
    return tf.ensure_shape(inverse, permutation.shape)


def assign_parts(variable, parts):
    # Not `variable[index].assign`: such a variable is copied at each later read.
    name = keras.backend.standardize_dtype(variable.dtype)
    whole = _aligned(np.empty, tuple(variable.shape), name)
    for index, array in parts:
        whole[... if index is None else index] = array.view(whole.dtype)
    variable.assign(_share(whole, name))


def unwritten_zeros(shape, dtype):
    return _share(_aligned(np.zeros, tuple(shape), dtype), dtype)


def _aligned(make, shape, name):
    """An array whose memory TensorFlow takes as it is; bfloat16 as int16."""
    dtype = np.dtype("int16" if name == "bfloat16" else name)
    size = math.prod(shape) * dtype.itemsize
    memory = make(size + _ALIGNMENT, "uint8")
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _share(array, name):
    tensor = tf.experimental.dlpack.from_dlpack(array.__dlpack__())
    return tf.bitcast(tensor, tf.bfloat16) if name == "bfloat16" else tensor


def sum_over_replicas(tensors):
    replica = tf.distribute.get_replica_context()
    if replica is None or replica.num_replicas_in_sync == 1:
        return tensors
    with _losses_kept():
        return replica.all_reduce(tf.distribute.ReduceOp.SUM, tensors)


@contextlib.contextmanager
def _losses_kept():
    """Within, other replicas may call the model that this one is calling.

    At a sum each replica waits for the others, which Python runs in turn. Layers are
    one for all of them, and so are the lists in which layers keep what `add_loss` gave.
    """
    context = global_state.get_global_attribute("current_call_ctx")
    layers = context.entry_layer._flatten_layers() if context else []
    kept = [(layer._losses, layer._losses[:]) for layer in layers]
    yield
    for losses, own in kept:
        losses[:] = own


def forget_traces():
    pass  # A `tf.function` keeps its traces to itself.
