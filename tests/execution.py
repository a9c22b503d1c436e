"""The ways in which the active backend runs a function, and its gradients.

So that a test says once what must hold, and it holds eagerly and compiled.
"""

import functools

import keras
import numpy as np

MODES = {
    "jax": ("eager", "jit"),
    "torch": ("eager",),
    "tensorflow": ("eager", "graph", "xla"),
}[keras.config.backend()]
COMPILED = MODES[-1]  # what `Model.fit` does by default

# In how many ways `Model.fit` runs a step, as arguments of `compile`. JAX without
# `jit_compile` is eager.
TRAINING = {"eager": {"run_eagerly": True}, "compiled": {}}
if keras.config.backend() == "tensorflow":
    TRAINING["without_xla"] = {"jit_compile": False}


def numpy(value):
    """A structure of tensors as NumPy, floats as float64."""

    def convert(tensor):
        if tensor is None:
            return None
        array = keras.ops.convert_to_numpy(tensor)
        if keras.backend.is_float_dtype(keras.backend.standardize_dtype(tensor.dtype)):
            array = array.astype("float64")
        return array

    return keras.tree.map_structure(convert, value, none_is_leaf=True)


@functools.cache
def in_mode(function, mode):
    """`function` of tensors, run in a mode; compiled once for each function."""
    if mode == "eager":
        return function
    if mode == "jit":
        import jax

        return jax.jit(function)
    import tensorflow as tf

    return tf.function(function, jit_compile=mode == "xla")


def with_unknown_axes(function, mode, structure, axes=1):
    """`function(structure)` in a mode, compiled before its sizes are known.

    Only TensorFlow has such shapes; elsewhere this is `in_mode`. `axes` leading axes
    of the first and last tensor of `structure` are unknown.
    """
    if mode not in ("graph", "xla"):
        return in_mode(function, mode)
    import tensorflow as tf

    tensors = keras.tree.flatten(structure)
    specs = [
        tf.TensorSpec(
            [None] * axes + t.shape[axes:]
            if t is tensors[0] or t is tensors[-1]
            else t.shape,
            t.dtype,
        )
        for t in tensors
    ]
    return tf.function(
        function,
        input_signature=keras.tree.pack_sequence_as(structure, specs),
        jit_compile=mode == "xla",
    )


def with_gradients(function, inputs, cotangent, mode="eager", unknown_axes=0):
    """`function(*inputs)` and the gradients of `sum(outputs * cotangent)`.

    Args:
        function: of tensors, returning one tensor. Compiled once if the same
            function comes again.
        inputs: float arrays or tensors; integers take part without gradient.
        cotangent: array of the shape of the output.
        mode: one of `MODES`.
        unknown_axes: int, see `with_unknown_axes`.

    Returns:
        `(output, gradients)`: NumPy, a gradient for each float input.
    """
    tensors = [keras.ops.convert_to_tensor(x) for x in inputs]
    cotangent = keras.ops.convert_to_tensor(cotangent)
    function = differentiated(function)
    if unknown_axes:
        structure = (tensors, cotangent)
        function = with_unknown_axes(function, mode, structure, unknown_axes)
    else:
        function = in_mode(function, mode)
    output, gradients = function(tensors, cotangent)
    return numpy(output), [g for g in numpy(gradients) if g is not None]


def program(function, mode, *structure):
    """The text of what `function(*structure)` compiles to in a mode.

    Equal texts for different values mean that a program serves all of them. There
    is no program in eager modes.
    """
    if mode == "jit":
        import jax

        return jax.jit(function).lower(*structure).as_text()
    if mode == "xla":
        return in_mode(function, mode).experimental_get_compiler_ir(*structure)("hlo")
    return ""


def when_run(function):
    """Calls `function` whenever the computation that this stands in runs, in eager."""
    if keras.config.backend() == "jax":
        import jax

        # What is recomputed on JAX is not Python's, but what was traced of it.
        jax.debug.callback(function)
    else:
        function()


def wait_for_runs():
    """Returns when all functions of `when_run` have been called."""
    if keras.config.backend() == "jax":
        import jax

        jax.effects_barrier()


@functools.cache
def differentiated(function):
    """`(tensors, cotangent) -> (output, gradients)` of `function(*tensors)`."""
    return {"jax": _jax, "torch": _torch, "tensorflow": _tensorflow}[
        keras.config.backend()
    ](function)


def _is_float(tensor):
    return keras.backend.is_float_dtype(keras.backend.standardize_dtype(tensor.dtype))


def _jax(function):
    import jax

    def run(tensors, cotangent):
        def of_floats(floats):
            left = iter(floats)
            return function(*(next(left) if _is_float(t) else t for t in tensors))

        output, pull_back = jax.vjp(of_floats, [t for t in tensors if _is_float(t)])
        return output, pull_back(cotangent.astype(output.dtype))[0]

    return run


def _torch(function):
    import torch

    def run(tensors, cotangent):
        tensors = [
            t.detach().clone(memory_format=torch.preserve_format).requires_grad_()
            if _is_float(t)
            else t
            for t in tensors
        ]
        output = function(*tensors)
        floats = [t for t in tensors if _is_float(t)]
        gradients = torch.autograd.grad(
            output, floats, cotangent.to(output.dtype), allow_unused=True
        )
        return output, [
            torch.zeros_like(t) if g is None else g
            for g, t in zip(gradients, floats, strict=True)
        ]

    return run


def _tensorflow(function):
    import tensorflow as tf

    def run(tensors, cotangent):
        floats = [t for t in tensors if _is_float(t)]
        with tf.GradientTape() as tape:
            tape.watch(floats)
            output = function(*tensors)
        gradients = tape.gradient(
            output,
            floats,
            output_gradients=tf.cast(cotangent, output.dtype),
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        # That of a lookup names rows.
        return output, [tf.convert_to_tensor(gradient) for gradient in gradients]

    return run


def as_function(layer, **call):
    """A layer as a function `(inputs, *weights) -> outputs`, without side effects.

    The weights are `layer.trainable_variables`, which then are differentiated like
    any other input.
    """

    def function(inputs, *weights):
        mapping = zip(layer.trainable_variables, weights, strict=True)
        with keras.StatelessScope(state_mapping=list(mapping)):
            return layer(inputs, **call)

    return function


def numerical_gradients(function, arrays, cotangent, step=1e-5):
    """Central differences of `sum(function(*arrays) * cotangent)`, in float64."""
    arrays = [np.array(a, "float64") for a in arrays]
    gradients = []
    for array in arrays:
        gradient = np.zeros_like(array)
        for index in np.ndindex(array.shape):
            centre = array[index]
            ends = []
            for shift in (step, -step):
                array[index] = centre + shift
                ends.append(np.sum(function(*arrays) * cotangent))
            array[index] = centre
            gradient[index] = (ends[0] - ends[1]) / (2 * step)
        gradients.append(gradient)
    return gradients
