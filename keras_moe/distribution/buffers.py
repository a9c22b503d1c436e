"""The size of the buffers in which rows travel between devices.

N  rows of a device: its tokens times K     n  devices of the expert axis
R  rows that a device sends each other one in a round
"""

import math

# Rows over the mean that fit in one round: loads differ by about as much in a
# trained model, and what exceeds it costs a second round and not an error.
SLACK = 1.25
_FEW = 8


def rows_a_round(num_rows, size, bound=None):
    """R: how many rows a device sends each other one in a round.

    Args:
        num_rows: int, N.
        size: int, n.
        bound: int or None: what capacity lets one device send another at most.

    Returns:
        `(rows, once)`: int, R, and whether one round suffices for any routing.
    """
    if bound is not None:
        return min(bound, num_rows), True
    rows = max(math.ceil(SLACK * num_rows / size), min(_FEW, num_rows))
    return min(rows, num_rows), rows >= num_rows
