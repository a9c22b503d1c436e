"""Plans for meshes of devices that are not there, against built models and by hand.

S  sequence length      D  `hidden_dim`     E  experts      T  tokens of a device
"""

import dataclasses
import itertools
import json
import math
import re

import keras
import pytest

import keras_moe
from keras_moe.distribution import traffic
from keras_moe.models import MoEBackbone, MoESeq2SeqBackbone
from tests.models import small_models

THREE_AXES = {"batch": 4, "expert": 2, "model": 2}


def planned(settings, mesh, batch_size=8, sequence_length=6, **arguments):
    arguments = {"dtype": "float32", **arguments}
    plan = keras_moe.plan(settings, batch_size, sequence_length, mesh=mesh, **arguments)
    return plan.device


def device_mesh(sizes):
    names = [f"cpu:{i}" for i in range(math.prod(sizes.values()))]
    return keras.distribution.DeviceMesh(tuple(sizes.values()), [*sizes], names)


def raises(*parts):
    return pytest.raises(ValueError, match="(?s)" + ".*".join(map(re.escape, parts)))


# --- Memory ---


def stored_bytes(weights, mesh):
    """Those of a built model's weights on a device, by its layout map."""
    layouts = MoEBackbone.get_layout_map(mesh)
    sizes = dict(zip(mesh.axis_names, mesh.shape, strict=True))
    total = 0
    for weight in weights:
        parts = 1
        if (layout := layouts[weight.path]) is not None:
            for axes in layout.fitted(weight.shape, weight.path).axes:
                for axis in [axes] if isinstance(axes, str) else axes or ():
                    parts *= sizes[axis]
        assert math.prod(weight.shape) % parts == 0
        total += math.prod(weight.shape) // parts * 4
    return total


@pytest.mark.parametrize("sizes", [{"expert": 4}, {"batch": 16}, THREE_AXES], ids=str)
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"tied_embeddings": True, "attention_bias": "all", "query_key_norm": "full"},
        {"norm": "layer", "positions": "relative_bias", "expert_gated": False},
        {**small_models.LATENT, "query_rank": 8, "extra_dense": True, "moe_every": 2},
        {"shared_expert_gate": True, "selection_bias": True, "num_shared_experts": 2},
    ],
    ids=str,
)
def test_a_device_holds_its_part_of_a_built_model(overrides, sizes):
    settings = {**small_models.SETTINGS, **overrides}
    backbone = MoEBackbone(**settings, dtype="float32")
    mesh = device_mesh(sizes)
    device = planned(settings, sizes, 16)
    assert device.weight_bytes == stored_bytes(backbone.weights, mesh)
    trained = stored_bytes(backbone.trainable_weights, mesh)
    assert (device.gradient_bytes, device.optimizer_bytes) == (trained, 2 * trained)
    assert planned(settings, mesh, 16) == device


def test_a_device_holds_its_part_of_an_encoder_decoder():
    settings = {
        **small_models.SEQ2SEQ,
        "shared_embeddings": False,
        "tied_embeddings": False,
    }
    backbone = MoESeq2SeqBackbone(**settings, dtype="float32")
    device = planned(settings, THREE_AXES)
    mesh = device_mesh(THREE_AXES)
    assert device.weight_bytes == stored_bytes(backbone.weights, mesh)


def test_experts_and_their_state_fall_with_the_devices():
    settings = {**small_models.SETTINGS, "num_experts": 64, "expert_dim": 512}
    of_one = planned(settings, {"expert": 1})
    for count in (2, 8, 16):
        device = planned(settings, {"expert": count}, batch_size=64)
        # What lies whole is small: the router, norms.
        for name in ("weight_bytes", "gradient_bytes", "optimizer_bytes"):
            assert getattr(device, name) * count == pytest.approx(
                getattr(of_one, name), rel=0.1
            )
        assert device.training_bytes < of_one.training_bytes


def test_activations_of_a_batch_axis_fall_with_the_devices():
    plan = keras_moe.plan(small_models.SETTINGS, 8, 6)
    device = planned(small_models.SETTINGS, {"batch": 8}, dtype="bfloat16")
    assert device.activation_bytes * 8 == plan.activation_bytes


def test_one_device_plans_as_without_a_mesh():
    plan = keras_moe.plan(small_models.SETTINGS, 8, 6)
    device = planned(small_models.SETTINGS, {"expert": 1}, dtype="bfloat16")
    assert device.training_bytes == plan.training_bytes
    assert device.flops == 3 * plan.flops_per_token * 8 * 6
    assert device.transfers == ()
    assert device.step_seconds(2.0, 1.0) == device.flops / 2.0


# --- Bytes sent ---


