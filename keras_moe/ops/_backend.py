"""The one place that chooses a backend's own formulations.

A formulation lives in `_jax.py`, `_torch.py` or `_tensorflow.py`, each of which
defines the same functions; nothing else in the package imports a backend.
"""

import importlib

import keras

_MODULES = ("jax", "torch", "tensorflow")


def _load():
    name = keras.config.backend()
    if name not in _MODULES:
        raise ImportError(
            "keras_moe runs on the Keras backends "
            f"{', '.join(_MODULES)}. Received: KERAS_BACKEND={name!r}"
        )
    return importlib.import_module(f"keras_moe.ops._{name}")


backend = _load()
