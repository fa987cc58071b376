"""Random trees with all that floats can hold: what comes out is what the documentation says.

Importances and factors are those of tests/reference.py in float64, after `as_documented` has
put the limits of float32 into them.
"""

import dataclasses
import itertools
import math
import string
from typing import NamedTuple

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from grapes_optax import (
    DimensionNumbers,
    factors,
    grapes_sgd,
    importance_factor,
    modulate_error,
    node_importance,
    scale_by_grapes,
)

FLOAT32 = np.finfo(np.float32)
FLOATS = [jnp.dtype(name) for name in ("float32", "bfloat16", "float16")]
INTEGERS = [np.dtype(name) for name in ("int8", "uint8", "int32")]
# Sums of these, as many as a layer has, are neither close to the largest float nor to the
# smallest that is not subnormal, nor are their ratios, so that rounding settles nothing.
FINITE = [0.0, -0.0, 20.0, -64.0, 31.7, -96.25, 1e-3, 6e4, 1e-30, 1e-40, -1e-41, 1e38, -3e38]
VALUES = [*FINITE, *FINITE, np.inf, -np.inf, np.nan]

# Each compiles anew: few shapes, which have all kinds of axes.
LAYOUTS = [
    ((3, 4), DimensionNumbers()),
    ((4, 3), DimensionNumbers(1, 0)),
    ((2, 3, 4), DimensionNumbers((0, 1), 2)),
    ((2, 3, 4), DimensionNumbers(1, 2)),
    ((3, 2, 4), DimensionNumbers(0, (2, 1))),
    ((3, 2, 4), DimensionNumbers(0, 2, gates=2)),
    ((0, 4), DimensionNumbers()),
    ((3, 0), DimensionNumbers()),
]
OPTIONS = [
    {"gain": gain, "bounds": bounds, "normalization": normalization, "control": control}
    for (gain, bounds), normalization, control in itertools.product(
        [(2.0, (1.0, 2.0)), (1.0, None), (0.0, (0.0, 0.5)), (7.0, (0.25, np.inf))],
        ["max", "mean"],
        [None, "mean", "roll", "reverse"],
    )
]

cheap = hypothesis.settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=60,
    suppress_health_check=list(hypothesis.HealthCheck),
)


def array_of(shape, dtype):
    """Arrays of these values, or of any integers."""
    if jnp.issubdtype(dtype, jnp.integer):
        return hnp.arrays(dtype, shape)
    size = math.prod(shape)
    drawn = st.lists(st.sampled_from(VALUES), min_size=size, max_size=size)
    return drawn.map(lambda found: cast(np.reshape(np.array(found, float), shape), dtype))


def cast(x, dtype):
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return x.astype(dtype)


# What the documentation says.


def importance_of(kernels, numbers):
    """Of the nodes of one layer, in float64: stack axes first."""
    reduction, output = numbers.reduction_axis, numbers.output_axis
    return sum(reference.node_importance(np.float64(k), reduction, output) for k in kernels)


def as_documented(importance, node_ndim, gates, **options):
    """The factors, in float64."""
    if gates > 1:
        parts = np.split(importance, gates, axis=-1)
        return np.concatenate([as_documented(p, node_ndim, 1, **options) for p in parts], -1)
    if not importance.size:
        return importance
    nodes = tuple(range(importance.ndim - node_ndim, importance.ndim))
    nan = np.isnan(importance).any(nodes, keepdims=True)
    infinite = importance > FLOAT32.max
    importance = np.where(importance < FLOAT32.tiny, 0, importance)
    overflown = infinite.any(nodes, keepdims=True)
    importance = np.where(overflown, np.where(infinite, 1.0, 0.0), importance)
    factor = reference.factor(np.where(nan, 1, importance), node_ndim, **options)
    return np.where(nan, np.nan, np.where(factor < FLOAT32.tiny, 0, factor))


def factor_of(kernels, numbers, **options):
    importance = importance_of(kernels, numbers)
    return as_documented(importance, np.size(numbers.output_axis), numbers.gates, **options)


def product(x, factor):
    """In float64, and then in the type of x: beyond its largest number it is infinite."""
    with np.errstate(invalid="ignore"):
        return cast(np.float64(x) * factor, x.dtype)


def assert_close(actual, expected):
    """Equal but for the rounding of the type; what is subnormal may be zero."""
    kind = jnp.finfo(expected.dtype)
    eps, tiny = max(float(kind.eps), 1e-6), max(float(kind.smallest_subnormal), FLOAT32.tiny)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(
        np.float64(actual), np.float64(expected), rtol=2 * eps, atol=1.5 * float(tiny)
    )


