import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from keras import ops

from keras_moe.ops import top_k
from tests.execution import MODES, in_mode

VALUES = [-np.inf, -2.0, -1.0, -0.0, 0.0, 1.0, 2.0, np.inf]


def reference(row, k):
    """Python's comparison holds -0.0 and 0.0 for equal."""
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]
    return row[order], order


def _top_1(x):
    return top_k(x, 1)


def _top_3(x):
    return top_k(x, 3)


def _top_7(x):
    return top_k(x, 7)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("k, function", [(1, _top_1), (3, _top_3), (7, _top_7)])
def test_ties_go_to_the_lowest_index(k, function, mode):
    @settings(max_examples=25)
    @given(hnp.arrays("float32", (4, 7), elements=st.sampled_from(VALUES)))
    def run(x):
        values, indices = in_mode(function, mode)(ops.convert_to_tensor(x))
        assert keras.backend.standardize_dtype(indices.dtype) == "int32"
        values, indices = map(ops.convert_to_numpy, (values, indices))
        for row, got, at in zip(x, values, indices, strict=True):
            expected, order = reference(row, k)
            assert at.tolist() == order
            np.testing.assert_array_equal(got, expected)

    run()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shape", [(5,), (2, 3, 5), (0, 5)])
def test_shapes_and_dtypes(shape, dtype):
    x = np.random.default_rng(0).integers(0, 3, shape).astype("float32")
    values, indices = top_k(ops.cast(x, dtype), 2)
    assert tuple(values.shape) == tuple(indices.shape) == (*shape[:-1], 2)
    assert keras.backend.standardize_dtype(values.dtype) == dtype
    expected = [reference(row, 2)[1] for row in x.reshape(-1, 5)]
    indices = ops.convert_to_numpy(indices).reshape(-1, 2)
    assert indices.tolist() == [list(map(int, order)) for order in expected]


@pytest.mark.parametrize("k", [0, -1, 6])
def test_k_out_of_range(k):
    with pytest.raises(ValueError, match=rf"`k` must be.*\(5\).*Received: k={k}"):
        top_k(np.ones((2, 5), "f"), k)
