"""The arrays: importance and factor of one layer against the NumPy reference."""

import chex
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

from grapes_optax import DimensionNumbers, importance_factor, node_importance

LAYOUTS = {
    "dense": ((5, 7), 0, 1),
    "dense, nodes first": ((7, 5), 1, 0),
    "conv": ((3, 2, 4, 6), (0, 1, 2), 3),
    "conv transposed": ((3, 2, 6, 4), (0, 1, 3), -2),
    "conv, nodes first": ((6, 4, 3, 2), (1, 2, 3), 0),
    "query": ((5, 3, 4), 0, (1, 2)),
    "attention output": ((3, 4, 5), (0, 1), 2),
    "batch dims": ((2, 5, 7), 1, 2),
    "scanned on axis 1": ((5, 2, 7), 0, 2),
    "local": ((2, 3, 8, 6), -2, -1),
    "node axes swapped": ((5, 3, 4), 0, (2, 1)),
    "one input": ((1, 4), 0, 1),
    "one node": ((4, 1), 0, 1),
}
OPTIONS = {
    "default": {},
    "not clipped": {"bounds": None},
    "other gain": {"gain": 3.0, "bounds": (0.5, 2.5)},
    "mean": {"gain": 1.0, "bounds": None, "normalization": "mean"},
    "control mean": {"control": "mean"},
    "control roll": {"control": "roll"},
    "control reverse": {"control": "reverse"},
}


def normal(shape, dtype=jnp.float32, seed=0):
    # Columns of very different strength, so that both bounds bind.
    scale = np.exp(np.random.default_rng(seed).normal(size=shape[-1]))
    return jnp.asarray(np.random.default_rng(seed + 1).normal(size=shape) * scale, dtype)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize(("shape", "reduction", "output"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_agrees_with_the_reference(shape, reduction, output, options):
    kernel = normal(shape)
    numbers = DimensionNumbers(reduction, output)
    importance = reference.node_importance(kernel, reduction, output)
    np.testing.assert_allclose(node_importance(kernel, numbers), importance, rtol=1e-6)
    expected = reference.factor(importance, np.size(output), **options)
    np.testing.assert_allclose(importance_factor(kernel, numbers, **options), expected, rtol=1e-6)


def test_default_layout_is_flax():
    kernel = normal((3, 2, 4, 6))
    expected = importance_factor(kernel, DimensionNumbers((0, 1, 2), 3))
    chex.assert_trees_all_equal(importance_factor(kernel), expected)


def test_any_object_with_the_two_attributes_describes():
    kernel = normal((5, 7))
    muon = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=0)
    chex.assert_trees_all_equal(
        node_importance(kernel, muon), node_importance(kernel, DimensionNumbers(1, 0))
    )


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.complex64])
def test_sums_in_float32(dtype):
    kernel = normal((4096, 3), dtype)
    importance = node_importance(kernel)
    assert importance.dtype == jnp.float32
    wide = np.asarray(kernel, np.complex128 if dtype == jnp.complex64 else np.float64)
    np.testing.assert_allclose(importance, np.abs(wide).sum(0), rtol=2e-6)


def test_float64_stays():
    with jax.enable_x64(True):
        kernel = normal((5, 7), jnp.float64)
        factor = importance_factor(kernel, gain=jnp.float32(2.0))
        assert factor.dtype == jnp.float64
        expected = reference.factor(reference.node_importance(kernel, 0, 1), 1)
        np.testing.assert_allclose(factor, expected, rtol=1e-15)


def test_no_gradient_flows_through_the_factor_but_through_gain():
    kernel = normal((5, 7))
    gradient = jax.grad(lambda k: importance_factor(k, bounds=None).sum())(kernel)
    chex.assert_trees_all_equal(gradient, jnp.zeros_like(kernel))
    slope = jax.grad(lambda g: importance_factor(kernel, gain=g, bounds=None).max())(2.0)
    np.testing.assert_allclose(slope, 1.0)


def test_transforms_of_jax():
    kernels = normal((4, 5, 7))
    stacked = importance_factor(kernels, DimensionNumbers(1, 2))
    chex.assert_trees_all_close(jax.vmap(importance_factor)(kernels), stacked)
    chex.assert_trees_all_close(jax.jit(importance_factor)(kernels[0]), stacked[0])
    assert jax.eval_shape(importance_factor, kernels[0]).shape == (7,)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_empty_layers(shape):
    for options in OPTIONS.values():
        factor = importance_factor(jnp.zeros(shape), **options)
        chex.assert_trees_all_equal(factor, jnp.ones(shape[1]))


def test_non_finite_weights_show():
    assert jnp.isnan(importance_factor(jnp.array([[jnp.nan, 1.0]]))).all()


ERRORS = {
    "overlap": ((0, 1), 1, "distinct axes"),
    "repeat": ((0, 0), 1, "distinct axes"),
    "repeat, negative": ((0, -2), 1, "distinct axes"),
    "out of range": (0, 2, "out of range for 2 axes"),
    "no fan-in": ((), 1, "no fan-in"),
    "no nodes": (0, (), "output_axis is empty"),
}


