"""How the routed part of a mixture runs: on one device, or spread over several."""

from typing import Any, NamedTuple


class Pass(NamedTuple):
    """How a mixture is called.

    Attributes:
        shape: the shape of its inputs, `[..., D]`.
        training: bool.
        with_statistics: bool.
        per_sequence: bool, see `MixtureOfExperts`.
    """

    shape: Any
    training: Any
    with_statistics: bool
    per_sequence: bool


def run(layer, tokens, mask, how):
    """The routed part of a mixture.

    Args:
        layer: a built `MixtureOfExperts`.
        tokens: float tensor `[T, D]`.
        mask: bool tensor `[T]`, False for padding, or None.
        how: a `Pass`.

    Returns:
        The outputs `[T, D]` without shared experts, and the statistics or None.
    """
    spread = _choose(layer) or _on_one_device
    return spread(layer, tokens, mask, how)


def _choose(layer):
    return None  # until `keras_moe.distribution` says otherwise


def _on_one_device(layer, tokens, mask, how):
    """The routed part of a mixture: outputs `[T, D]`, and statistics or None."""

    def compute(rows, group_sizes):
        return layer.experts(rows, group_sizes, training=how.training)

    return layer.route_and_compute(compute, tokens, mask, how)


def set_spread(choose):
    """Says how mixtures run where `keras.distribution` spreads them over devices.

    For `keras_moe.distribution`, which knows of meshes; layers do not.

    Args:
        choose: callable from a built `MixtureOfExperts` to None, for one device, or
            to a callable `(layer, tokens, mask, how) -> (outputs, statistics)`, which
            runs `layer.route_and_compute`.
    """
    global _choose
    _choose = choose
