"""Sums over the replicas of data-parallel training."""

from keras import ops

from keras_moe.ops._backend import backend


def sum_over_replicas(tensors):
    """Each tensor summed over all replicas, the same sum on each of them.

    A replica is a process of `torch.distributed`, on torch, or a replica of
    `tf.distribute`, within `Strategy.run`, as `Model.fit` calls it. Where there is one
    alone, the tensors come back as they are; so they do on JAX, where a program
    computes over all devices of a `keras.distribution` and its sums are global.

    Gradients are summed over the replicas, too: with n of them, each of which adds
    `f(sum_over_replicas(x))` to its loss, the gradient of its own `x` is n times that
    of `f`. So a loss that is averaged over replicas, as losses are, has the gradient of
    one device with the whole batch. `DistributedDataParallel` divides by n as it
    averages gradients; on TensorFlow `fit` divides the loss, and sums gradients.

    All replicas must call this as many times and in the same order.

    Args:
        tensors: list of float tensors of one dtype, of shapes equal on all replicas.

    Returns:
        A list of tensors of these shapes.

    Example:

    ```python
    total, count = sum_over_replicas([ops.sum(x), ops.cast(ops.size(x), x.dtype)])
    mean = total / count  # of the batches of all replicas
    ```
    """
    return backend.sum_over_replicas([ops.convert_to_tensor(t) for t in tensors])
