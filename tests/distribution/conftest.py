"""Distributions are global: none is left behind."""

import keras
import pytest

# `keras.distribution` distributes on JAX alone; the others test what they say instead.
collect_ignore = (
    []
    if keras.config.backend() == "jax"
    else [
        "test_compiled_traffic.py",
        "test_expert_parallel.py",
        "test_loading.py",
        "test_meshes.py",
        "test_mixtures.py",
        "test_models.py",
        "test_processes.py",
    ]
)


@pytest.fixture(autouse=True)
def _no_distribution():
    yield
    keras.distribution.set_distribution(None)
