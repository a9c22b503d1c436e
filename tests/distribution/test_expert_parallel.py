"""One mixture over eight devices, against the same on one."""

import collections
import functools
import re

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe.distribution import ExpertParallel
from keras_moe.layers import MixtureOfExperts
from tests.distribution.meshes import MESHES, distribute, mesh
from tests.distribution.programs import compiled_step

EXPERTS, FEATURES, LENGTH = 8, 16, 6


def _model(**settings):
    """A mixture between other layers, so that gradients reach its inputs."""
    settings = {"top_k": 2, "balance_loss": 0.1, "z_loss": 0.01, **settings}
    inputs = keras.Input((LENGTH, FEATURES))
    hidden = keras.layers.Dense(FEATURES, name="first")(inputs)
    mixture = MixtureOfExperts(EXPERTS, 8, name="mixture", **settings)
    model = keras.Model(inputs, hidden + mixture(hidden))
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    return model


def _mixture(model):
    return model.get_layer("mixture")


def _data(batch, skewed=False):
    generator = np.random.default_rng(7)
    x = generator.normal(size=(batch, LENGTH, FEATURES)).astype("float32")
    y = generator.normal(size=x.shape).astype("float32")
    if skewed:  # with `_skew`, the first experts score highest for every token
        x[..., :2] += 4.0
    return x, y


def _skew(model):
    model.get_layer("first").kernel.assign(np.eye(FEATURES))
    _mixture(model).router.kernel.assign(np.eye(FEATURES, EXPERTS) * 2)


@functools.cache
def _trained(name, steps=20, batch=16, skewed=False, **settings):
    """Losses, weights and load after training; over a mesh, or None for one device."""
    keras.distribution.set_distribution(None)
    if name is not None:
        distribute(name)
    keras.utils.set_random_seed(3)
    model = _model(**settings)
    if skewed:
        _skew(model)
    x, y = _data(batch, skewed)
    history = model.fit(x, y, batch, epochs=steps, shuffle=False, verbose=0)
    mixture = _mixture(model)
    return (
        history.history["loss"],
        [ops.convert_to_numpy(w) for w in model.weights],
        ops.convert_to_numpy(mixture.expert_load),
        ops.convert_to_numpy(mixture.dropped_fraction),
    )


