"""How the formulations by blocks cut the rows, alike on JAX and TensorFlow."""

_OF_MEAN = (0.25, 0.5, 0.75, 1, 1.25, 2)
_LARGEST = 512
_WITHOUT_MEAN = (16, 32, 64, 128, 256)


def block_sizes(num_rows, num_groups):
    """Rows of a block, ascending.

    Each block copies the matrices of its group, which costs about as much as
    computing some 40 rows. So sizes are chosen around the mean of a group's rows:
    one just above it, so that an even load takes a block a group, and enough
    below it that a short group wastes little.

    Args:
        num_rows: int, or None where it is not known while tracing.
        num_groups: int.
    """
    if num_rows is None:
        return _WITHOUT_MEAN
    mean = max(num_rows / num_groups, 1)
    return tuple(sorted({min(_rounded(mean * f), _LARGEST) for f in _OF_MEAN}))


def _rounded(size):
    step = 1 if size <= 8 else 8 if size <= 64 else 32
    return int(-(-size // step) * step)
