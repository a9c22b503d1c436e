"""Meshes of eight virtual devices, by the axes they have."""

import math

import keras

from keras_moe.distribution import ExpertParallel
from keras_moe.models import MoEBackbone

MESHES = {
    "batch": {"batch": 8},
    "expert": {"expert": 8},
    "model": {"model": 2},
    "batch_model": {"batch": 4, "model": 2},
    "batch_expert": {"batch": 2, "expert": 4},
    "expert_model": {"expert": 4, "model": 2},
    "batch_expert_model": {"batch": 2, "expert": 2, "model": 2},
}


def mesh(sizes):
    """The `keras.distribution.DeviceMesh` of a name, or of a dict of its axes."""
    sizes = MESHES[sizes] if isinstance(sizes, str) else sizes
    devices = keras.distribution.list_devices()[: math.prod(sizes.values())]
    return keras.distribution.DeviceMesh(tuple(sizes.values()), [*sizes], devices)


def distribute(sizes):
    """Sets the distribution over a mesh as of `mesh`, and returns it."""
    layout_map = MoEBackbone.get_layout_map(mesh(sizes))
    distribution = ExpertParallel(layout_map=layout_map)
    keras.distribution.set_distribution(distribution)
    return distribution
