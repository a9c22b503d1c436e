"""Timing by turns: what is compared runs one after the other, again and again.

A machine whose speed drifts then slows all alike, and ratios of medians survive.
"""

import time

import numpy as np


def by_turns(programs, repeats, warm_up=2):
    """Seconds of each run.

    Args:
        programs: dict of name to a callable of no arguments that runs to the end.
        repeats: int, runs of each.
        warm_up: int, runs of each before, which compile and fill caches.

    Returns:
        A dict of name to an array `[repeats]`.
    """
    for program in programs.values():
        for _ in range(warm_up):
            program()
    seconds = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            start = time.perf_counter()
            program()
            seconds[name].append(time.perf_counter() - start)
    return {name: np.array(runs) for name, runs in seconds.items()}
