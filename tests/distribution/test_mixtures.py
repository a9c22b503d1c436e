"""What a mixture on a mesh must not do otherwise than on one device, or silently."""

import collections
import re

import jax
import keras
import numpy as np
import pytest

from keras_moe.distribution import ExpertParallel, _jax
from keras_moe.layers import MixtureOfExperts
from keras_moe.models import MoEBackbone
from tests.distribution.meshes import distribute, mesh

EXPERTS, FEATURES = 8, 16


def built(name, **settings):
    """A mixture on a mesh, or on one device where that is None."""
    keras.distribution.set_distribution(None)
    if name is not None:
        distribute(name)
    keras.utils.set_random_seed(0)
    mixture = MixtureOfExperts(EXPERTS, 8, **settings)
    mixture.build((None, 4, FEATURES))
    return mixture


def inputs(*shape):
    # Multiples of 1/8 that half precision holds exactly.
    x = np.random.default_rng(0).integers(-16, 17, shape) / 8
    return x.astype("float32")


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16"])
def test_routers_keep_their_precision(dtype):
    """As Switch has it, section 2.4: routing in float32 whatever else is half."""
    x = inputs(8, 16, FEATURES)
    on_one, on_many = (
        built(name, dtype=dtype)(x, return_statistics=True)[1]
        for name in (None, "batch_expert_model")
    )
    for name, expected in on_one._asdict().items():
        got = getattr(on_many, name)
        np.testing.assert_allclose(got, expected, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", [None, "expert"])
def test_a_bias_less_than_half_precision_decides(name):
    mixture = built(
        name,
        dtype="mixed_bfloat16",
        top_k=1,
        scores="sigmoid",
        selection_bias=True,
        kernel_initializer="zeros",
    )
    bias = np.full(EXPERTS, 0.5, "float32")
    bias[5] = 0.501  # in bfloat16 0.5
    mixture.router.selection_bias.assign(bias)
    _, statistics = mixture(inputs(8, 4, FEATURES), return_statistics=True)
    np.testing.assert_array_equal(statistics.assignments, 32 * (np.arange(8) == 5))


def test_parts_of_the_hidden_features_draw_their_own_dropout():
    mixture = built(
        "expert_model", top_k=1, expert_dropout=0.5, gated=False, activation="linear"
    )
    up, down = mixture.experts.kernels
    up.assign(np.full(up.shape, 1 / FEATURES))
    # Feature i of the outputs is hidden feature i.
    down.assign(np.broadcast_to(np.eye(8, FEATURES), down.shape))
    x = np.ones((32, 16, FEATURES), "float32")
    kept = np.asarray(mixture(x, training=True)).reshape(-1, FEATURES)[:, :8] > 0
    count = kept[:, :4].size
    # Half of them, give or take five standard deviations.
    assert abs(kept.mean() - 0.5) < 5 * 0.5 / np.sqrt(2 * count)
    equal = (kept[:, :4] == kept[:, 4:]).mean()
    assert abs(equal - 0.5) < 5 * 0.5 / np.sqrt(count)


@pytest.mark.parametrize("name", [None, "expert"])
def test_a_sequence_needs_one(name):
    mixture = built(
        name, dispatch="capacity", capacity_factor=1.0, capacity_group="sequence"
    )
    with pytest.raises(ValueError, match=r"rank 3.*inputs.shape=\(16, 16\)"):
        mixture(inputs(16, FEATURES))


@pytest.mark.parametrize("settings", [{}, {"capacity_factor": 1.25}], ids=str)
def test_a_step_of_accelerators_has_four_ragged_all_to_alls(settings, monkeypatch):
    """As lowered for them: this needs none."""
    if settings:
        settings = {"dispatch": "capacity", **settings}
    mixture = built("expert", **settings)
    monkeypatch.setattr(_jax, "_has_ragged", lambda mesh: True)

    def loss(weights, x):
        state = [v.value for v in mixture.non_trainable_variables]
        y, _ = mixture.stateless_call(weights, state, x)
        return (y**2).sum()

    step = jax.jit(jax.grad(loss, argnums=(0, 1)))
    weights = [v.value for v in mixture.trainable_variables]
    traced = step.trace(weights, inputs(16, 4, FEATURES))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    found = re.findall(r"ragged_all_to_all|stablehlo\.(?:all_to_all|all_gather)", text)
    assert collections.Counter(found) == {"ragged_all_to_all": 4}


def test_axes_may_have_other_names():
    devices = keras.distribution.list_devices()
    named = keras.distribution.DeviceMesh((2, 2, 2), ["dp", "ep", "tp"], devices)
    layout_map = MoEBackbone.get_layout_map(named, "tp", "dp", "ep")
    distribution = ExpertParallel(layout_map=layout_map)
    assert distribution.batch_axes == ("dp", "ep")
    assert distribution.num_model_replicas == 4


def test_one_axis_for_two_things_is_refused():
    with pytest.raises(ValueError, match="must differ.*expert_parallel_dim_name='mod"):
        MoEBackbone.get_layout_map(
            mesh("batch_model"), expert_parallel_dim_name="model"
        )


def test_another_mesh_than_it_was_built_on_is_refused():
    mixture = built("expert")
    distribute("batch_expert")
    with pytest.raises(
        ValueError, match=r"\{'expert': 8\}.*\{'batch': 2, 'expert': 4\}"
    ):
        mixture(inputs(8, 4, FEATURES))
