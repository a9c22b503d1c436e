"""What `keras.callbacks.OrbaxCheckpoint` wrote, back into a model on any mesh."""

import re
from typing import NamedTuple

import keras

from keras_moe.models._keras_hub import latest_orbax_checkpoint

_STATE = "non_trainable_variables"
_OPTIMIZER = "optimizer_variables"
_WEIGHTS = "trainable_variables"
_SHOWN = 4  # differences that a message quotes


class _Leaf(NamedTuple):
    """Where a saved array stands: the keys that lead to it, and its shape."""

    keys: tuple
    shape: tuple


def restore(model, directory):
    """Sets weights, the state of layers and that of a compiled model's optimizer.

    Each device reads what it holds, so the mesh need not be the one that was saved
    under, and no device sees the whole model. All is read before anything is set.

    Args:
        model: a built `keras.Model`, compiled if it shall train on.
        directory: path, of the callback or of one of its steps: then of that one,
            else of the latest that is whole.

    Raises:
        ValueError: for a folder without a whole checkpoint, and for one of another
            model or optimizer, naming the shapes.
        ImportError: without orbax-checkpoint.
    """
    from orbax.checkpoint import v1 as ocp

    path = latest_orbax_checkpoint(directory)
    tree = ocp.pytree_metadata(path, checkpointable_name="pytree").metadata
    variables, saved = _variables(model, tree), _canonical(_leaves(tree))
    _check_equal(variables, saved, path)
    wanted = {saved[name].keys: v for name, v in variables.items()}
    state = ocp.load_checkpointables(path, {"pytree": _abstract(tree, wanted, ocp)})
    assign(model, state["pytree"])


def assign(model, tree):
    """Sets the variables of a model that stand in a tree of values.

    Args:
        model: a built `keras.Model`.
        tree: dict of dicts, as `keras.Model.get_state_tree` gives it. Metrics are
            left: they begin anew.
    """
    values = _canonical(dict(_walk(tree)))
    for name, variable in _variables(model, tree).items():
        if name in values:
            variable.assign(values[name])


def _variables(model, tree):
    """The variables to set by their canonical names, the optimizer's if in the tree."""
    groups = {
        _WEIGHTS: model.trainable_variables,
        _STATE: model.non_trainable_variables,
    }
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None and _OPTIMIZER in tree:
        optimizer.build(model.trainable_variables)
        groups[_OPTIMIZER] = optimizer.variables
    found = {
        (group, *variable.path.split("/")): variable
        for group, variables in groups.items()
        for variable in variables
    }
    return _canonical(found)


def _canonical(by_keys):
    """The same by names that do not depend on what else a program has made.

    Keras numbers seed generators and optimizers over a whole process. Their numbers
    are left out, and what is then alike is told apart by the order of the numbers.
    """
    found, seen = {}, {}
    for keys in sorted(by_keys, key=_natural):
        plain = tuple(re.sub(r"^(seed_generator)_\d+$", r"\1", key) for key in keys)
        if keys[0] == _OPTIMIZER:
            plain = (keys[0], re.sub(r"_\d+$", "", keys[1]), *plain[2:])
        seen[plain] = seen.get(plain, -1) + 1
        name = "/".join(plain) + (f" {seen[plain]}" if seen[plain] else "")
        found[name] = by_keys[keys]
    return found


def _natural(keys):
    return [
        [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", key)]
        for key in keys
    ]


def _check_equal(variables, saved, path):
    """Refuses a checkpoint that has not all variables, or others, or of other shapes.

    Of a saved optimizer a model that is not compiled takes nothing.
    """
    groups = {name.split("/")[0] for name in variables}
    names = {name for name in saved if name.split("/")[0] in groups}
    differences = []
    for name in sorted(names | set(variables), key=lambda name: _natural([name])):
        there = saved[name].shape if name in names else None
        here = tuple(variables[name].shape) if name in variables else None
        if there != here:
            there, here = ("none" if s is None else s for s in (there, here))
            differences.append(f"{name}: {there} there, {here} here")
    if differences:
        more = len(differences) - _SHOWN
        raise ValueError(
            f"The checkpoint {path} is of another model or optimizer. Nothing was "
            "changed. Expected the variables of this model. Received: "
            + "; ".join(differences[:_SHOWN])
            + (f"; and {more} more" if more > 0 else "")
        )


def _leaves(tree):
    return {
        keys: _Leaf(keys, tuple(getattr(leaf, "shape", ())))
        for keys, leaf in _walk(tree)
    }


def _walk(tree, keys=()):
    if not isinstance(tree, dict):
        yield keys, tree
        return
    for key, value in tree.items():
        yield from _walk(value, (*keys, key))


def _abstract(tree, wanted, ocp):
    """What to read of a saved tree, and where to: None for all, into NumPy."""
    if keras.config.backend() != "jax":
        return None
    import jax

    def leaf(keys, saved):
        if isinstance(saved, dict):
            return {key: leaf((*keys, key), value) for key, value in saved.items()}
        if keys not in wanted:
            return ocp.PLACEHOLDER
        value = wanted[keys].value
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=value.sharding)

    return leaf((), tree)
