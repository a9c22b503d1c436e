"""Checks of arguments, each with an error that names what was expected and came."""

import math

import keras


def at_least(name, value, minimum):
    """`value` is an int, not below `minimum`."""
    if not _is_int(value) or value < minimum:
        raise ValueError(
            f"`{name}` must be an integer, at least {minimum}. "
            f"Received: {name}={value!r}"
        )


def positive(name, value):
    """`value` is a finite number above zero."""
    if not _is_number(value) or not 0 < value < math.inf:
        raise ValueError(
            f"`{name}` must be a finite positive number. Received: {name}={value!r}"
        )


def not_negative(name, value):
    """`value` is a finite number, zero or more."""
    if not _is_number(value) or not 0 <= value < math.inf:
        raise ValueError(
            f"`{name}` must be a finite number, zero or more. "
            f"Received: {name}={value!r}"
        )


def fraction(name, value):
    """`value` is a number in `[0, 1)`."""
    if not _is_number(value) or not 0 <= value < 1:
        raise ValueError(
            f"`{name}` must be a number, at least 0 and below 1. "
            f"Received: {name}={value!r}"
        )


def one_of(name, value, choices):
    """`value` is one of `choices`."""
    if value not in tuple(choices):  # which a list can be asked of, too
        raise ValueError(
            f"`{name}` must be one of {', '.join(map(repr, choices))}. "
            f"Received: {name}={value!r}"
        )


def activation(name, value):
    """The activation that `value` is, or names to Keras or to its registry."""
    if isinstance(value, str):
        value = keras.saving.get_registered_object(value) or value
    try:
        return keras.activations.get(value)
    except ValueError:
        raise ValueError(
            f"`{name}` must be the name of a Keras activation or a callable. "
            f"Received: {name}={value!r}"
        ) from None


def even(name, value):
    """`value` is even, as features must be that are rotated in pairs."""
    if value % 2:
        raise ValueError(
            f"`{name}` must be even with rotary positions. Received: {name}={value}"
        )


def top_k(value, num_experts):
    """`value` is an int between 1 and `num_experts`."""
    if not _is_int(value) or not 1 <= value <= num_experts:
        raise ValueError(
            f"`top_k` must be an integer between 1 and `num_experts` ({num_experts}). "
            f"Received: top_k={value!r}"
        )


def shared_experts(count, dim, gate):
    """The number of shared experts, with the width and the gate that need some."""
    at_least("num_shared_experts", count, 0)
    if dim is not None:
        at_least("shared_expert_dim", dim, 1)
    if not count and (dim or gate):
        raise ValueError(
            "`shared_expert_dim` and `shared_expert_gate` need shared experts. "
            f"Received: shared_expert_dim={dim!r}, shared_expert_gate={gate!r}, "
            "num_shared_experts=0"
        )


def divides(name, value, by_name, by):
    """`by` divides `value`."""
    if value % by:
        raise ValueError(
            f"`{name}` must be a multiple of `{by_name}`. "
            f"Received: {name}={value!r}, {by_name}={by!r}"
        )


def brief(value):
    """A value for an error, of which the beginning will do."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}... ({type(value).__name__})"


def _is_int(value):
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)
