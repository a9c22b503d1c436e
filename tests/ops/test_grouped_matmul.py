import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_moe.ops import grouped_matmul
from tests.execution import (
    COMPILED,
    MODES,
    differentiated,
    program,
    with_gradients,
)

DTYPES = {"float32": 2.0**-23, "bfloat16": 2.0**-8, "float16": 2.0**-10}
# Eagerly JAX compiles a loop at every call.
EXAMPLES = {"eager": 2 if keras.config.backend() == "jax" else 15}


def reference(x, w, sizes, dy):
    """Output and gradients, a group at a time, in float64."""
    x, w, dy = (np.asarray(a, "float64") for a in (x, w, dy))
    y, dx = np.zeros((len(x), w.shape[2])), np.zeros_like(x)
    dw = np.zeros_like(w)
    start = 0
    for e, size in enumerate(sizes):
        rows = slice(start, start + size)
        if size:
            y[rows] = x[rows] @ w[e]
            dx[rows] = dy[rows] @ w[e].T
            dw[e] = x[rows].T @ dy[rows]
        start += size
    return y, [dx, dw]


def check(x, w, sizes, dy, mode, epsilon=2.0**-23, unknown_axes=0):
    sizes = np.asarray(sizes, "int32")
    got, got_gradients = with_gradients(
        grouped_matmul, (x, w, sizes), dy, mode, unknown_axes
    )
    expected, gradients = reference(x, w, sizes, dy)
    for a, b in zip([got, *got_gradients], [expected, *gradients], strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=150 * epsilon, rtol=4 * epsilon)


def draw(shape, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    n, e, d, h = shape
    x = rng.normal(size=(n, d)).astype("float32")
    w = (rng.normal(size=(e, d, h)) * scale / max(d, 1) ** 0.5).astype("float32")
    return x, w, rng.normal(size=(n, h)).astype("float32")


@st.composite
def group_sizes(draw, rows, groups):
    ends = sorted(
        draw(st.lists(st.integers(0, rows), min_size=groups, max_size=groups))
    )
    return np.diff([0, *ends]).astype("int32")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "shape",  # N, E, D, H
    [(1, 1, 3, 5), (6, 9, 17, 8), (150, 4, 8, 12)],
    ids=["one_row", "more_groups_than_rows", "several_blocks"],
)
def test_any_sizes_equal_a_loop_over_groups(shape, mode):
    @settings(max_examples=EXAMPLES.get(mode, 15))
    @given(group_sizes(shape[0], shape[1]), st.integers(0, 9))
    def run(sizes, seed):
        x, w, dy = draw(shape, seed)
        used = sizes.sum()
        # Neither what lies past the groups nor the matrix of an empty one matters.
        x[used:], dy[used:] = np.inf, np.nan
        w[sizes == 0] = np.nan
        check(x, w, sizes, dy, mode)

    run()


@pytest.mark.parametrize("mode", MODES)
def test_sizes_at_and_around_powers_of_two(mode):
    sizes = [1, 127, 15, 129, 16, 17, 128, 0, 31, 33, 63, 64, 65, 260]
    check(*_with_sizes(sizes, 8, 4), mode)


