"""How a mixture lies on a mesh, read from the layouts of its experts' kernels."""

import functools
import math
from typing import Any, NamedTuple

import keras

from keras_moe.distribution.layouts import axis_sizes
from keras_moe.distribution.support import check_supported


class MixtureLayout(NamedTuple):
    """The axes of a mesh over which a mixture lies.

    Attributes:
        mesh: `keras.distribution.DeviceMesh`.
        token_axes: tuple of str: tokens lie over all of these together, which are
            all axes but the hidden one.
        expert_axis: str or None: experts lie over it.
        hidden_axis: str or None: the hidden features of each expert lie over it.
        num_token_shards: int.
        num_expert_shards: int, n.
    """

    mesh: Any
    token_axes: tuple
    expert_axis: Any
    hidden_axis: Any
    num_token_shards: int
    num_expert_shards: int


def choose_spread(layer):
    """How a `MixtureOfExperts` runs: see `spreading.set_spread`.

    Raises:
        ValueError: if the distribution was set after the layer was built, or its axes
            do not divide the experts or their hidden features.
    """
    layout = getattr(layer.experts.up_kernel, "_layout", None)
    distribution = keras.distribution.distribution()
    if layout is None:
        if distribution is None:
            return None
        check_supported(distribution)
        raise ValueError(
            f"The mixture '{layer.name}' was built before its distribution was set: "
            "call `keras.distribution.set_distribution` first, then build the model. "
            f"Received: {distribution}"
        )
    if distribution is not None and distribution.device_mesh is not layout.device_mesh:
        raise ValueError(
            f"The mixture '{layer.name}' was built under another distribution: set one "
            "before the model is built, and keep it. Expected a mesh of "
            f"{axis_sizes(layout.device_mesh)}. Received: {distribution} of "
            f"{axis_sizes(distribution.device_mesh)}"
        )
    from keras_moe.distribution import _jax

    return functools.partial(_jax.spread, _read(layer, layout))


def _read(layer, layout):
    mesh = layout.device_mesh
    sizes = axis_sizes(mesh)
    expert_axis, _, hidden_axis = layout.axes  # of a kernel [E, D, H]
    for axis, name, size in (
        (expert_axis, "num_experts", layer.num_experts),
        (hidden_axis, "intermediate_dim", layer.intermediate_dim),
    ):
        if axis is not None and size % sizes[axis]:
            raise ValueError(
                f"The mesh's axis '{axis}' of {sizes[axis]} devices must divide "
                f"`{name}`. Received: {name}={size}"
            )
    token_axes = tuple(axis for axis in mesh.axis_names if axis != hidden_axis)
    return MixtureLayout(
        mesh=mesh,
        token_axes=token_axes,
        expert_axis=expert_axis,
        hidden_axis=hidden_axis,
        num_token_shards=math.prod(sizes[axis] for axis in token_axes),
        num_expert_shards=sizes.get(expert_axis, 1),
    )
