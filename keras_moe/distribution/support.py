"""Which backends `keras.distribution` distributes on."""

import keras

_INSTEAD = {
    "tensorflow": "`tf.distribute.MirroredStrategy`",
    "torch": "`torch.nn.parallel.DistributedDataParallel`",
}


def check_supported(distribution):
    """Raises where a Keras distribution would silently distribute nothing.

    Args:
        distribution: what was set, for the message, or None for nothing.

    Raises:
        ValueError: on a backend other than JAX, naming what works there.
    """
    backend = keras.config.backend()
    if distribution is None or backend == "jax":
        return
    raise ValueError(
        "`keras.distribution` distributes on the JAX backend alone. On "
        f"{backend} use {_INSTEAD.get(backend, 'what the backend offers')}, see "
        f"guides/distribution.py. Received: {distribution}"
    )
