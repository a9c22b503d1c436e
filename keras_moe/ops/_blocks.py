"""How the formulations by blocks cut the rows, alike on JAX and TensorFlow."""

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
