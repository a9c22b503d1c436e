"""Checkpoints of Transformers, in and out: one table a family, read both ways."""

from keras_moe.checkpoints.exporting import export_to_transformers
from keras_moe.checkpoints.families import FAMILIES

__all__ = ["FAMILIES", "export_to_transformers"]
