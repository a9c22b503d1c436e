"""What ties a checkpoint's tensors to a backbone's weights, in both directions.

A table is a list of entries. One entry says which part of one tensor is which part of
one weight, and how the one is laid out as the other. Loading reads it from left to
right, exporting from right to left.
"""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Entry:
    """One part of a checkpoint's tensor, and the part of a weight that it is.

    Attributes:
        name: str, the tensor's name in the checkpoint.
        path: str, the attributes that lead from the backbone to the weight, joined
            by dots; numbers index lists.
        shape: tuple of int, of the part of the weight.
        inputs: int, how many leading axes of the part are input features, where
            the tensor is a matrix `[outputs, inputs]` as `torch.nn.Linear` has it.
            0 where the tensor's values lie in the weight's own order.
        tensor_shape: tuple of int or None, of the part of the tensor where
            `inputs` is 0; None for `shape`.
        rotary: int, how many of the last axis' trailing features are rotated in
            neighbouring pairs by the checkpoint's model, which are the two halves
            `(i, i + rotary / 2)` in ours.
        index: int or None, where in the weight's first axis the part lies; None
            for the whole weight.
        row: int or None, where in the tensor's first axis the part begins; None
            for the whole tensor.
        stacked: int: the tensor is this many matrices of one shape, and `row` counts
            the rows of all of them; 0 for a tensor that is not such a stack.
        exact: bool, kept in float32 by an export in any dtype.
    """

    name: str
    path: str
    shape: tuple
    inputs: int = 0
    tensor_shape: tuple | None = None
    rotary: int = 0
    index: int | None = None
    row: int | None = None
    stacked: int = 0
    exact: bool = False

    @property
    def part_shape(self):
        """The shape of the part of the tensor."""
        if self.inputs:
            outputs, inputs = self.shape[self.inputs :], self.shape[: self.inputs]
            return (math.prod(outputs), math.prod(inputs))
        return self.shape if self.tensor_shape is None else self.tensor_shape

    def to_weight(self, part):
        """The part of the weight, as a view of `part` where that is possible."""
        if self.inputs:
            part = part.T
        part = part.reshape(self.shape)
        return self._reorder(part, self._pairs_to_halves)

    def to_tensor(self, part):
        """The part of the tensor: the inverse of `to_weight`."""
        part = self._reorder(part, np.argsort(self._pairs_to_halves))
        if self.inputs:
            return part.reshape(self.part_shape[::-1]).T
        return part.reshape(self.part_shape)

    @property
    def _pairs_to_halves(self):
        size = self.shape[-1]
        start = size - self.rotary
        rotated = np.arange(start, size)
        return np.concatenate([np.arange(start), rotated[::2], rotated[1::2]])

    def _reorder(self, part, order):
        return part[..., order] if self.rotary else part


class Table:
    """The entries of one model, with what all of them need to be built.

    Args:
        settings: dict, the settings of a backbone.
    """

    def __init__(self, settings):
        self.settings = settings
        self.entries = []

    def add(self, name, path, shape, **kwargs):
        """Adds an `Entry`."""
        self.entries.append(Entry(name, path, tuple(shape), **kwargs))

    def norm(self, name, path):
        """Adds a normalization over the features."""
        scale = "scale" if self.settings["norm"] == "rms" else "gamma"
        self.add(f"{name}.weight", f"{path}.{scale}", (self.settings["hidden_dim"],))

    def linear(self, name, path, inputs, outputs, bias=False, **kwargs):
        """Adds a projection between given axes, `[*inputs, *outputs]` in ours."""
        self.add(
            f"{name}.weight",
            f"{path}.kernel",
            (*inputs, *outputs),
            inputs=len(inputs),
            **kwargs,
        )
        if bias:
            shape = (math.prod(outputs),)
            self.add(
                f"{name}.bias", f"{path}.bias", outputs, tensor_shape=shape, **kwargs
            )


def tensors(entries):
    """The whole tensors that entries take their parts from, in their order.

    Returns:
        dict of name to `(shape, exact)`.
    """
    found, stacks = {}, {}
    for entry in entries:
        shape = entry.part_shape
        if entry.row is not None:
            rows = entry.row + shape[0]
            if entry.name in found:
                rows = max(rows, found[entry.name][0][0])
            shape = (rows, *shape[1:])
        found[entry.name] = (shape, entry.exact)
        stacks[entry.name] = entry.stacked
    for name, count in stacks.items():
        if count:
            (rows, *columns), exact = found[name]
            found[name] = ((count, rows // count, *columns), exact)
    return found


def weights(entries):
    """Entries by the weight that they are parts of, in their order.

    Returns:
        dict of path to a list of `Entry`.
    """
    found = {}
    for entry in entries:
        found.setdefault(entry.path, []).append(entry)
    return found


def find_weight(backbone, path):
    """The variable that a path leads to."""
    found = backbone
    for step in path.split("."):
        found = found[int(step)] if step.isdigit() else getattr(found, step)
    return found


def weight_shape(entries):
    """The shape of the weight that `entries` are all the parts of."""
    first = entries[0]
    return first.shape if first.index is None else (len(entries), *first.shape)
