import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from keras import ops

from keras_moe.dispatch import expert_capacity, limit_capacity
from keras_moe.layers import Routing
from tests.execution import MODES, in_mode
from tests.execution import numpy as to_numpy
from tests.references import mixture as reference

EXPERTS = 4


def tensors(ids):
    gates = np.random.default_rng(0).uniform(0.1, 1, ids.shape).astype("float32")
    gates[ids == EXPERTS] = 0
    empty = ops.zeros((len(ids), EXPERTS))
    return Routing(
        ops.convert_to_tensor(ids), ops.convert_to_tensor(gates), empty, empty
    )


def _limit(routing, capacity, group_size):
    return limit_capacity(routing, capacity, group_size, EXPERTS)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(1, 1), (13, 1), (13, 2), (6, 3)], ids=str)
def test_equals_placing_one_choice_after_another(shape, mode):
    @settings(max_examples=20)
    @given(
        # The last id is that of padding; groups of 13 and more are the whole batch,
        # and of 4 and 5 leave a shorter one at the end.
        hnp.arrays("int32", shape, elements=st.integers(0, EXPERTS)),
        st.integers(1, 5),
        st.sampled_from([1, 4, 5, 13, 20]),
    )
    def run(ids, capacity, group_size):
        routing = tensors(ids)
        limits = (ops.convert_to_tensor(v, "int32") for v in (capacity, group_size))
        limited = in_mode(_limit, mode)(routing, *limits)
        kept = reference.kept_choices(ids, capacity, group_size, EXPERTS)
        got = to_numpy(limited)
        np.testing.assert_array_equal(got.expert_ids, np.where(kept, ids, EXPERTS))
        gates = np.where(kept, to_numpy(routing.gates), 0)
        np.testing.assert_array_equal(got.gates, gates)
        assert got.expert_ids.dtype == "int32"

    run()


def test_first_choices_go_before_second_ones():
    ids = np.array([[0, 1], [1, 0], [1, 0]], "int32")
    got = to_numpy(_limit(tensors(ids), 1, 3))
    # Token 0's second choice waits for token 1's first, and loses its place.
    assert got.expert_ids.tolist() == [[0, EXPERTS], [1, EXPERTS], [EXPERTS, EXPERTS]]


@pytest.mark.parametrize("group_size", [12, 5])
def test_enough_capacity_changes_nothing(group_size):
    ids = np.random.default_rng(0).integers(0, EXPERTS, (12, 2)).astype("int32")
    routing = tensors(ids)
    limited = _limit(routing, 2 * group_size, group_size)
    for a, b in zip(to_numpy(limited), to_numpy(routing), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_long_batch():
    """More tokens than small integer types hold, and many groups."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, EXPERTS + 1, (5000, 2)).astype("int32")
    got = to_numpy(_limit(tensors(ids), 3, 7))
    kept = reference.kept_choices(ids, 3, 7, EXPERTS)
    np.testing.assert_array_equal(got.expert_ids, np.where(kept, ids, EXPERTS))


def test_no_tokens():
    limited = _limit(tensors(np.zeros((0, 2), "int32")), 3, 7)
    assert tuple(limited.expert_ids.shape) == (0, 2)


@pytest.mark.parametrize("factor", [0.01, 0.5, 1.0, 1.1, 1.25, 1.3, 2.0])
def test_capacity_is_that_of_the_papers(factor):
    for group in (1, 7, 30, 1000):
        for experts in (1, 3, 11, 64):
            for top_k in (1, 2, 3):
                got = expert_capacity(factor, group, experts, top_k)
                assert got == reference.capacity(factor, group, experts, top_k) >= 1
    # Switch, eq. 3, and GShard, section 3.2 (C = 2 N / E).
    assert expert_capacity(1.25, 1024, 64, 1) == 20
    assert expert_capacity(1.0, 4096, 128, 2) == 64


def test_a_size_known_at_run_time_gives_the_same_capacity():
    """Also where floating point is just off: 1.1 * 3 * 30 / 11 is a bit above 9."""

    def capacities(group):
        return ops.stack(
            [
                expert_capacity(factor, group, experts, 3)
                for factor in (1.1, 1.3, 1.25)
                for experts in (3, 11, 64)
            ]
        )

    for mode in MODES:
        for group in (1, 30, 50, 512):
            expected = [
                reference.capacity(factor, group, experts, 3)
                for factor in (1.1, 1.3, 1.25)
                for experts in (3, 11, 64)
            ]
            if keras.config.backend() != "jax":  # whose sizes are always static
                dynamic = in_mode(capacities, mode)(ops.convert_to_tensor(group))
                assert to_numpy(dynamic).tolist() == expected


@pytest.mark.parametrize("factor", [0, -1.0, float("nan"), float("inf"), "2", True])
def test_a_bad_factor(factor):
    with pytest.raises(ValueError, match=f"`capacity_factor`.*{factor!r}"):
        expert_capacity(factor, 8, 4, 2)