def _with_sizes(sizes, d, h):
    x, w, dy = draw((sum(sizes) + 3, len(sizes), d, h))
    return x, w, sizes, dy


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "sizes", [[0, 0, 0], [20, 0, 0], [0, 20, 0], [0, 0, 20]], ids=str
)
def test_all_rows_in_one_group_or_none(sizes, mode):
    x, w, dy = draw((20, 3, 4, 8))
    check(x, w, sizes, dy, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sizes", [[0, 2, 1], [0, 40, 3], [200, 0, 90]], ids=str)
def test_a_number_of_rows_unknown_to_the_compiler(sizes, mode):
    check(*_with_sizes(sizes, 8, 4), mode, unknown_axes=1)


@pytest.mark.parametrize("mode", MODES)
def test_one_program_serves_all_group_sizes(mode):
    x, w, dy = draw((40, 3, 4, 8))
    programs = {
        program(
            differentiated(grouped_matmul),
            mode,
            [*map(ops.convert_to_tensor, (x, w)), ops.convert_to_tensor(sizes)],
            ops.convert_to_tensor(dy),
        )
        for sizes in (np.array(s, "int32") for s in ([3, 30, 2], [0, 0, 40]))
    }
    assert len(programs) == 1


@pytest.mark.parametrize("mode", MODES)
def test_no_rows(mode):
    x, w, dy = draw((0, 3, 4, 8))
    check(x, w, [0, 0, 0], dy, mode)
    check(x, w, [0, 0, 0], dy, mode, unknown_axes=1)


@pytest.mark.parametrize("mode", MODES)
def test_infinities_stay_in_their_group(mode):
    x, w, dy = draw((12, 3, 4, 8))
    x[4:7], dy[4:7] = np.inf, np.nan
    sizes = np.array([4, 3, 5], "int32")
    got, (dx, dw) = with_gradients(grouped_matmul, (x, w, sizes), dy, mode)
    y, (dx_expected, dw_expected) = reference(x, w, sizes, dy)
    others = np.r_[0:4, 7:12]
    np.testing.assert_allclose(got[others], y[others], atol=1e-5)
    np.testing.assert_allclose(dx[others], dx_expected[others], atol=1e-5)
    np.testing.assert_allclose(dw[[0, 2]], dw_expected[[0, 2]], atol=1e-5)


@pytest.mark.parametrize("width", [(16, 8), (5, 3)], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype, width):
    x, w, dy = draw((70, 4, *width))
    sizes = np.array([0, 40, 3, 20], "int32")
    x, w = ops.cast(x, dtype), ops.cast(w, dtype)
    y = grouped_matmul(x, w, sizes)
    assert keras.backend.standardize_dtype(y.dtype) == dtype
    dy = ops.convert_to_numpy(ops.cast(ops.cast(dy, dtype), "float64"))
    got, gradients = with_gradients(grouped_matmul, (x, w, sizes), dy, COMPILED)
    x64, w64 = (ops.convert_to_numpy(ops.cast(t, "float64")) for t in (x, w))
    expected, expected_gradients = reference(x64, w64, sizes, dy)
    epsilon = DTYPES[dtype]
    for a, b in zip([got, *gradients], [expected, *expected_gradients], strict=True):
        # Half a unit in the last place to round the result, and the sums' own error.
        np.testing.assert_allclose(a, b, rtol=epsilon, atol=20 * epsilon)


@pytest.mark.parametrize("width", [(4, 8), (3, 5)], ids=["aligned", "unaligned"])
def test_transposed_and_strided_inputs(width):
    def transposed(x, w, sizes):
        return grouped_matmul(ops.transpose(x), ops.transpose(w, (0, 2, 1)), sizes)

    def strided(x, w, sizes):
        return grouped_matmul(x[::2, ::2], w[:, ::2, ::2], sizes)

    sizes = np.array([3, 0, 5], "int32")
    x, w, dy = draw((9, 3, *width))
    expected, (dx, dw) = reference(x, w, sizes, dy)
    y, gradients = with_gradients(
        transposed, (x.T.copy(), w.transpose(0, 2, 1).copy(), sizes), dy
    )
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_allclose(gradients[0], dx.T, atol=1e-5)
    np.testing.assert_allclose(gradients[1], dw.transpose(0, 2, 1), atol=1e-5)
    wide_x, wide_w = np.repeat(np.repeat(x, 2, 0), 2, 1), np.repeat(w, 2, 1)
    wide_w = np.repeat(wide_w, 2, 2)
    y, gradients = with_gradients(strided, (wide_x, wide_w, sizes), dy)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_allclose(gradients[0][::2, ::2], dx, atol=1e-5)
    np.testing.assert_allclose(gradients[1][:, ::2, ::2], dw, atol=1e-5)


def test_a_cotangent_that_is_not_contiguous():
    def function(x, w, sizes):
        return ops.transpose(grouped_matmul(x, w, sizes))

    sizes = np.array([3, 0, 5], "int32")
    x, w, dy = draw((9, 3, 4, 8))
    _, (dx, dw) = reference(x, w, sizes, dy)
    _, gradients = with_gradients(function, (x, w, sizes), dy.T.copy())
    np.testing.assert_allclose(gradients[0], dx, atol=1e-5)
    np.testing.assert_allclose(gradients[1], dw, atol=1e-5)


@pytest.mark.parametrize("sizes", [[2, 0, 3], (2, 0, 3), np.array([2, 0, 3], "int64")])
def test_sizes_may_be_any_integers(sizes):
    x, w, _ = draw((6, 3, 4, 8))
    y = ops.convert_to_numpy(grouped_matmul(x, w, sizes))
    expected, _ = reference(x, w, sizes, np.zeros((6, 8)))
    np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize(
    "x, w, sizes, message",
    [
        ((6,), (3, 4, 8), (3,), r"`x` must have shape \[N, D\].*x.shape=\(6,\)"),
        ((6, 4), (4, 8), (3,), r"`w` shape \[E, D, H\].*w.shape=\(4, 8\)"),
        ((6, 5), (3, 4, 8), (3,), r"same D.*x.shape=\(6, 5\)"),
        ((6, 4), (3, 4, 8), (4,), r"`group_sizes`.*\(3,\).*shape=\(4,\)"),
        ((6, 4), (3, 4, 8), (3, 1), r"`group_sizes`.*\(3,\).*shape=\(3, 1\)"),
    ],
)
def test_shapes_that_do_not_fit(x, w, sizes, message):
    with pytest.raises(ValueError, match=message):
        grouped_matmul(np.ones(x, "f"), np.ones(w, "f"), np.ones(sizes, "int32"))


def test_dtypes_that_differ():
    x, w = ops.ones((6, 4), "bfloat16"), ops.ones((3, 4, 8), "float32")
    with pytest.raises(ValueError, match="dtype.*x.dtype=bfloat16, w.dtype=float32"):
        grouped_matmul(x, w, [1, 2, 3])