@pytest.mark.parametrize(("reduction", "output", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_wrong_axes(reduction, output, message):
    for function in node_importance, importance_factor:
        with pytest.raises(ValueError, match=message):
            function(jnp.ones((2, 3)), DimensionNumbers(reduction, output))


def test_axes_of_another_type():
    with pytest.raises(TypeError, match="int or a sequence of ints"):
        node_importance(jnp.ones((2, 3)), DimensionNumbers("0", 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalization": "sum"}, "Unknown normalization 'sum': choose one of"),
        ({"control": "shuffle"}, "Unknown control 'shuffle': choose one of"),
        ({"bounds": (2.0, 1.0)}, "0 <= low <= high"),
        ({"bounds": (-1.0, 1.0)}, "0 <= low <= high"),
        ({"bounds": (float("nan"), 1.0)}, "0 <= low <= high"),
        ({"bounds": 2.0}, "a pair"),
        ({"bounds": (1.0, 2.0, 3.0)}, "a pair"),
        ({"gain": -1.0}, "finite and not negative"),
        ({"gain": float("nan")}, "finite and not negative"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        importance_factor(jnp.ones((2, 3)), **options)


@pytest.mark.parametrize("gain", [None, "2", [2.0]])
def test_gain_of_another_type(gain):
    with pytest.raises(TypeError, match="gain must be a number"):
        importance_factor(jnp.ones((2, 3)), gain=gain)


# Properties. Weights are multiples of 1/64 in [-4, 4]: their sums are exact in float32
# in any order, so that equality can be asked for.

SHAPES = st.sampled_from([(1, 1), (1, 6), (6, 1), (3, 5), (8, 3)])  # each compiles anew
KERNELS = hnp.arrays(np.int16, SHAPES, elements=st.integers(-256, 256)).map(
    lambda k: (k / 64).astype(np.float32)
)
GAINS = st.floats(0.125, 8, width=32)
fast = hypothesis.settings(max_examples=50, deadline=None)


@fast
@hypothesis.given(KERNELS, GAINS)
def test_largest_factor_is_exactly_the_gain(kernel, gain):
    hypothesis.assume(kernel.any())
    assert importance_factor(kernel, gain=gain, bounds=None).max() == jnp.float32(gain)


@fast
@hypothesis.given(KERNELS)
def test_mean_normalization_averages_one(kernel):
    factor = importance_factor(kernel, gain=1.0, bounds=None, normalization="mean")
    np.testing.assert_allclose(factor.mean(), 1.0, rtol=1e-6)


@fast
@hypothesis.given(KERNELS, st.integers(-20, 20), st.sampled_from(["max", "mean"]))
def test_scale_of_the_layer_does_not_matter(kernel, exponent, normalization):
    scaled = np.ldexp(kernel, exponent)
    for control in None, "mean", "roll", "reverse":
        options = {"normalization": normalization, "control": control}
        chex.assert_trees_all_equal(
            importance_factor(scaled, **options), importance_factor(kernel, **options)
        )


@fast
@hypothesis.given(KERNELS, st.randoms(use_true_random=False))
def test_permutations(kernel, random):
    inputs, nodes = (random.sample(range(n), n) for n in kernel.shape)
    factor = importance_factor(kernel)
    chex.assert_trees_all_equal(importance_factor(kernel[inputs]), factor)
    chex.assert_trees_all_equal(importance_factor(kernel[:, nodes]), factor[np.array(nodes)])


@fast
@hypothesis.given(SHAPES, GAINS, st.sampled_from(["max", "mean"]))
def test_neutral_on_an_all_zero_layer(shape, gain, normalization):
    for bounds in None, (1.5, 2.0):
        factor = importance_factor(
            np.zeros(shape, np.float32), gain=gain, bounds=bounds, normalization=normalization
        )
        chex.assert_trees_all_equal(factor, jnp.ones(shape[1]))


@fast
@hypothesis.given(KERNELS, st.floats(0, 100, width=32), st.sampled_from([0, 1, 2]))
def test_stack_slices_are_independent(kernel, scale, axis):
    numbers = DimensionNumbers(*(i for i in range(3) if i != axis))
    first, second = (
        importance_factor(np.stack([kernel, other], axis), numbers, bounds=None)
        for other in (kernel, np.flip(kernel) * np.float32(scale))
    )
    chex.assert_trees_all_equal(first[0], second[0])
    chex.assert_trees_all_close(first[0], importance_factor(kernel, bounds=None), rtol=1e-6)


def test_factor_of_a_kernel_with_gates():
    kernel = jnp.array([[1.0, 2.0, 3.0, 12.0]])
    factor = importance_factor(kernel, DimensionNumbers(gates=2), bounds=None)
    np.testing.assert_allclose(factor, [1, 2, 0.5, 2], rtol=1e-6)
    with pytest.raises(ValueError, match="3 gates do not divide the last node axis, of 4 nodes"):
        importance_factor(kernel, DimensionNumbers(gates=3))
