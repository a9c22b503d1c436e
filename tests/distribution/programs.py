"""The programs that JAX compiles for a mesh."""

import jax
import keras


def compiled_step(model, inputs, targets):
    """The text of a training step's program."""
    model.optimizer.build(model.trainable_variables)
    state = model._get_jax_state(
        trainable_variables=True,
        non_trainable_variables=True,
        optimizer_variables=True,
        metrics_variables=True,
    )
    layout = keras.distribution.distribution().get_data_layout
    data = jax.tree.map(
        lambda a: jax.device_put(a, layout(a.shape).backend_layout), (inputs, targets)
    )
    # As Keras does: what it replaces may be overwritten.
    step = jax.jit(model.train_step, donate_argnums=0)
    return step.lower(tuple(state), data).compile().as_text()
