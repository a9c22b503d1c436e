"""Initialisation of several weights, and of stacked ones, from one initializer."""

import contextlib
import contextvars
import functools

import keras
from keras import ops

from keras_moe.ops import unwritten_zeros

# Those that say something about a matrix as a whole.
_OF_A_MATRIX = (keras.initializers.Orthogonal, keras.initializers.Identity)

_skipped = contextvars.ContextVar("skipped", default=False)


@contextlib.contextmanager
def skipped():
    """Weights made within are zeros: others are about to take their place.

    To draw billions of random numbers takes minutes, and in half precision more
    memory than they fill.
    """
    token = _skipped.set(True)
    try:
        yield
    finally:
        _skipped.reset(token)


def fresh(initializer, index=0):
    """A copy of an initializer for the `index`-th weight made with it.

    An initializer gives the same values at every call, so weights of one shape
    need a copy each: unseeded copies draw anew, a seeded one counts on from its
    seed. One seeded by a generator draws anew by itself, which its copies would
    not.
    """
    if _skipped.get():
        return unwritten_zeros
    initializer = keras.initializers.get(initializer)
    if not isinstance(initializer, keras.initializers.Initializer):
        return initializer
    if isinstance(getattr(initializer, "seed", None), keras.random.SeedGenerator):
        return initializer
    config = initializer.get_config()
    if isinstance(config.get("seed"), int):
        config["seed"] += index
    return type(initializer).from_config(config)


def fresh_per_expert(initializer, num_experts, index=0):
    """`fresh` for a weight `[E, fan_in, fan_out]`, each expert treated alone.

    Keras takes the leading axis of a rank-3 weight for a receptive field and
    would count it into the fan, making every expert `sqrt(E)` too small.
    """
    initializer = fresh(initializer, index)
    if isinstance(initializer, _OF_A_MATRIX):
        return functools.partial(_stack, initializer)
    if isinstance(initializer, keras.initializers.VarianceScaling):
        return keras.initializers.VarianceScaling(
            scale=initializer.scale * num_experts,
            mode=initializer.mode,
            distribution=initializer.distribution,
            seed=initializer.seed,
        )
    return initializer


def fresh_share(initializer, share, index=0):
    """`fresh`, with a share of the variance where the weight's sizes decide on it."""
    initializer = fresh(initializer, index)
    if not isinstance(initializer, keras.initializers.VarianceScaling):
        return initializer
    return keras.initializers.VarianceScaling(
        scale=initializer.scale * share,
        mode=initializer.mode,
        distribution=initializer.distribution,
        seed=initializer.seed,
    )


def _stack(initializer, shape, dtype=None):
    """One matrix of `shape[1:]` an expert, each drawn anew."""
    # Seeds far enough apart not to meet those of the layer's other weights.
    copies = (fresh(initializer, 100 * expert) for expert in range(shape[0]))
    return ops.stack([copy(shape[1:], dtype=dtype) for copy in copies])
