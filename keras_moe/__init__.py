"""Mixture-of-experts models for Keras, on JAX, torch and TensorFlow."""

from keras_moe import checkpoints, distribution, layers, models, ops
from keras_moe.listing import list_presets
from keras_moe.planning import plan
from keras_moe.sample_text import sample_text
from keras_moe.span_corruption import SpanCorruption, SpanCorruptionDataset
from keras_moe.sparsify import sparsify

__version__ = "0.1.0"

__all__ = [
    "SpanCorruption",
    "SpanCorruptionDataset",
    "checkpoints",
    "distribution",
    "layers",
    "list_presets",
    "models",
    "ops",
    "plan",
    "sample_text",
    "sparsify",
]
