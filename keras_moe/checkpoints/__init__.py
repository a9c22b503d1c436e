"""Checkpoints of Transformers, in and out: one table a family, read both ways."""

from keras_moe.checkpoints.exporting import export_to_transformers
from keras_moe.checkpoints.loading import load_backbone
from keras_moe.checkpoints.tokenizer_files import (
    read_extras,
    read_preprocessing,
    read_tokenizer,
)

__all__ = [
    "export_to_transformers",
    "load_backbone",
    "read_extras",
    "read_preprocessing",
    "read_tokenizer",
]
