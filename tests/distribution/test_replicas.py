"""Two replicas against one device that has the whole batch."""

import functools

import keras
import numpy as np
import pytest

from tests.distribution import replicas
from tests.distribution.replicas import CASES


@functools.cache
def _on_two():
    trained, sums = replicas.on_two([*CASES])
    return dict(zip(CASES, trained, strict=True)), sums


def test_sums_and_their_gradients_are_over_all_replicas():
    _, sums = _on_two()
    ranks = np.arange(len(sums))
    x = sum(np.arange(3) + ranks[:, None])
    y = sum(1 + ranks)
    cotangent = sum(1 + ranks)
    for product, (of_x, of_y) in sums:
        np.testing.assert_allclose(product, x * y)
        np.testing.assert_allclose(of_x, np.full(3, cotangent * y))
        np.testing.assert_allclose(of_y, cotangent * x.sum())


@pytest.mark.parametrize("case", CASES)
def test_two_replicas_train_as_one_device_does(case):
    losses, states = _on_two()[0][case]
    keras.distribution.set_distribution(None)
    expected_losses, expected = replicas.on_one(case)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    for got in states:
        for name, value in expected.items():
            np.testing.assert_allclose(got[name], value, atol=1e-5, err_msg=name)
    loads = [value for name, value in expected.items() if "load" in name]
    assert np.ptp(loads) > 0.05  # else there is little to see
    dropped = [value for name, value in expected.items() if "dropped" in name]
    assert (max(dropped) > 0) == (case == "sequences")


@pytest.mark.parametrize("case", CASES)
def test_replicas_stay_equal_to_the_last_bit(case):
    _, states = _on_two()[0][case]
    for name, value in states[0].items():
        for other in states[1:]:
            np.testing.assert_array_equal(value, other[name], err_msg=name)
