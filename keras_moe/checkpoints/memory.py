"""Whether there is room for a model, asked before anything is allocated."""

import os
import pathlib

import keras

_LIMITS = (  # of the control group this process is in: version 2, version 1
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)
_CONTROL_GROUPS = pathlib.Path("/sys/fs/cgroup")


def check_room(settings, dtype):
    """Raises where a model's weights need more memory than there is.

    Nothing is asked of a model spread over devices by `keras.distribution`, or
    where free memory is not known.

    Args:
        settings: dict of a backbone.
        dtype: its dtype policy, or None for the global one.

    Raises:
        MemoryError: quoting the plan: parameters, what they take and what is there.
    """
    if keras.distribution.distribution() is not None:
        return
    # Plans are made of models, and models of checkpoints.
    from keras_moe.planning import plan

    weights = keras.dtype_policies.get(dtype).variable_dtype
    planned = plan(settings, sequence_length=1, dtype=weights)
    room = available_bytes()
    if room is not None and planned.weight_bytes > room:
        raise MemoryError(
            f"The model's {planned.total_parameters / 1e9:,.4g} billion parameters "
            f"take {_gigabytes(planned.weight_bytes)} in {weights}, and "
            f"{_gigabytes(room)} of memory are available. Choose a smaller `dtype`, "
            "such as 'bfloat16', or a larger machine."
        )


def available_bytes():
    """Memory that can still be taken, or None where that cannot be known."""
    rooms = (_machine_room(), _control_group_room())
    return min((room for room in rooms if room is not None), default=None)


def _machine_room():
    try:
        import psutil
    except ImportError:
        pass
    else:
        return psutil.virtual_memory().available
    try:
        for line in pathlib.Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


def _control_group_room():
    """What the container or job that this process runs in may still take."""
    for limit, usage, statistics, reclaimable in _LIMITS:
        try:
            limit = int((_CONTROL_GROUPS / limit).read_text())
            usage = int((_CONTROL_GROUPS / usage).read_text())
            text = (_CONTROL_GROUPS / statistics).read_text()
        except (OSError, ValueError):  # no such group, or "max"
            continue
        cached = dict(line.split() for line in text.splitlines()).get(reclaimable, 0)
        return max(limit - usage + int(cached), 0)
    return None


def _gigabytes(count):
    return f"{count / 1e9:,.3g} GB"
