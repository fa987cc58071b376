"""modulate_error on bare arrays, alignment, and the authors' outgoing importance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from grapes_optax import (
    DimensionNumbers,
    alignment,
    modulate_error,
    scale_by_outgoing_importance,
)

RNG = np.random.default_rng(0)


def normal(*shape, dtype=jnp.float32):
    return jnp.asarray(RNG.normal(size=shape), dtype)


def cotangent(z, *kernels, **options):
    """What becomes of a cotangent of ones."""
    value, vjp = jax.vjp(lambda z: modulate_error(z, *kernels, **options), z)
    np.testing.assert_array_equal(value, z)
    return vjp(jnp.ones_like(z))[0]


def factor(kernel, reduction, output, **options):
    return reference.factor(
        reference.node_importance(kernel, reduction, output), np.size(output), **options
    )


CASES = {
    "dense": ((4, 7), (5, 7), (0, 1), (7,)),
    "no batch": ((7,), (5, 7), (0, 1), (7,)),
    "sequence": ((2, 3, 7), (5, 7), (0, 1), (7,)),
    "conv": ((2, 4, 4, 6), (3, 3, 2, 6), ((0, 1, 2), 3), (6,)),
    "heads": ((4, 3, 2), (5, 3, 2), (0, (1, 2)), (3, 2)),
    "nodes first": ((4, 7), (7, 5), (1, 0), (7,)),
    "a layer for each position": ((2, 3, 7), (3, 5, 7), (1, 2), (3, 7)),
    "a layer for each example": ((2, 4, 7), (2, 5, 7), (1, 2), (2, 1, 7)),
}


@pytest.mark.parametrize(("z", "kernel", "axes", "shape"), CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize(
    "options", [{}, {"bounds": None}, {"control": "roll"}, {"control": "reverse"}]
)
def test_cotangent_is_multiplied(z, kernel, axes, shape, options):
    kernel = normal(*kernel)
    actual = cotangent(
        normal(*z), kernel, weight_dimension_numbers=DimensionNumbers(*axes), **options
    )
    expected = np.broadcast_to(factor(kernel, *axes, **options).reshape(shape), z)
    np.testing.assert_allclose(actual, expected, rtol=2e-6)


def test_kernels_of_one_pre_activation_and_their_gates():
    kernel, recurrent = normal(5, 12), normal(3, 12)
    sums = np.abs(kernel).sum(0) + np.abs(recurrent).sum(0)
    expected = reference.factor(sums.reshape(4, 3), 1).ravel()
    gated = DimensionNumbers(gates=4)
    actual = cotangent(normal(2, 12), kernel, recurrent, weight_dimension_numbers=gated)
    np.testing.assert_allclose(actual[0], expected, rtol=2e-6)
    # A gate alone has the same factors: fused and unfused cells agree.
    alone = cotangent(normal(2, 3), kernel[:, 3:6], recurrent[:, 3:6])
    np.testing.assert_allclose(actual[:, 3:6], alone, rtol=1e-6)
    first, second = DimensionNumbers(1, 0), DimensionNumbers(0, 1)
    mixed = cotangent(normal(2, 12), kernel.T, recurrent, weight_dimension_numbers=[first, second])
    np.testing.assert_allclose(mixed, cotangent(normal(2, 12), kernel, recurrent), rtol=1e-6)


def test_gates_of_several_node_axes():
    kernel = normal(5, 2, 6)
    numbers = DimensionNumbers(0, (1, 2))
    gated = numbers._replace(gates=3)
    actual = cotangent(normal(4, 2, 6), kernel, weight_dimension_numbers=gated)
    for gate in range(3):
        part = slice(2 * gate, 2 * gate + 2)
        alone = cotangent(normal(4, 2, 2), kernel[..., part], weight_dimension_numbers=numbers)
        np.testing.assert_allclose(actual[..., part], alone, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_types_stay(dtype):
    actual = cotangent(normal(4, 7, dtype=dtype), normal(5, 7))
    assert actual.dtype == dtype


def test_no_gradient_to_the_kernel():
    kernel = normal(5, 7)
    gradient = jax.grad(lambda kernel: modulate_error(jnp.ones(7), kernel).sum())(kernel)
    np.testing.assert_array_equal(gradient, jnp.zeros_like(kernel))


@pytest.mark.parametrize(
    ("z", "kernels", "options", "message"),
    [
        ((4, 5), [(5, 7)], {}, r"nodes \(7,\) against the shape \(4, 5\)"),
        ((), [(5, 7)], {}, "do not match"),
        ((4, 7), [], {}, "needs the kernels"),
        ((4, 7), [(5, 7), (7, 5)], {}, r"same nodes, got \[\(7,\), \(5,\)\]"),
        (
            (4, 7),
            [(5, 7)],
            {"weight_dimension_numbers": DimensionNumbers(gates=2)},
            "2 gates do not divide the last node axis, of 7 nodes",
        ),
        (
            (4, 7),
            [(5, 7)],
            {"weight_dimension_numbers": DimensionNumbers(gates=0)},
            "gates must be a positive int, got 0",
        ),
        (
            (4, 6),
            [(5, 6), (5, 6)],
            {"weight_dimension_numbers": [DimensionNumbers(gates=2), DimensionNumbers(gates=3)]},
            r"same gates, got \[2, 3\]",
        ),
        ((4, 7), [(5, 7)], {"weight_dimension_numbers": []}, "1 kernels have 0"),
        ((4, 7), [(7,)], {}, "A kernel has two axes or more"),
        (
            (3, 3, 7),
            [(3, 5, 7)],
            {"weight_dimension_numbers": DimensionNumbers(1, 2)},
            r"may hold the stack \(3,\) in front or before its nodes",
        ),
        ((4, 7), [(5, 7)], {"control": "x"}, "Unknown control"),
    ],
)
def test_errors(z, kernels, options, message):
    with pytest.raises(ValueError, match=message):
        modulate_error(normal(*z), *(normal(*shape) for shape in kernels), **options)


# Alignment


def test_alignment():
    first, second = ({"a": normal(5, 7), "b": {"c": normal(3)}} for _ in range(2))
    result = jax.jit(alignment)(first, second)
    assert list(result) == ["a", "b/c"]
    for (angle, ratio), a, b in zip(
        result.values(), jax.tree.leaves(first), jax.tree.leaves(second), strict=True
    ):
        a, b = (np.ravel(np.asarray(x, np.float64)) for x in (a, b))
        lengths = np.linalg.norm(a), np.linalg.norm(b)
        np.testing.assert_allclose(
            angle, np.degrees(np.arccos(a @ b / np.prod(lengths))), rtol=1e-5
        )
        np.testing.assert_allclose(ratio, lengths[0] / lengths[1], rtol=1e-5)


def test_alignment_at_the_ends():
    a = normal(50, 70)
    angles = [float(alignment([a], [b])["0"].angle) for b in (a, -a, 3 * a)]
    np.testing.assert_allclose(angles, [0, 180, 0], atol=1e-3)
    assert jnp.isnan(alignment([a], [0 * a])["0"].angle)


@pytest.mark.parametrize("scale", [1e-37, 1e-20, 1e19, 1e38])
def test_alignment_of_very_small_and_very_large_arrays(scale):
    a, b = np.full(10, scale, np.float32), np.arange(1.0, 11)
    angle, ratio = jax.jit(alignment)([a], [b])["0"]
    expected = np.degrees(np.arccos(b.sum() / np.linalg.norm(b) / np.sqrt(10)))
    np.testing.assert_allclose(angle, expected, rtol=1e-5)
    np.testing.assert_allclose(ratio, np.sqrt(10) / np.linalg.norm(b) * scale, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(alignment)([a], [a])["0"], [0, 1])


def test_alignment_of_a_part_of_the_parameters():
    params = {"Dense_0": {"kernel": normal(5, 7), "bias": normal(7)}}
    assert list(alignment({"Dense_0": {"kernel": normal(5, 7)}}, params)) == ["Dense_0/kernel"]
    for other in {"Dense_1": {"kernel": normal(5, 7)}}, {"Dense_0": {"kernel": normal(5, 3)}}:
        with pytest.raises(ValueError, match=r"no leaf Dense_./kernel of shape"):
            alignment(other, params)


# The authors' outgoing importance


def test_outgoing_importance():
    sizes = [5, 4, 6, 3, 2]
    params = {str(i): normal(*sizes[i : i + 2]) for i in range(4)}
    grads = {str(i): normal(*sizes[i : i + 2]) for i in range(4)}
    tx = scale_by_outgoing_importance(list("0123"))
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    c = {i: factor(params[str(i)], 1, 0, bounds=None) for i in (1, 2)} | {3: np.ones(3)}
    for i in 0, 3:
        np.testing.assert_array_equal(updates[str(i)], grads[str(i)])
    for i in 1, 2:
        expected = c[i][:, None] * np.asarray(grads[str(i)]) * c[i + 1]
        np.testing.assert_allclose(updates[str(i)], expected, rtol=1e-5)
