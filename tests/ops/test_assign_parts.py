"""Variables filled part by part, against NumPy."""

import keras
import ml_dtypes
import numpy as np
import pytest
from keras import ops

from keras_moe.ops import assign_parts, unwritten_zeros

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def _values(shape, dtype):
    values = np.random.default_rng(0).normal(size=shape)
    return values.astype(ml_dtypes.bfloat16).astype(DTYPES[dtype])


def _found(variable):
    return ops.convert_to_numpy(ops.cast(variable, "float32"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 3, 5), (3, 2), (6,)])
@pytest.mark.parametrize("whole", [True, False])
def test_fills_a_variable(dtype, shape, whole):
    expected = _values(shape, dtype)
    variable = keras.Variable(unwritten_zeros, shape=shape, dtype=dtype)
    assert not _found(variable).any()
    parts = [(None, expected)] if whole else list(enumerate(expected))[::-1]
    assign_parts(variable, iter(parts))
    np.testing.assert_array_equal(_found(variable), expected.astype("float32"))
    assert keras.backend.standardize_dtype(variable.dtype) == dtype


def test_a_variable_stays_a_variable():
    """What it held is not what it was made of, and it can be assigned to again."""
    values = _values((3, 2), "float32")
    variable = keras.Variable(unwritten_zeros, shape=(3, 2), dtype="float32")
    assign_parts(variable, enumerate(values))
    before = np.array(_found(variable))
    variable.assign_add(np.ones((3, 2), "float32"))
    values += 5
    np.testing.assert_allclose(_found(variable), before + 1)


def test_takes_transposed_arrays():
    values = _values((2, 3), "float32")
    variable = keras.Variable(np.zeros((3, 2), "float32"))
    assign_parts(variable, [(None, values.T)])
    np.testing.assert_array_equal(_found(variable), values.T)


@pytest.mark.parametrize(("index", "shape"), [(3, (2,)), (-1, (2,)), (0, (3,))])
def test_refuses_what_does_not_fit(index, shape):
    variable = keras.Variable(np.zeros((3, 2), "float32"))
    with pytest.raises(ValueError, match=f"must have the shape.*index={index}"):
        assign_parts(variable, [(index, np.zeros(shape, "float32"))])