def test_bytes_of_mixtral_by_hand():
    """Of the kinds that matter, on 4 x 8 devices, from the published sizes."""
    L, D, F, K, V, S, B = 32, 4096, 14336, 2, 32000, 1024, 64
    found = {
        (t.kind, t.purpose, t.axes): t.sent_bytes
        for t in keras_moe.plan(
            "mixtral_8x7b", B, S, mesh={"batch": 4, "expert": 8}
        ).device.transfers
    }
    T = B * S // 32
    # One expert of each layer, gathered over 4, in bfloat16.
    kernels = L * 3 * D * F * 2
    assert found.pop(("all_gather", "weights", ("batch",))) == kernels * 3 // 4
    assert found.pop(("reduce_scatter", "gradients", ("batch",))) == kernels * 3 // 4
    # Attention and the table of the logits, gathered over 32.
    others = (L * (2 * D * 32 * 128 + 2 * D * 8 * 128) + D * V) * 2
    both = ("batch", "expert")
    assert found.pop(("all_gather", "weights", both)) == others * 31 // 32
    assert found.pop(("reduce_scatter", "gradients", both)) == others * 31 // 32
    # Rows there and back, rows and gradients there, gradients back.
    rows = L * 5 * T * K * D * 2
    assert found.pop(("all_to_all", "rows", ("expert",))) == rows * 7 // 8
    counts = L * 8 * 8 * 4
    sent = found.pop(("all_reduce", "expert counts", ("expert",)))
    assert sent == 2 * counts * 7 // 8
    # Two norms a layer and one more; routers in float32.
    whole = (2 * L + 1) * D * 2 + L * D * 8 * 4
    assert found.pop(("all_reduce", "gradients", both)) == 2 * whole * 31 // 32
    lookup = found.pop(("all_to_all", "embeddings", both))
    assert lookup == 2 * T * D * 2 * 31 // 32
    ids = found.pop(("all_gather", "embeddings", both))
    assert ids == B * S * 4 * 31 // 32
    load = found.pop(("all_reduce", "statistics", both))
    assert load == 2 * L * 8 * 4 * 31 // 32
    assert not found


def test_bytes_by_kind_and_purpose_are_all_bytes():
    device = planned(small_models.SETTINGS, THREE_AXES)
    for field in ("kind", "purpose"):
        assert sum(device.sent_by(field).values()) == device.sent_bytes > 0
    assert set(device.sent_by()) == set(traffic.KINDS)


def test_rounds_send_rows_once_more_than_capacity():
    def rows(**overrides):
        settings = {**small_models.SETTINGS, **overrides}
        return planned(settings, {"expert": 4}).sent_by("purpose")["rows"]

    even = rows(dispatch="capacity", capacity_factor=1.0)
    assert rows() == even * 5 // 4
    assert rows(dispatch="capacity", capacity_factor=0.5) == even // 2
    assert rows(recompute=True) == even * 7 // 4


def ring_all_gather(parts):
    """What each of n devices sends until all hold all parts, in a ring."""
    n = len(parts)
    held, sent = [{i} for i in range(n)], [0] * n
    for step in range(n - 1):
        for device in range(n):
            part = (device - step) % n
            assert part in held[device]
            sent[device] += parts[part]
        for device in range(n):
            held[(device + 1) % n].add((device - step) % n)
    assert all(len(parts) == n for parts in held)
    return sent


@pytest.mark.parametrize("count", [2, 4, 16])
def test_an_all_gather_sends_what_a_ring_does(count):
    settings = {**small_models.SETTINGS, "tied_embeddings": True, "num_layers": 1}
    settings |= {"dense_first_layers": 0, "num_shared_experts": 0}
    transfers = planned(settings, {"batch": count}, 16).transfers
    gathered = {t.purpose: t.sent_bytes for t in transfers if t.kind == "all_gather"}
    elements = 50 * 16 + 2 * 16 * 4 * 4 + 2 * 16 * 2 * 4 + 3 * 4 * 16 * 24
    sent = ring_all_gather([elements * 4 / count] * count)
    assert {gathered["weights"]} == set(sent)


