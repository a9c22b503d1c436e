"""The distribution of mixtures of experts: tokens over all axes, experts over one."""

import contextlib
import math

import keras

from keras_moe.distribution.layouts import Layout, as_tuple, axis_sizes
from keras_moe.distribution.support import check_supported

_any_batch = False


@contextlib.contextmanager
def any_batch():
    """Within, a batch that a mesh does not divide lies whole on every device.

    For prompts: to train so would compute everything on every device. Not where each
    process has a part of the batch.
    """
    global _any_batch
    before, _any_batch = _any_batch, True
    try:
        yield
    finally:
        _any_batch = before


class ExpertParallel(keras.distribution.ModelParallel):
    """A `keras.distribution.ModelParallel` whose batch may lie over several axes.

    Experts lie over the axis that the layout map gives the first dimension of their
    kernels; the batch lies over that axis as well, and each token travels to the
    devices of its experts and back. Set it before the model is built.

    Args:
        layout_map: `keras.distribution.LayoutMap`, such as a backbone's
            `get_layout_map`. Where axes that spread what is stored alone do not divide
            a weight, it stays whole there.
        batch_axes: str or tuple of str: the axes of the mesh over which the batch
            lies, none for a batch that is whole on every device. None stands for all
            but the model axis.
        reason: str, why the mesh has its shape, for people.
        auto_shard_dataset: see `keras.distribution.ModelParallel`.

    Raises:
        ValueError: on a backend on which Keras does not distribute, for unknown axes,
            and, before anything is compiled, for weights and batches that cannot be
            divided.

    Example:

    ```python
    mesh = keras.distribution.DeviceMesh((2, 4), ("batch", "expert"))
    distribution = keras_moe.distribution.ExpertParallel(
        layout_map=keras_moe.models.MoEBackbone.get_layout_map(mesh)
    )
    keras.distribution.set_distribution(distribution)
    ```
    """

    def __init__(
        self, *, layout_map, batch_axes=None, reason="", auto_shard_dataset=True
    ):
        check_supported("ExpertParallel")
        mesh = layout_map.device_mesh
        if batch_axes is None:
            model_axis = getattr(layout_map, "model_axis", "model")
            batch_axes = [axis for axis in mesh.axis_names if axis != model_axis]
        self.batch_axes = as_tuple(batch_axes)
        if set(self.batch_axes) - set(mesh.axis_names):
            raise ValueError(
                f"`batch_axes` must name axes of the mesh, {tuple(mesh.axis_names)}. "
                f"Received: batch_axes={batch_axes}"
            )
        self.reason = reason
        super().__init__(
            layout_map=layout_map,
            batch_dim_name=self.batch_axes[0] if self.batch_axes else None,
            auto_shard_dataset=auto_shard_dataset,
        )

    @property
    def num_model_replicas(self):
        sizes = axis_sizes(self.device_mesh)
        return math.prod(sizes[axis] for axis in self.batch_axes)

    def get_data_layout(self, data_shape):
        if not data_shape:
            return Layout((), self.device_mesh)
        # A process brings its part of the batch.
        parts = max(self.num_model_replicas // self.num_processes, 1)
        if data_shape[0] is not None and data_shape[0] % parts:
            if _any_batch and self.num_processes == 1:
                return Layout([None] * len(data_shape), self.device_mesh)
            raise ValueError(
                f"The mesh's axes {self.batch_axes} divide a batch over {parts} "
                "devices of this process, which must divide its size: `batch_size`, "
                "and what is left for the last batch. Received: "
                f"{data_shape[0]}, of the shape {tuple(data_shape)}"
            )
        rest = [None] * (len(data_shape) - 1)
        return Layout((self.batch_axes, *rest), self.device_mesh)

    def get_variable_layout(self, variable):
        layout = super().get_variable_layout(variable)
        if isinstance(layout, Layout):
            return layout.fitted(variable.shape, variable.path)
        return layout