def _assert_alike(results, expected):
    for result, value in zip(
        keras.tree.flatten(results), keras.tree.flatten(expected), strict=True
    ):
        np.testing.assert_allclose(result, value, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", [*MESHES])
def test_training_equals_one_device(name):
    _assert_alike(_trained(name), _trained(None))


@pytest.mark.parametrize("name", ["batch_expert_model"])
def test_nothing_is_lost_where_all_choose_the_same_experts(name):
    # Several rounds: a device's buffer holds 1.25 times the mean.
    expected = _trained(None, 3, batch=32, skewed=True)
    assert expected[2][:2].sum() > 0.95
    _assert_alike(_trained(name, 3, batch=32, skewed=True), expected)


@pytest.mark.parametrize("name", ["batch_expert_model"])
def test_capacity_that_drops_nothing_equals_one_device(name):
    settings = {"dispatch": "capacity", "capacity_factor": float(EXPERTS)}
    _assert_alike(_trained(name, 3, **settings), _trained(None, 3, **settings))


def test_capacity_drops_by_the_tokens_of_a_device():
    settings = {"dispatch": "capacity", "capacity_factor": 0.75}
    per_device = 16 * LENGTH // 8
    expected = _trained(None, 3, **settings, capacity_group=per_device)
    assert 0.1 < expected[3] < 0.9
    _assert_alike(_trained("expert", 3, **settings), expected)


def test_groups_of_capacity_stay_together():
    settings = {
        "dispatch": "capacity",
        "capacity_factor": 0.75,
        "capacity_group": "sequence",
    }
    expected = _trained(None, 3, **settings)
    assert expected[3] > 0.1
    _assert_alike(_trained("batch_expert_model", 3, **settings), expected)


_MOVES = re.compile(r" (all-to-all|all-gather|reduce-scatter|collective-permute)\(")


@pytest.mark.parametrize("dispatch", ["dropless", "capacity"])
def test_a_step_has_four_all_to_alls_and_gathers_nothing(dispatch):
    distribute("expert")
    factor = None if dispatch == "dropless" else 1.25
    model = _model(dispatch=dispatch, capacity_factor=factor)
    text = compiled_step(model, *_data(16))
    assert collections.Counter(_MOVES.findall(text)) == {"all-to-all": 4}


@pytest.mark.parametrize("name", ["expert", "batch_expert"])
def test_a_device_holds_its_experts_and_their_slots(name):
    distribute(name)
    model = _model()
    model.optimizer.build(model.trainable_variables)
    kernels = _mixture(model).experts.kernels
    of_experts = [
        v
        for v in [*kernels, *model.optimizer.variables]
        if tuple(v.shape) in {tuple(k.shape) for k in kernels}
    ]
    assert len(of_experts) == 3 * len(kernels)
    for variable in of_experts:
        shards = [s.data.shape for s in variable.value.addressable_shards]
        held = EXPERTS // MESHES[name]["expert"]
        assert {shape[0] for shape in shards} == {held}
        share = np.prod(variable.shape) / len(shards)
        assert {np.prod(shape) for shape in shards} == {share}


def test_every_device_draws_its_own_noise():
    distribute("expert")
    model = _model(router_jitter=0.5)
    same = np.ones((8, LENGTH, FEATURES), "float32")
    first = ops.convert_to_numpy(model(same, training=True))
    assert len(np.unique(first[:, 0, 0])) > 4
    again = ops.convert_to_numpy(model(same, training=True))
    assert not np.allclose(first, again)
    seed = [v for v in model.non_trainable_variables if v.dtype == "uint32"]
    assert all(v.value.sharding.is_fully_replicated for v in seed)


def test_expert_dropout_drops_the_share_it_says():
    distribute("expert")
    keras.utils.set_random_seed(1)
    inputs = keras.Input((LENGTH, FEATURES))
    mixture = MixtureOfExperts(EXPERTS, 64, expert_dropout=0.5, gated=False)
    model = keras.Model(inputs, mixture(inputs))
    for kernel in mixture.experts.kernels:
        kernel.assign(np.ones(kernel.shape))
    x = np.ones((8, LENGTH, FEATURES), "float32")
    kept = ops.convert_to_numpy(model(x, training=True) / model(x))
    assert abs(kept.mean() - 1) < 0.05
    assert len(np.unique(kept[:, 0, 0])) > 4


@pytest.mark.parametrize("batch", [1, 3])
def test_a_batch_of_any_size_is_computed(batch):
    x, _ = _data(batch)
    keras.utils.set_random_seed(3)
    expected = ops.convert_to_numpy(_model()(x))
    distribute("batch_expert_model")
    keras.utils.set_random_seed(3)
    result = ops.convert_to_numpy(_model()(x))
    np.testing.assert_allclose(result, expected, atol=1e-5)


def test_padding_takes_no_part():
    distribute("expert")
    keras.utils.set_random_seed(3)
    mixture = MixtureOfExperts(EXPERTS, 8)
    x, _ = _data(8)
    mask = np.arange(LENGTH) < np.arange(8)[:, None] % LENGTH
    y, statistics = mixture(x, mask=mask, return_statistics=True)
    np.testing.assert_array_equal(ops.convert_to_numpy(y)[~mask], 0)
    assert statistics.tokens == mask.sum()
    assert statistics.assignments.sum() == 2 * mask.sum()


def test_keras_distributions_serve_as_well():
    expected = _trained(None, 3)
    keras.distribution.set_distribution(keras.distribution.DataParallel())
    keras.utils.set_random_seed(3)
    model = _model()
    x, y = _data(16)
    history = model.fit(x, y, 16, epochs=3, shuffle=False, verbose=0)
    _assert_alike(history.history["loss"], expected[0])
    _assert_alike([ops.convert_to_numpy(w) for w in model.weights], expected[1])


def test_a_distribution_set_too_late_is_refused():
    model = _model()
    distribute("expert")
    with pytest.raises(ValueError, match="built before its distribution was set"):
        model(_data(8)[0])


def test_axes_that_do_not_divide_are_refused():
    distribute("expert")
    with pytest.raises(ValueError, match=r"'expert' of 8 devices.*\(12, 16, 8\)"):
        MixtureOfExperts(12, 8, name="mixture").build((None, FEATURES))
    distribute("expert_model")
    with pytest.raises(ValueError, match=r"'model' of 2 devices.*\(8, 16, 5\)"):
        MixtureOfExperts(8, 5, name="mixture").build((None, FEATURES))
    model = _model()
    with pytest.raises(ValueError, match=r"\('expert',\).* 4 devices.* 6, of the"):
        model.fit(*_data(6), 6, verbose=0)


def test_unknown_batch_axes_are_refused():
    layout_map = keras.distribution.LayoutMap(mesh("expert"))
    with pytest.raises(ValueError, match="`batch_axes` must name axes of the mesh"):
        ExpertParallel(layout_map=layout_map, batch_axes="data")
