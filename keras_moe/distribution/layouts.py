"""Where the weights of a backbone lie on a mesh.

V  vocabulary       D  features     E  experts      H  hidden features
N  heads            d  features of a head           r  rank of a latent
"""

import math

import keras

# The path of a weight and its dimensions. Routers, norms and the biases of outputs are
# small and lie whole on every device.
_WEIGHTS = {
    r".*(token|decoder)_embedding/embeddings": "VD",
    r".*token_embedding/reverse_embeddings": "DV",
    r".*attention/(query|key|value)/kernel": "DNd",
    r".*attention/(query|key|value)/bias": "Nd",
    r".*attention/(query|key_value)_down/kernel": "Dr",
    r".*attention/(query|key_value)_up/kernel": "rNd",
    r".*attention/output_dense/kernel": "NdD",
    r".*bias/embeddings": "bN",
    r".*(feed_forward|shared_experts)/(gate|up)/kernel": "DH",
    r".*(feed_forward|shared_experts)/down/kernel": "HD",
    r".*/experts/(gate|up)_kernel": "EDH",
    r".*/experts/down_kernel": "EHD",
}
_OF_MODEL_AXIS = "VNH"
_OPTIONAL = "VD"  # the others decide who computes what


class Layout(keras.distribution.TensorLayout):
    """A `keras.distribution.TensorLayout` whose dimensions may lie over several axes.

    Args:
        axes: tuple with, for each dimension, None, the name of an axis of the mesh or a
            tuple of names.
        device_mesh: `keras.distribution.DeviceMesh` or None.
        optional: the indices of dimensions that stay whole where their axes do not
            divide them (see `fitted`).
    """

    def __init__(self, axes, device_mesh=None, optional=()):
        self.optional = tuple(optional)
        super().__init__(axes, device_mesh)

    def _validate_axes(self):
        if self._device_mesh:
            known = set(self._device_mesh.axis_names)
            used = [axis for entry in self._axes for axis in as_tuple(entry)]
            if unknown := set(used) - known:
                raise ValueError(
                    f"`axes` must name axes of the mesh, {sorted(known)}. Received: "
                    f"{sorted(unknown)} in axes={self._axes}"
                )

    def fitted(self, shape, path):
        """The layout of a weight of a shape.

        Args:
            shape: tuple of int.
            path: str, the weight's.

        Raises:
            ValueError: where axes do not divide a dimension that is not optional.
        """
        sizes = axis_sizes(self.device_mesh)
        axes = []
        for index, (entry, size) in enumerate(zip(self.axes, shape, strict=True)):
            count = math.prod(sizes[name] for name in as_tuple(entry))
            if size % count and index not in self.optional:
                raise ValueError(
                    f"The mesh's axis {entry!r} of {count} devices must divide "
                    f"dimension {index} of '{path}'. Received: {size}, of the shape "
                    f"{tuple(shape)}"
                )
            axes.append(None if size % count else entry)
        return Layout(axes, self.device_mesh)


def as_tuple(entry):
    """The axes of one dimension of a layout."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def axis_sizes(mesh):
    """A dict of the axes' names to their sizes."""
    return dict(zip(mesh.axis_names, mesh.shape, strict=True))


def layout_map(
    device_mesh,
    model_parallel_dim_name="model",
    data_parallel_dim_name="batch",
    expert_parallel_dim_name="expert",
):
    """See `MoEBackbone.get_layout_map`."""
    given = {
        "model_parallel_dim_name": model_parallel_dim_name,
        "data_parallel_dim_name": data_parallel_dim_name,
        "expert_parallel_dim_name": expert_parallel_dim_name,
    }
    if not isinstance(device_mesh, keras.distribution.DeviceMesh):
        raise ValueError(
            "`device_mesh` must be a `keras.distribution.DeviceMesh`. Received: "
            f"device_mesh={device_mesh!r}"
        )
    names = [name for name in given.values() if name is not None]
    if len(set(names)) < len(names):
        raise ValueError(
            "The axes that the arguments name must differ. Received: "
            + ", ".join(f"{name}={value!r}" for name, value in given.items())
        )
    known = set(device_mesh.axis_names)
    if not known & set(given.values()):
        raise ValueError(
            "`device_mesh` must have one of the axes that the arguments name, "
            f"{[*given.values()]}. Received: the axes {sorted(known)}"
        )
    model, data, expert = (name if name in known else None for name in given.values())
    shared = tuple(axis for axis in (data, expert) if axis)
    result = keras.distribution.LayoutMap(device_mesh)
    result.model_axis = model  # over which no batch lies: see `ExpertParallel`
    for path, dimensions in _WEIGHTS.items():
        of_experts = "E" in dimensions
        axes = {
            **dict.fromkeys(_OF_MODEL_AXIS, model),
            "E": expert,
            # Storage alone: gathered where a layer is computed.
            "D": data if of_experts else (shared or None),
        }
        result[path] = Layout(
            [axes.get(letter) for letter in dimensions],
            device_mesh,
            [i for i, letter in enumerate(dimensions) if letter in _OPTIONAL],
        )
    return result
