import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_moe.ops import Stage, formulation, grouped_apply, grouped_matmul
from keras_moe.ops._backend import backend
from keras_moe.ops._blocks import block_sizes
from tests.execution import COMPILED, MODES, numerical_gradients, with_gradients

# XLA's loops need XLA; torch's kernel needs rows of 16 bytes.
MODES_OF = {
    "blocks": {"jax": MODES, "tensorflow": ("xla",)},
    "groups": {"torch": MODES, "tensorflow": ("eager", "graph")},
    "library": {"jax": MODES, "torch": MODES},
    "dense": {"jax": MODES, "torch": MODES, "tensorflow": MODES},
}
CASES = [
    (name, mode)
    for name, modes in MODES_OF.items()
    for mode in modes.get(keras.config.backend(), ())
]
D, H, OUT = 4, 8, 12


def bend(matmul, inputs, weights):
    (x,) = inputs
    left, right = weights
    return matmul(ops.sin(x), left), matmul(x, right)


def join(matmul, inputs, weights):
    left, right = inputs
    return (matmul(ops.tanh(left) * right, weights[0]),)


def chain(x, left, right, out, group_sizes):
    stages = [Stage(bend, (left, right)), Stage(join, (out,))]
    return grouped_apply(stages, x, group_sizes)


def reference(sizes):
    def outputs(x, left, right, out):
        y = np.zeros((len(x), out.shape[2]))
        end = 0
        for e, size in enumerate(sizes):
            rows = slice(end, end + size)
            hidden = np.tanh(np.sin(x[rows]) @ left[e]) * (x[rows] @ right[e])
            y[rows] = hidden @ out[e]
            end += size
        return y

    return outputs


def draw(rows, groups, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(rows, D), (groups, D, H), (groups, D, H), (groups, H, OUT), (rows, OUT)]
    arrays = [rng.normal(size=shape).astype("float32") / 2 for shape in shapes]
    return arrays[:-1], arrays[-1]


def check(function, sizes, rows, mode):
    arrays, dy = draw(rows, len(sizes))
    inputs = (*arrays, np.array(sizes, "int32"))
    y, gradients = with_gradients(function, inputs, dy, mode)
    expected = reference(sizes)
    np.testing.assert_allclose(y, expected(*arrays), atol=1e-5)
    differences = numerical_gradients(expected, arrays, dy)
    for a, b in zip(gradients, differences, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_every_formulation_of_the_backend_is_tested():
    assert {name for name, _ in CASES} == {*backend.FORMULATIONS, "dense"}


@pytest.mark.parametrize("name, mode", CASES)
@pytest.mark.parametrize(
    "sizes, rows",
    [([3, 0, 4, 1], 10), ([0, 0, 2, 0], 2), ([0, 0, 0, 0], 3), ([0, 40, 1, 3], 44)],
    ids=str,
)
def test_a_chain_and_its_gradients(sizes, rows, name, mode):
    with formulation(name):
        check(lambda *a: chain(*a), sizes, rows, mode)  # compiled anew


@pytest.mark.parametrize("mode", MODES)
def test_the_formulation_of_choice(mode):
    check(chain, [3, 0, 4, 1], 10, mode)


@pytest.mark.parametrize("mode", MODES)
def test_what_is_past_the_groups_does_not_matter(mode):
    arrays, dy = draw(10, 4)
    sizes = [3, 0, 4, 1]
    spoiled, spoiled_dy = [a.copy() for a in arrays], dy.copy()
    spoiled[0][8:], spoiled_dy[8:] = np.inf, np.nan
    for w in spoiled[1:]:
        w[1] = np.nan  # of the group without rows
    sizes = np.array(sizes, "int32")
    y, gradients = with_gradients(chain, (*spoiled, sizes), spoiled_dy, mode)
    y_expected, expected = with_gradients(chain, (*arrays, sizes), dy, mode)
    np.testing.assert_allclose(y[:8], y_expected[:8], atol=1e-6)
    assert not y[8:].any() and not gradients[0][8:].any()
    np.testing.assert_allclose(gradients[0][:8], expected[0][:8], atol=1e-6)
    for a, b in zip(gradients[1:], expected[1:], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_weights_are_cast_to_the_rows(mode):
    arrays, dy = draw(10, 4)
    sizes = np.array([3, 0, 4, 1], "int32")
    x = ops.cast(arrays[0], "bfloat16")
    y, gradients = with_gradients(chain, (x, *arrays[1:], sizes), dy, mode)
    expected = reference(sizes)(
        ops.convert_to_numpy(ops.cast(x, "float32")), *arrays[1:]
    )
    np.testing.assert_allclose(y, expected, atol=0.05)
    differences = numerical_gradients(reference(sizes), arrays, dy)
    for a, b in zip(gradients, differences, strict=True):
        np.testing.assert_allclose(a, b, atol=0.1)


@pytest.mark.parametrize("wanted", [(0,), (1, 3), (2,)], ids=str)
def test_gradients_of_some_of_the_inputs(wanted):
    arrays, dy = draw(10, 4)
    sizes = ops.convert_to_tensor(np.array([3, 0, 4, 1], "int32"))

    def of_some(*some):
        inputs = [ops.convert_to_tensor(a) for a in arrays]
        for index, tensor in zip(wanted, some, strict=True):
            inputs[index] = tensor
        return chain(*inputs, sizes)

    _, expected = with_gradients(chain, (*arrays, sizes), dy)
    _, gradients = with_gradients(of_some, [arrays[i] for i in wanted], dy, COMPILED)
    for index, gradient in zip(wanted, gradients, strict=True):
        np.testing.assert_allclose(gradient, expected[index], atol=1e-5)


def test_an_unknown_formulation():
    with pytest.raises(ValueError, match="`name`.*'dense'.*name='fast'"):
        with formulation("fast"):
            pass


def test_a_forced_formulation_ends_with_its_context():
    x, w = np.ones((3, 4), "f"), np.ones((2, 4, 8), "f")
    expected = ops.convert_to_numpy(grouped_matmul(x, w, [1, 2]))
    with pytest.raises(RuntimeError, match="within"):
        with formulation("dense"):
            raise RuntimeError("within")
    np.testing.assert_array_equal(
        ops.convert_to_numpy(grouped_matmul(x, w, [1, 2])), expected
    )


@pytest.mark.skipif(keras.config.backend() != "torch", reason="torch's kernel alone")
def test_rows_that_the_library_refuses():
    with formulation("library"), pytest.raises(ValueError, match="16 bytes.*(3, 5)"):
        grouped_matmul(np.ones((6, 3), "f"), np.ones((2, 3, 5), "f"), [1, 2])


@settings(max_examples=200)
@given(st.integers(0, 10**6), st.integers(1, 4096))
def test_block_sizes(rows, groups):
    sizes = block_sizes(rows, groups)
    assert list(sizes) == sorted(set(sizes))
    assert min(rows, 4) <= sizes[0] and sizes[-1] <= min(rows, 512)
    # An even load fits in one block a group, or fills the largest.
    assert sizes[-1] >= min(rows / groups, 512)