def along(factor, shape, numbers):
    """A factor of stack and nodes, in line with the kernel."""
    reduction, output = (np.atleast_1d(a) for a in (numbers.reduction_axis, numbers.output_axis))
    stack = [axis for axis in range(len(shape)) if axis not in (*reduction, *output)]
    kept = [*stack, *output]
    transposed = factor.transpose([kept.index(axis) for axis in sorted(kept)])
    return np.expand_dims(transposed, tuple(reduction))


# Single layers.


@st.composite
def layers(draw, kinds=(*FLOATS, *INTEGERS), layouts=LAYOUTS, most=1):
    shape, numbers = draw(st.sampled_from(layouts))
    count = draw(st.integers(1, most))
    kernels = [draw(array_of(shape, draw(st.sampled_from(kinds)))) for _ in range(count)]
    return kernels, numbers


@cheap
@hypothesis.given(layers(), st.sampled_from(OPTIONS))
@hypothesis.example(([np.full((3, 4), -128, np.int8)], DimensionNumbers()), OPTIONS[0])
@hypothesis.example(([np.full((3, 4), 3e38, np.float32)], DimensionNumbers()), OPTIONS[0])
def test_bare_arrays(layer, options):
    (kernel,), numbers = layer
    expected = importance_of([kernel], numbers)
    actual = node_importance(kernel, numbers)
    assert actual.dtype == jnp.float32
    assert_close(actual, cast(expected, np.float32))
    actual = importance_factor(kernel, numbers, **options)
    assert actual.dtype == jnp.float32
    assert_close(actual, np.float32(factor_of([kernel], numbers, **options)))


@hypothesis.settings(cheap, max_examples=20)
@hypothesis.given(layers(most=2), st.sampled_from(FLOATS), st.sampled_from(OPTIONS), st.data())
def test_errors_at_a_pre_activation(layer, dtype, options, data):
    kernels, numbers = layer
    factor = factor_of(kernels, numbers, **options)
    shape = (5, *factor.shape)
    z, error = (data.draw(array_of(shape, dtype)) for _ in range(2))
    value, vjp = jax.vjp(
        lambda z: modulate_error(z, *kernels, weight_dimension_numbers=numbers, **options),
        jnp.asarray(z),
    )
    np.testing.assert_array_equal(np.asarray(value).view(np.uint8), z.view(np.uint8))
    (actual,) = vjp(jnp.asarray(error))
    assert actual.dtype == dtype
    assert_close(actual, product(error, factor))


# Trees.


class Pair(NamedTuple):
    first: object
    second: object


@dataclasses.dataclass
class Layer:
    """Kernels that are summed into one pre-activation and their bias, with updates."""

    numbers: DimensionNumbers
    params: dict[str, np.ndarray]
    updates: dict[str, np.ndarray]

    @property
    def kernels(self):
        return [leaf for name, leaf in self.params.items() if name != "bias"]

    def factors(self, **options):
        """Of each leaf, stack axes first."""
        return dict.fromkeys(self.params, factor_of(self.kernels, self.numbers, **options))

    def modulated(self, **options):
        found = {}
        for name, factor in self.factors(**options).items():
            shape = self.params[name].shape
            lined = factor if name == "bias" else along(factor, shape, self.numbers)
            found[name] = product(self.updates[name], lined)
        return found

    def description(self, label):
        numbers = self.numbers._replace(group=label)
        found = dict.fromkeys(self.params, numbers)
        if "bias" in found:
            ndim, nodes = self.params["bias"].ndim, np.size(numbers.output_axis)
            axes = tuple(range(ndim - nodes, ndim))
            found["bias"] = numbers._replace(reduction_axis=(), output_axis=axes)
        return found


@dataclasses.dataclass
class Other:
    """A leaf that is no part of a layer."""

    array: np.ndarray


@st.composite
def layer_leaves(draw, layouts=LAYOUTS, most=2):
    kernels, numbers = draw(layers(FLOATS, layouts, most))
    params = dict(zip(["kernel", "recurrent"], kernels, strict=False))
    if draw(st.booleans()):
        shape = importance_of(kernels, numbers).shape
        params["bias"] = draw(array_of(shape, draw(st.sampled_from(FLOATS))))
    updates = {
        name: draw(array_of(leaf.shape, draw(st.sampled_from(FLOATS))))
        for name, leaf in params.items()
    }
    return Layer(numbers, params, updates)


@st.composite
def other_leaves(draw):
    dtype = draw(st.sampled_from([*FLOATS, *INTEGERS]))
    shape = draw(st.sampled_from([(), (3,), (0,)] + [(2, 2)] * (dtype in INTEGERS)))
    return Other(draw(array_of(shape, dtype)))


