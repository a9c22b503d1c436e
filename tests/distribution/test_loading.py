"""What devices hold while a model's weights are read into its part of each."""

import collections
import gc
import math

import jax
import keras
import pytest

from keras_moe.distribution import for_preset
from keras_moe.models import MoEBackbone

SETTINGS = {
    "vocabulary_size": 256,
    "num_layers": 4,
    "hidden_dim": 32,
    "num_query_heads": 8,
    "num_key_value_heads": 8,
    "num_experts": 8,
    "top_k": 2,
    "expert_dim": 128,
}


def held():
    """Bytes of all arrays that live, by device."""
    found = collections.Counter()
    for array in jax.live_arrays():
        part = math.prod(array.sharding.shard_shape(array.shape))
        for device in array.sharding.device_set:
            found[device.id] += part * array.dtype.itemsize
    return found


@pytest.fixture
def peak(monkeypatch):
    """The most that each device holds wherever a variable is made or set."""
    most = collections.Counter()

    def watched(method):
        def watch(*args, **kwargs):
            before = held()
            result = method(*args, **kwargs)
            for now in (before, held()):
                for device, size in now.items():
                    most[device] = max(most[device], size)
            return result

        return watch

    for name in ("assign", "_direct_assign", "_initialize_with_initializer"):
        monkeypatch.setattr(
            keras.Variable, name, watched(getattr(keras.Variable, name))
        )
    return most


@pytest.mark.parametrize("experts_over", [2, 8])
@pytest.mark.parametrize("source", ["preset", "checkpoint"])
def test_no_device_holds_more_than_its_share_and_a_variable(
    source, experts_over, tmp_path, peak
):
    backbone = MoEBackbone(**SETTINGS)
    if source == "preset":
        backbone.save_to_preset(str(tmp_path / "model"))
    else:
        backbone.export_to_transformers(tmp_path / "model")
    whole = 4 * backbone.count_params()
    largest = 4 * max(math.prod(weight.shape) for weight in backbone.weights)
    del backbone
    gc.collect()

    keras.distribution.set_distribution(
        for_preset(SETTINGS, expert_parallel=experts_over)
    )
    others = held()
    peak.clear()
    backbone = MoEBackbone.from_preset(str(tmp_path / "model"))
    share = held() - others
    for device in jax.devices():
        assert share[device.id] < 1.05 * whole / len(jax.devices())
        assert peak[device.id] - others[device.id] <= 1.2 * share[device.id] + largest
    # Were the model whole somewhere, this would not hold.
    assert 1.2 * max(share.values()) + largest < whole / 2
    assert max(peak.values()) > max(share.values())
    del backbone
