"""The controls: what stands in for the factors, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import grapes_optax.linen
from grapes_optax import (
    DimensionNumbers,
    factors,
    importance_factor,
    modulate_error,
    scale_by_grapes,
    scale_by_outgoing_importance,
)

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


LSTM = {name: DimensionNumbers(0, 1, group="cell", gates=4) for name in ("w_i", "w_h")}
CASES = {  # parameters, and how they are described; stack axes of the leaves
    "dense": ({"Dense_0": {"kernel": normal(6, 5), "bias": normal(5)}}, None, 0),
    "convolution": ({"Conv_0": {"kernel": normal(3, 3, 4, 7), "bias": normal(7)}}, None, 0),
    "stack": ({"w": normal(3, 6, 5)}, {"w": DimensionNumbers(1, 2)}, 1),
    "gates": ({"w_i": normal(6, 12), "w_h": normal(3, 12)}, LSTM, 0),
    "heads": ({"w": normal(6, 2, 5)}, {"w": DimensionNumbers(0, (1, 2))}, 0),
}
all_cases = pytest.mark.parametrize(("params", "numbers", "stack"), CASES.values(), ids=CASES)


def updates_like(params):
    return jax.tree.map(lambda p: normal(*p.shape), params)


def run(params, updates, numbers, **options):
    tx = scale_by_grapes(numbers, **options)
    return tx.update(updates, tx.init(params), params)[0]


def length(tree, stack):
    """Of every slice of the stack, in float64."""
    squares = [
        (np.asarray(leaf, np.float64) ** 2).reshape(*leaf.shape[:stack], -1).sum(-1)
        for leaf in jax.tree.leaves(tree)
    ]
    return np.sqrt(sum(squares))


@all_cases
def test_norm_is_one_factor_that_makes_the_step_as_long(params, numbers, stack):
    updates = updates_like(params)
    grapes, found = (run(params, updates, numbers, control=c) for c in (None, "norm"))
    np.testing.assert_allclose(length(found, stack), length(grapes, stack), rtol=1e-6)
    ratios = [f / u for f, u in zip(*map(jax.tree.leaves, (found, updates)), strict=True)]
    by_slice = np.concatenate([r.reshape(*r.shape[:stack], -1) for r in ratios], -1)
    np.testing.assert_allclose(by_slice, by_slice[..., :1] * np.ones_like(by_slice), rtol=1e-5)
    assert not np.allclose(length(found, stack), length(updates, stack), rtol=0.05)


@pytest.mark.parametrize("exponent", [-110, -70, 70, 110])
def test_norm_neither_overflows_nor_underflows(exponent):
    params, _, _ = CASES["dense"]
    updates = updates_like(params)
    small = jax.tree.map(lambda u: jnp.asarray(np.ldexp(u, exponent)), updates)
    found, expected = (run(params, u, None, control="norm") for u in (small, updates))
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(np.ldexp(np.asarray(one, float), -exponent), other, rtol=1e-5)


def test_norm_of_no_update():
    params, _, _ = CASES["dense"]
    found = run(params, jax.tree.map(jnp.zeros_like, params), None, control="norm")
    jax.tree.map(lambda u: np.testing.assert_array_equal(u, 0), found)
    nothing = {"Dense_0": {"kernel": jnp.ones((0, 4)), "bias": jnp.ones(4)}}
    jax.tree.map(
        lambda u: np.testing.assert_array_equal(u, 1), run(nothing, nothing, None, control="norm")
    )


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_norm_of_narrow_floats(dtype):
    """Squares of float16 would overflow above 256."""
    params, _, _ = CASES["dense"]
    updates = jax.tree.map(lambda u: (500 * u).astype(dtype), updates_like(params))
    grapes, found = (run(params, updates, None, control=c) for c in (None, "norm"))
    assert {u.dtype for u in jax.tree.leaves(found)} == {jnp.dtype(dtype)}
    np.testing.assert_allclose(length(found, 0), length(grapes, 0), rtol=5e-3)


def test_norm_where_the_bias_is_masked():
    params, _, _ = CASES["dense"]
    updates = updates_like(params)
    masked = {"Dense_0": {"kernel": updates["Dense_0"]["kernel"], "bias": optax.MaskedNode()}}
    found, grapes = (run(params, masked, None, control=c) for c in ("norm", None))
    np.testing.assert_allclose(length(found, 0), length(grapes, 0), rtol=1e-6)


@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f])
def test_norm_of_many_networks(wrap):
    params = {"Dense_0": {"kernel": normal(4, 6, 5)}}
    updates = updates_like(params)
    one = lambda p, u: run(p, u, None, control="norm")  # noqa: E731
    found = wrap(jax.vmap(one))(params, updates)
    for i in range(4):
        alone = one(*(jax.tree.map(lambda x, i=i: x[i], tree) for tree in (params, updates)))
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-6), found, alone)


def test_norm_needs_updates():
    kernel = normal(6, 5)
    refused = [
        lambda: importance_factor(kernel, control="norm"),
        lambda: factors({"kernel": kernel}, control="norm"),
        lambda: grapes_optax.summary({"kernel": kernel}, control="norm"),
        lambda: modulate_error(jnp.ones(5), kernel, control="norm"),
        lambda: grapes_optax.linen.propagated(lambda x: x, control="norm"),
        lambda: scale_by_outgoing_importance(["a", "b"], control="norm"),
    ]
    for call in refused:
        with pytest.raises(ValueError, match="use it in scale_by_grapes, grapes_sgd"):
            call()
    assert grapes_optax.grapes_sgd(0.1, control="norm")
    assert grapes_optax.grapes_rmsprop(0.1, control="norm")


@all_cases
def test_reverse_gives_the_strongest_node_the_factor_of_the_weakest(params, numbers, stack):
    found, grapes = (factors(params, numbers, control=c) for c in ("reverse", None))
    for leaf, of in zip(*map(jax.tree.leaves, (found, grapes)), strict=True):
        layers = 4 if numbers is LSTM else 3**stack
        flat = (np.reshape(x, (layers, -1)) for x in (leaf, of))
        for row, expected in zip(*flat, strict=True):
            order = np.argsort(expected, kind="stable")
            np.testing.assert_array_equal(row[order], np.sort(expected)[::-1])


def test_reverse_of_equal_factors_and_of_a_silent_layer():
    np.testing.assert_array_equal(importance_factor(jnp.ones((3, 4)), control="reverse"), 2)
    np.testing.assert_array_equal(importance_factor(jnp.zeros((3, 4)), control="reverse"), 1)
    tied = jnp.array([[1.0, 4.0, 1.0, 2.0]])
    found = importance_factor(tied, bounds=None, control="reverse")
    assert sorted(found.tolist()) == [0.5, 0.5, 1.0, 2.0]
    assert found[1] == 0.5


@pytest.mark.parametrize("control", ["mean", "roll", "reverse"])
def test_controls_of_the_outgoing_form(control):
    names = list("abcd")
    params = {name: normal(5, 5) for name in names}
    tx = scale_by_outgoing_importance(names, control=control)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    b, c = (importance_factor(params[n].T, bounds=None, control=control) for n in "bc")
    np.testing.assert_allclose(updates["b"], b[:, None] * c[None], rtol=1e-6)
    np.testing.assert_allclose(updates["c"], np.repeat(c[:, None], 5, 1), rtol=1e-6)


def test_reference_has_the_same_reversed_factors():
    kernel = normal(6, 9)
    found = importance_factor(kernel, control="reverse")
    expected = reference.scale(np.ones((6, 9)), kernel, 0, 1, control="reverse")
    np.testing.assert_allclose(found[None] * np.ones((6, 1)), expected, rtol=2e-6)
