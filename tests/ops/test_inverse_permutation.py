import numpy as np
import pytest
from keras import ops

from keras_moe.ops import inverse_permutation
from tests.execution import MODES, in_mode


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [0, 1, 2, 257])
def test_undoes_the_permutation(size, mode):
    permutation = np.random.default_rng(size).permutation(size).astype("int32")
    inverse = in_mode(inverse_permutation, mode)(ops.convert_to_tensor(permutation))
    inverse = ops.convert_to_numpy(inverse)
    assert inverse.dtype == "int32"
    np.testing.assert_array_equal(inverse[permutation], np.arange(size))


def test_takes_any_integers():
    inverse = ops.convert_to_numpy(inverse_permutation(np.array([2, 0, 1], "int64")))
    np.testing.assert_array_equal(inverse, [1, 2, 0])
    np.testing.assert_array_equal(
        ops.convert_to_numpy(inverse_permutation([2, 0, 1])), [1, 2, 0]
    )
