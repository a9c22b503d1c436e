"""A mesh for a model and a number of devices.

E  experts      n  devices
"""

import math

import keras

from keras_moe import checks
from keras_moe.distribution.expert_parallel import ExpertParallel
from keras_moe.distribution.layouts import layout_map
from keras_moe.distribution.support import check_supported


def for_preset(
    preset,
    devices=None,
    expert_parallel=None,
    model_parallel=1,
    auto_shard_dataset=True,
):
    """The distribution of a model over devices, for `keras.distribution`.

    The mesh has the axes `"batch"`, `"expert"` and `"model"`, those of one device
    left out but for the expert axis. Experts lie over as many devices as divide both
    E and what `model_parallel` leaves of the devices; the batch lies over the expert
    and the batch axis; what they leave whole, attention heads, vocabulary and the
    hidden features of experts, lies over the model axis. Weights and the optimizer's
    state are spread over the batch axis as well, to be gathered where they are used.

    Args:
        preset: as for `keras_moe.plan`: a name, a folder, settings, or a model.
        devices: None for all, int, or a list of names as
            `keras.distribution.list_devices` gives them.
        expert_parallel: int or None: the size of the expert axis, which divides E.
        model_parallel: int, the size of the model axis, which divides the heads and the
            hidden features of experts.
        auto_shard_dataset: see `keras.distribution.ModelParallel`.

    Returns:
        An `ExpertParallel`; its `reason` says why the mesh has its shape.

    Raises:
        ValueError: on a backend other than JAX, where Keras does not distribute, where
            there are fewer devices than asked for, and where a size divides not what
            it must.

    Example:

    ```python
    distribution = keras_moe.distribution.for_preset("mixtral_8x7b")
    keras.distribution.set_distribution(distribution)
    model = keras_moe.models.MoECausalLM.from_preset("mixtral_8x7b")
    ```
    """
    check_supported("for_preset")
    # Plans are made of models, and models know of distributions.
    from keras_moe.planning import stacks_of

    devices = _devices(devices)
    checks.at_least("model_parallel", model_parallel, 1)
    sizes, reason = choose_sizes(
        stacks_of(preset), len(devices), expert_parallel, model_parallel
    )
    mesh = keras.distribution.DeviceMesh(tuple(sizes.values()), [*sizes], devices)
    return ExpertParallel(
        layout_map=layout_map(mesh),
        reason=reason,
        auto_shard_dataset=auto_shard_dataset,
    )


def choose_sizes(stacks, devices, expert_parallel=None, model_parallel=1):
    """The axes that `for_preset` gives a mesh, and why.

    Args:
        stacks: the settings of each stack of blocks.
        devices: int.
        expert_parallel: as for `for_preset`.
        model_parallel: as for `for_preset`.

    Returns:
        `(sizes, reason)`: a dict of the axes' names to their sizes, and a str.
    """
    experts = math.gcd(*(stack["num_experts"] for stack in stacks))
    _check_divides("model_parallel", model_parallel, devices, "devices")
    for stack in stacks:
        for name in ("num_query_heads", "num_key_value_heads", "expert_dim"):
            if stack.get(name):
                _check_divides("model_parallel", model_parallel, stack[name], name)
    rest = devices // model_parallel
    reason = f"{devices} devices"
    if model_parallel > 1:
        reason += f", {model_parallel} of them for the model axis, as asked for"
    if expert_parallel is None:
        expert_parallel = math.gcd(rest, experts) if experts else 1
        reason += (
            f"; {expert_parallel} for the expert axis, the most that divide both "
            f"{rest} devices and {experts} experts"
        )
    else:
        checks.at_least("expert_parallel", expert_parallel, 1)
        _check_divides("expert_parallel", expert_parallel, rest, "devices")
        _check_divides("expert_parallel", expert_parallel, experts, "num_experts")
        reason += f"; {expert_parallel} for the expert axis, as asked for"
    batch = rest // expert_parallel
    reason += f"; {batch} for the batch axis, what remains"
    sizes = {"batch": batch, "expert": expert_parallel, "model": model_parallel}
    sizes = {name: n for name, n in sizes.items() if n > 1 or name == "expert"}
    return sizes, reason


def _devices(devices):
    there = keras.distribution.list_devices()
    if devices is None:
        return there
    if isinstance(devices, int):
        checks.at_least("devices", devices, 1)
        if devices > len(there):
            raise ValueError(
                f"`devices` must be at most {len(there)}, as many as there are. "
                f"Received: devices={devices}"
            )
        return there[:devices]
    if unknown := [device for device in devices if device not in there]:
        raise ValueError(
            f"`devices` must be among {there}. Received: {unknown} in devices={devices}"
        )
    return list(devices)


def _check_divides(name, value, whole, what):
    if whole % value:
        raise ValueError(
            f"`{name}` must divide the {whole} {what}. Received: {name}={value}"
        )
