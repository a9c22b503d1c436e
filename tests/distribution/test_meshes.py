"""The meshes that `for_preset` chooses, and what it refuses."""

import keras
import pytest

import keras_moe
from keras_moe.distribution import for_preset
from tests.models.small_models import SETTINGS

EIGHT = {**SETTINGS, "num_experts": 8, "num_query_heads": 4, "num_key_value_heads": 2}


def sizes(distribution):
    mesh = distribution.device_mesh
    return dict(zip(mesh.axis_names, mesh.shape, strict=True))


@pytest.mark.parametrize(
    "experts,arguments,expected",
    [
        (8, {}, {"expert": 8}),
        (16, {}, {"expert": 8}),
        (4, {}, {"batch": 2, "expert": 4}),
        (6, {}, {"batch": 4, "expert": 2}),
        (7, {}, {"batch": 8, "expert": 1}),
        (6, {"devices": 6}, {"expert": 6}),
        (8, {"devices": 1}, {"expert": 1}),
        (8, {"expert_parallel": 2}, {"batch": 4, "expert": 2}),
        (8, {"model_parallel": 2}, {"expert": 4, "model": 2}),
        (2, {"model_parallel": 2}, {"batch": 2, "expert": 2, "model": 2}),
    ],
)
def test_the_axes(experts, arguments, expected):
    distribution = for_preset({**EIGHT, "num_experts": experts}, **arguments)
    assert sizes(distribution) == expected
    for size in expected.values():
        assert str(size) in distribution.reason
    assert distribution.batch_axes == tuple(a for a in expected if a != "model")


def test_what_a_model_may_be_given_as():
    devices = keras.distribution.list_devices()[4:]
    by_name = for_preset("mixtral_8x7b", devices=devices)
    assert sizes(by_name) == {"expert": 4}
    assert by_name.device_mesh.devices.flatten().tolist() == devices
    switch = keras_moe.models.MoESeq2SeqBackbone.from_preset("switch_tiny_en")
    assert sizes(for_preset(switch)) == {"expert": 8}


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"devices": 9}, "at most 8.*devices=9"),
        ({"devices": 0}, "`devices`.*0"),
        ({"devices": ["cpu:0", "gpu:7"]}, "gpu:7"),
        ({"expert_parallel": 3}, "8 devices.*expert_parallel=3"),
        ({"expert_parallel": 0}, "`expert_parallel`.*0"),
        ({"devices": 3, "expert_parallel": 3}, "8 num_experts.*expert_parallel=3"),
        ({"model_parallel": 3}, "8 devices.*model_parallel=3"),
        ({"model_parallel": 8}, "4 num_query_heads.*model_parallel=8"),
        ({"model_parallel": 4}, "2 num_key_value_heads.*model_parallel=4"),
    ],
)
def test_what_does_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        for_preset(EIGHT, **arguments)


def test_fewer_devices_than_a_mesh():
    with pytest.raises(ValueError, match=r"\(16,\).*\(8,\)"):
        keras.distribution.DeviceMesh((16,), ["expert"])
