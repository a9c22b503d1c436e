"""How the formulations by blocks cut the rows, alike on JAX and TensorFlow.

N  rows     E  groups
"""

from typing import Any, NamedTuple

from keras import ops

_OF_MEAN = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1, 9 / 8, 5 / 4, 3 / 2, 2)
_LARGEST = 512
_WITHOUT_MEAN = (16, 32, 64, 128, 256)


def block_sizes(num_rows, num_groups):
    """Rows of a block, ascending.

    To visit a block costs as much as some 20 rows more (on a CPU, whatever the
    matrices' sizes: they are copied, and a product of few rows is slow), so the
    rows of a group belong in one block, and one a little too large does no harm.
    So the sizes lie on both sides of the mean, closest just above it, where the
    groups of an even load drawn at random fall. Each is a loop to compile. None
    is below 4 rows or above the number of rows.

    Args:
        num_rows: int, or None where it is not known while tracing.
        num_groups: int.
    """
    if num_rows is None:
        return _WITHOUT_MEAN
    mean = num_rows / num_groups
    largest = min(_LARGEST, num_rows)
    return tuple(sorted({min(_rounded(mean * f), largest) for f in _OF_MEAN}))


def _rounded(size):
    for step in (4, 8, 16):
        if size <= step:
            return step
    step = 16 if size <= 256 else 32
    return int(-(-size // step) * step)


class Sweep(NamedTuple):
    """All blocks of one size, to be visited by one loop.

    Args:
        size: int, rows of a block.
        counts: int32 tensor `[E]`, how many of them each group has.
        first_rows: int32 tensor `[E]`, where the first of them begins.
        ends: int32 tensor `[E]`, where the group's rows end.
        first: whether each comes first in its group.
    """

    size: int
    counts: Any
    first_rows: Any
    ends: Any
    first: bool


def sweeps(group_sizes, num_rows):
    """The loops that together visit every row of every group.

    A group is cut into blocks of the largest size, and what remains, at least one
    row, goes into one block of the smallest size that holds it. That one comes
    first.

    Args:
        group_sizes: int32 tensor `[E]`.
        num_rows: int, or None where it is not known while tracing.

    Returns:
        A list of `Sweep`, in the order in which they must run.
    """
    sizes = block_sizes(num_rows, group_sizes.shape[0])
    ends = ops.cumsum(group_sizes)
    starts = ends - group_sizes
    largest = sizes[-1]
    whole = ops.maximum(group_sizes - 1, 0) // max(largest, 1)
    rest = group_sizes - whole * largest

    found, smaller = [], 0
    for size in sizes:
        if size:
            counts = ops.cast((rest > smaller) & (rest <= size), "int32")
            found.append(Sweep(size, counts, starts + whole * largest, ends, True))
        smaller = size
    if num_rows is None or largest < num_rows:
        found.append(Sweep(largest, whole, starts, ends, False))
    return found


def block_at(sweep, i, num_rows):
    """Where block `i` of a sweep lies: `group, start, inside`.

    Its memory begins at `start`, and `inside`, bool `[size]`, says which of its rows
    are the block's: it may reach into the next group, and where no rows are left,
    begin in what comes before it.
    """
    last = ops.cumsum(sweep.counts)
    group = ops.sum(ops.cast(last <= i, "int32"))
    place = i - (ops.take(last, group) - ops.take(sweep.counts, group))
    row = ops.take(sweep.first_rows, group) + place * sweep.size
    start = ops.minimum(row, num_rows - sweep.size)
    index = start + ops.arange(sweep.size, dtype="int32")
    return group, start, (index >= row) & (index < ops.take(sweep.ends, group))
