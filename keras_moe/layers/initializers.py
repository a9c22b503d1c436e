"""Initialisation of several weights, and of stacked ones, from one initializer."""

import keras


def fresh(initializer, index=0):
    """A copy of an initializer for the `index`-th weight made with it.

    An initializer gives the same values at every call, so weights of one shape
    need a copy each: unseeded copies draw anew, a seeded one counts on from its
    seed.
    """
    initializer = keras.initializers.get(initializer)
    if not isinstance(initializer, keras.initializers.Initializer):
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
    if isinstance(initializer, keras.initializers.VarianceScaling):
        return keras.initializers.VarianceScaling(
            scale=initializer.scale * num_experts,
            mode=initializer.mode,
            distribution=initializer.distribution,
            seed=initializer.get_config()["seed"],
        )
    return initializer
