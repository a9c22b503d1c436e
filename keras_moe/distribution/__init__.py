"""Models over many devices, through `keras.distribution`."""

from keras_moe.distribution.expert_parallel import ExpertParallel
from keras_moe.distribution.meshes import for_preset
from keras_moe.distribution.mixture_layout import choose_spread
from keras_moe.layers.spreading import set_spread

__all__ = ["ExpertParallel", "for_preset"]

set_spread(choose_spread)
