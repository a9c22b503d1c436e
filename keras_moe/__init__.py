"""Mixture-of-experts models for Keras, on JAX, torch and TensorFlow."""

from keras_moe import layers, models, ops
from keras_moe.sample_text import sample_text

__version__ = "0.1.0"

__all__ = ["layers", "models", "ops", "sample_text"]