def trees(leaves):
    def branches(children):
        few = {"max_size": 3}
        return st.one_of(
            st.dictionaries(st.sampled_from(string.ascii_lowercase[:5]), children, **few),
            st.lists(children, **few),
            st.lists(children, **few).map(tuple),
            st.builds(Pair, children, children),
        )

    leaf = st.one_of(leaves, other_leaves(), st.none())
    return st.recursive(leaf, branches, max_leaves=6).map(lambda tree: {"root": tree})


def each(of_layer, of_other, tree):
    return jax.tree.map(lambda x: (of_layer if isinstance(x, Layer) else of_other)(x), tree)


def check_tree(tree, description, options):
    params = each(lambda layer: layer.params, lambda other: other.array, tree)
    updates = each(lambda layer: layer.updates, lambda other: other.array, tree)
    tx = scale_by_grapes(description, **options)
    actual, _ = tx.update(updates, tx.init(params), params)
    assert jax.tree.structure(actual) == jax.tree.structure(updates)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), actual) == jax.tree.map(
        lambda x: (x.shape, x.dtype), updates
    )

    def whole(leaves):  # what is left alone, bit for bit
        return [np.asarray(x) for x in jax.tree.leaves(leaves)]

    expected = each(lambda layer: layer.modulated(**options), lambda other: other.array, tree)
    alone = jax.tree.leaves(each(lambda layer: dict.fromkeys(layer.params, 0), lambda _: 1, tree))
    for found, wanted, same in zip(whole(actual), whole(expected), alone, strict=True):
        (np.testing.assert_array_equal if same else assert_close)(found, wanted)

    found = factors(params, description, **options)
    wanted = each(lambda layer: layer.factors(**options), lambda _: None, tree)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for actual, expected in zip(whole(found), whole(wanted), strict=True):
        assert_close(actual, np.float32(expected))


@cheap
@hypothesis.given(trees(layer_leaves()), st.sampled_from(OPTIONS))
def test_described_trees(tree, options):
    label = itertools.count()
    description = each(lambda layer: layer.description(next(label)), lambda _: None, tree)
    check_tree(tree, description, options)


@cheap
@hypothesis.given(trees(layer_leaves(LAYOUTS[:1], most=1)), st.sampled_from(OPTIONS))
def test_named_trees(tree, options):
    check_tree(tree, None, options)


# Finite in, finite out; what has no gradient.


@cheap
@hypothesis.given(st.data(), st.sampled_from(["max", "mean"]))
def test_finite_weights_have_finite_factors_in_their_order(data, normalization):
    """Over the whole range of floats, at the limits of which the value is not asked for."""
    elements = st.floats(-FLOAT32.max.item(), FLOAT32.max.item(), width=32)
    kernel = data.draw(hnp.arrays(np.float32, (3, 4), elements=elements))
    factor = np.asarray(importance_factor(kernel, bounds=None, normalization=normalization))
    assert np.isfinite(factor).all()
    assert factor.max() > 0
    sums = np.abs(np.float64(kernel)).sum(0)
    order = np.argsort(sums)
    assert (np.diff(factor[order]) >= -1e-6).all()
    if 1e-37 <= sums.max() <= 0.99 * FLOAT32.max and sums.min() > 1e-30 * sums.max():
        expected = reference.factor(sums, 1, bounds=None, normalization=normalization)
        np.testing.assert_allclose(factor, expected, rtol=1e-5)


def test_integers_beside_a_kernel_are_no_bias():
    params = {"Dense_0": {"kernel": jnp.array([[1.0, 2.0, 4.0]]), "bias": jnp.arange(3)}}
    grads = jax.grad(lambda p: p["Dense_0"]["kernel"].sum(), allow_int=True)(params)
    for description in None, DimensionNumbers():
        tx = scale_by_grapes(description, bounds=None)
        for bias in grads["Dense_0"]["bias"], jnp.arange(3):  # of type float0; integers
            updates = {"Dense_0": grads["Dense_0"] | {"bias": bias}}
            found, _ = tx.update(updates, tx.init(params), params)
            np.testing.assert_array_equal(found["Dense_0"]["kernel"], [[0.5, 1, 2]])
            assert found["Dense_0"]["bias"] is bias


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int32, bool])
def test_updates_of_integers_are_refused(dtype):
    params = {"kernel": jnp.ones((2, 3))}
    tx = scale_by_grapes()
    with pytest.raises(TypeError, match=f"must be of floats, got {jnp.dtype(dtype)}"):
        tx.update({"kernel": jnp.ones((2, 3), dtype)}, tx.init(params), params)


@pytest.mark.parametrize("options", [{"gain": 1e39}, {"bounds": (1e39, 1e40)}])
def test_options_beyond_the_largest_float(options):
    for refused in importance_factor, lambda _, **kw: grapes_sgd(0.1, **kw):
        with pytest.raises(ValueError, match=r"finite.*in float32"):
            refused(jnp.ones((2, 3)), **options)
