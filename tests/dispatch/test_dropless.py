import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from keras import ops

from keras_moe.dispatch import combine, sort_by_expert
from tests.execution import MODES, in_mode, with_gradients
from tests.execution import numpy as to_numpy

EXPERTS = 4


def order_reference(ids):
    """Expert by expert, and token by token within each."""
    tokens, rows = [], {}
    for e in range(EXPERTS + 1):
        for t, k in np.ndindex(ids.shape):
            if ids[t, k] == e:
                rows[t, k] = len(tokens)
                tokens.append(t)
    sizes = [int(np.sum(ids == e)) for e in range(EXPERTS)]
    positions = [[rows[t, k] for k in range(ids.shape[1])] for t in range(len(ids))]
    return tokens, sizes, positions


def _sort(ids):
    return sort_by_expert(ids, EXPERTS)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(1, 1), (9, 2), (6, 3)], ids=str)
def test_sort_equals_a_loop(shape, mode):
    # The last id means no expert. A token may name one expert twice.
    @settings(max_examples=15)
    @given(hnp.arrays("int32", shape, elements=st.integers(0, EXPERTS)))
    def run(ids):
        order = to_numpy(in_mode(_sort, mode)(ops.convert_to_tensor(ids)))
        tokens, sizes, positions = order_reference(ids)
        assert order.tokens.tolist() == tokens
        assert order.group_sizes.tolist() == sizes
        assert order.positions.tolist() == positions
        assert {part.dtype.name for part in order} == {"int32"}

    run()


@pytest.mark.parametrize("mode", MODES)
def test_combine_weighs_each_tokens_rows(mode):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, EXPERTS + 1, (9, 2)).astype("int32")
    gates = rng.normal(size=(9, 2)).astype("float32")
    rows = rng.normal(size=(18, 5)).astype("float32")
    dy = rng.normal(size=(9, 5)).astype("float32")

    def function(rows, gates, ids):
        return combine(rows, sort_by_expert(ids, EXPERTS), gates)

    y, (d_rows, d_gates) = with_gradients(function, (rows, gates, ids), dy, mode)
    _, _, positions = order_reference(ids)
    expected, expected_rows = np.zeros((9, 5)), np.zeros((18, 5))
    expected_gates = np.zeros((9, 2))
    for t, k in np.ndindex(ids.shape):
        row = positions[t][k]
        expected[t] += gates[t, k].astype("float64") * rows[row]
        expected_rows[row] += gates[t, k].astype("float64") * dy[t]
        expected_gates[t, k] = rows[row].astype("float64") @ dy[t]
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_allclose(d_rows, expected_rows, atol=1e-5)
    np.testing.assert_allclose(d_gates, expected_gates, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_combine_accumulates_in_float32(dtype):
    # 256 + 1 rounds to 256 in bfloat16 and 2048 + 1 to 2048 in float16, so that
    # a sum in that type would lose every small choice.
    large, count = {"bfloat16": (256.0, 8), "float16": (2048.0, 8)}[dtype]
    rows = np.array([[large]] + [[1.0]] * count, "float32")
    ids = ops.convert_to_tensor(np.arange(count + 1, dtype="int32")[None])
    order = sort_by_expert(ids, count + 1)
    y = combine(ops.cast(rows, dtype), order, ops.ones((1, count + 1)))
    assert float(ops.cast(y, "float32")[0, 0]) == large + count


def test_no_tokens():
    order = sort_by_expert(ops.zeros((0, 2), "int32"), EXPERTS)
    assert to_numpy(order.group_sizes).tolist() == [0] * EXPERTS
    assert tuple(order.positions.shape) == (0, 2)
    assert tuple(combine(ops.zeros((0, 3)), order, ops.zeros((0, 2))).shape) == (0, 3)
