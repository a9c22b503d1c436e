"""What LoRA and quantisation leave alone so far."""

import warnings


def warn_experts_left(model, method):
    """Warns that `method` passed over the experts of `model`, naming them."""
    mixtures = _mixtures(model)
    if not mixtures:
        return
    parameters = sum(layer.experts.count_params() for layer in mixtures)
    names = ", ".join(layer.experts.path for layer in mixtures)
    warnings.warn(
        f"`{method}()` does not cover expert weights yet: {parameters:,} parameters "
        f"of {names} are left as they were.",
        stacklevel=3,
    )


def _mixtures(model):
    from keras_moe.layers import MixtureOfExperts

    layers = model._flatten_layers()
    return [layer for layer in layers if isinstance(layer, MixtureOfExperts)]
