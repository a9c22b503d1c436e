"""A layer or a model as a program of the active backend, run to its end.

Compiled as Keras compiles by default: JAX by XLA, torch eagerly, TensorFlow as a
graph, by XLA where there is a GPU or `xla` asks for it.
"""

import keras


def forward(layer, inputs, xla=None):
    """A function of no arguments that calls `layer(inputs)` outside training."""
    inputs = keras.tree.map_structure(keras.ops.convert_to_tensor, inputs)
    return _FORWARD[keras.config.backend()](layer, inputs, xla)


def forward_backward(layer, inputs, xla=None):
    """The same with the gradients of the mean square, of inputs and weights."""
    inputs = keras.ops.convert_to_tensor(inputs)
    return _BACKWARD[keras.config.backend()](layer, inputs, xla)


def training_step(task, inputs, targets, xla=None):
    """A function of no arguments that takes a step of SGD on one batch."""
    task.compile(
        optimizer=keras.optimizers.SGD(1e-3),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=None,
        jit_compile="auto" if xla is None else xla,
    )
    return lambda: task.train_on_batch(inputs, targets)


def _jax_forward(layer, inputs, xla):
    import jax

    trainable = [v.value for v in layer.trainable_variables]
    others = [v.value for v in layer.non_trainable_variables]
    run = jax.jit(lambda t, n, x: layer.stateless_call(t, n, x)[0])
    return lambda: jax.block_until_ready(run(trainable, others, inputs))


def _jax_backward(layer, inputs, xla):
    import jax

    trainable = [v.value for v in layer.trainable_variables]
    others = [v.value for v in layer.non_trainable_variables]

    def loss(trainable, x, others):
        y = layer.stateless_call(trainable, others, x)[0]
        return (y * y).mean()

    run = jax.jit(jax.grad(loss, argnums=(0, 1)))
    return lambda: jax.block_until_ready(run(trainable, inputs, others))


def _torch_forward(layer, inputs, xla):
    import torch

    def run():
        with torch.no_grad():
            layer(inputs)
        wait_for_torch()

    return run


def _torch_backward(layer, inputs, xla):
    import torch

    inputs.requires_grad_()
    weights = [v.value for v in layer.trainable_variables]

    def run():
        y = layer(inputs)
        torch.autograd.grad((y * y).mean(), [inputs, *weights])
        wait_for_torch()

    return run


def wait_for_torch():
    """Returns when the GPU, if there is one, has done all it was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _tensorflow_function(function, xla):
    import tensorflow as tf

    if xla is None:
        xla = bool(tf.config.list_physical_devices("GPU"))
    return tf.function(function, jit_compile=xla)


def _tensorflow_forward(layer, inputs, xla):
    run = _tensorflow_function(layer, xla)
    return lambda: run(inputs).numpy()


def _tensorflow_backward(layer, inputs, xla):
    import tensorflow as tf

    weights = [v.value for v in layer.trainable_variables]

    def gradients(inputs):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            y = layer(inputs)
            loss = tf.reduce_mean(y * y)
        return tape.gradient(loss, [inputs, *weights])

    run = _tensorflow_function(gradients, xla)
    return lambda: run(inputs)[0].numpy()


_FORWARD = {
    "jax": _jax_forward,
    "torch": _torch_forward,
    "tensorflow": _tensorflow_forward,
}
_BACKWARD = {
    "jax": _jax_backward,
    "torch": _torch_backward,
    "tensorflow": _tensorflow_backward,
}