@pytest.mark.parametrize("node", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("axes", [("batch",), ("expert",), ("batch", "model")], ids=str)
def test_devices_that_share_a_node(axes, node):
    sizes = {"batch": 2, "expert": 4, "model": 2}
    names, shape = list(sizes), tuple(sizes.values())
    places = [*itertools.product(*map(range, shape))]
    # Those that differ from the first device in the collective's axes alone.
    group = [
        index
        for index, place in enumerate(places)
        if all(i == 0 or names[a] in axes for a, i in enumerate(place))
    ]
    expected = sum(index < node for index in group)
    assert traffic.devices_in_node(sizes, axes, node) == expected


def test_bytes_between_nodes():
    def between(kind, n, f, sent):
        return traffic.Transfer(kind, "", (), n, sent).bytes_between_nodes(f)

    # 8 devices in 2 nodes, a byte from each to each: 4 of 7 go abroad.
    assert between("all_to_all", 8, 4, 7) == 4
    # All-gather of 8 bytes: half of it must come into each node, by 4 devices.
    assert between("all_gather", 8, 4, 7) == 1
    assert between("all_reduce", 8, 4, 14) == 2
    assert between("reduce_scatter", 8, 8, 7) == 0
    assert between("reduce_scatter", 8, 1, 7) == 7


# --- Time ---


def test_a_step_takes_the_longest_of_work_and_links():
    device = planned(small_models.SETTINGS, THREE_AXES)
    fast = 1e30
    assert device.step_seconds(10.0, fast) == device.flops / 10
    assert device.step_seconds(fast, 10.0) == device.sent_bytes / 10
    abroad = device.bytes_between_nodes(4)
    assert 0 < abroad < device.sent_bytes
    assert device.step_seconds(fast, fast, 4, 10.0) == abroad / 10
    assert device.step_seconds(fast, 10.0, 4, fast) == pytest.approx(
        (device.sent_bytes - abroad) / 10
    )
    assert device.bytes_between_nodes(16) == 0
    assert device.bytes_between_nodes(1) == device.sent_bytes


def test_work_is_shared_by_all_devices():
    settings = {**small_models.SETTINGS, "dispatch": "capacity", "capacity": 2}
    plan = keras_moe.plan(settings, 8, 6, mesh=THREE_AXES)
    assert plan.device.flops == 3 * plan.flops_per_token * 8 * 6 // 16
    # Rounds compute their experts anew: one mixture of K = 2 gated experts.
    dropless = planned(small_models.SETTINGS, THREE_AXES)
    anew = 2 * 2 * 3 * 16 * 24
    assert dropless.flops == plan.device.flops + anew * 8 * 6 // 16


@pytest.mark.parametrize(
    "arguments,parts",
    [
        ((0.0, 1.0), ["`flops_per_second` must be", "flops_per_second=0.0"]),
        ((1.0, -1.0), ["`bytes_per_second` must be", "bytes_per_second=-1.0"]),
        ((1.0, 1.0, 8), ["go together", "network_bytes_per_second=None"]),
        ((1.0, 1.0, 0, 1.0), ["`node_devices` must be", "node_devices=0"]),
        ((1.0, 1.0, 8, 0.0), ["`network_bytes_per_second` must be"]),
    ],
    ids=str,
)
def test_bad_rates(arguments, parts):
    with raises(*parts):
        planned(small_models.SETTINGS, {"expert": 2}).step_seconds(*arguments)


# --- Large ---


def test_the_largest_presets_on_thousands_of_devices():
    for name, mesh in [
        ("deepseek_v3", {"batch": 8, "expert": 256, "model": 2}),
        ("switch_c_2048", {"batch": 2, "expert": 2048}),
    ]:
        plan = keras_moe.plan(name, 4096, 512, mesh=mesh)
        device = plan.device
        assert device.devices == 4096
        assert plan.weight_bytes / 4096 <= device.weight_bytes < plan.weight_bytes / 64
        assert json.loads(json.dumps(plan.to_dict()))["device"]["devices"] == 4096
        assert "each of 4096 devices" in str(plan)


# --- Bad input ---


@pytest.mark.parametrize(
    "overrides,mesh,parts",
    [
        ({}, {"batch": 3}, ["3 devices", "`batch_size`", "batch_size=8"]),
        ({}, {"expert": 8}, ["'expert'", "8 devices", "dimension 0", "4"]),
        ({}, {"batch": 2, "model": 4}, ["'model'", "4 devices", "attention/key", "2"]),
        ({"expert_dim": 25}, {"batch": 2, "model": 2}, ["'model'", "experts", "25"]),
        ({}, {"batch": 2, "pipeline": 2}, ["'batch', 'expert', 'model'", "'pipeline'"]),
        ({}, {"batch": 0}, ["mesh['batch']", "at least 1", "0"]),
        ({}, {"batch": 2.0}, ["mesh['batch']", "integer", "2.0"]),
        ({}, {"model": 2}, ["an axis for the batch", "('model',)"]),
        ({}, {}, ["`mesh` must have an axis"]),
        ({}, "batch=2", ["`mesh` must be", "'batch=2'"]),
    ],
    ids=str,
)
def test_bad_meshes(overrides, mesh, parts):
    with raises(*parts):
        planned({**small_models.SETTINGS, **overrides}, mesh)


def test_bad_platform():
    with raises("`platform` must be one of 'gpu', 'tpu', 'cpu'", "platform='npu'"):
        planned(small_models.SETTINGS, {"batch": 2}, platform="npu")


def test_figures_as_a_dict():
    plan = keras_moe.plan(small_models.SETTINGS, 8, 6, mesh=THREE_AXES)
    found = json.loads(json.dumps(plan.to_dict()))["device"]
    assert found["mesh"] == THREE_AXES
    assert found["training_bytes"] == plan.device.training_bytes
    assert sum(t["sent_bytes"] for t in found["transfers"]) == found["sent_bytes"]
    without = dataclasses.replace(plan, device=None).to_dict()
    assert "device" not in without
    assert {**without, "device": found} == json.loads(json.dumps(plan.to_dict()))
