"""The table that people read before they train."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grapes_optax import DimensionNumbers, factors, summary

KERNEL = jnp.array([[1.0, -2.0, 0.0], [2.0, 2.0, 1.0]])


def rows(table):
    header, *lines = table.splitlines()
    starts = [header.index(name) for name in ("shape", "role")]
    return {line[: starts[0]].strip(): line[starts[1] :].split("  ") for line in lines}


def cells(table, path):
    return [cell.strip() for cell in rows(table)[path] if cell.strip()]


def test_roles_sizes_and_factors():
    params = {
        "a": {"kernel": KERNEL, "bias": jnp.zeros(3)},
        "norm": {"scale": jnp.ones(3), "bias": jnp.ones(3)},
        "Dense_1": {"kernel": jnp.stack([KERNEL, -KERNEL]), "bias": jnp.zeros((2, 3))},
        "scalar": 1.0,
    }
    table = summary(params)
    factors = ["1.000", "1.500", "2.000"]
    assert cells(table, "a/kernel") == ["kernel", "a/kernel", "2", "3", "1", *factors]
    assert cells(table, "a/bias") == ["bias", "a/kernel", "3", "1", *factors]
    stacked = ["kernel", "Dense_1/kernel", "2", "3", "2", "1"]
    assert cells(table, "Dense_1/kernel")[:6] == stacked
    for path in "norm/scale", "norm/bias", "scalar":
        assert cells(table, path) == ["left alone"]
    assert len(rows(table)) == 7


def test_options_and_groups():
    group = DimensionNumbers(0, 1, "z")
    params = {"u": KERNEL, "v": KERNEL, "c": jnp.zeros(3)}
    table = summary(
        params, {"u": group, "v": group, "c": DimensionNumbers((), 0, "z")}, bounds=None
    )
    assert cells(table, "u")[-3:] == ["0.500", "1.333", "2.000"]
    assert cells(table, "c")[:2] == ["bias", "z"]


def test_gates():
    table = summary({"u": KERNEL}, {"u": DimensionNumbers(0, 1, "z", gates=3)})
    assert cells(table, "u") == ["kernel", "z", "2", "3", "3", "2.000", "2.000", "2.000"]


def test_shapes_without_values():
    params = {"kernel": jax.ShapeDtypeStruct((2, 3), jnp.float32)}
    assert cells(summary(params), "kernel") == ["kernel", "kernel", "2", "3", "1"]


def test_errors_are_those_of_the_transformation():
    with pytest.raises(ValueError, match="Unknown control"):
        summary({"kernel": KERNEL}, control="shuffle")
    with pytest.raises(ValueError, match=r"of kernel: .*out of range"):
        summary({"kernel": KERNEL}, {"kernel": DimensionNumbers(0, 2)})


def test_factors_are_those_of_the_summary():
    params = {
        "cell": {"w_i": KERNEL, "w_h": jnp.ones((3, 3)), "b": jnp.zeros(3)},
        "Dense_0": {"kernel": jnp.stack([KERNEL, KERNEL[:, ::-1]]), "bias": jnp.zeros((2, 3))},
        "norm": {"scale": jnp.ones(3)},
    }
    for act in factors, jax.jit(factors):
        found = act(params)
        np.testing.assert_allclose(found["cell"]["w_i"], [2 * 6 / 7, 2.0, 2 * 4 / 7], rtol=1e-6)
        assert found["norm"] == {"scale": None}
        for name in "w_h", "b":
            np.testing.assert_array_equal(found["cell"][name], found["cell"]["w_i"])
        stacked = found["Dense_0"]
        np.testing.assert_allclose(stacked["kernel"], [[1.5, 2, 1], [1, 2, 1.5]], rtol=1e-6)
        np.testing.assert_array_equal(stacked["kernel"], stacked["bias"])
    table = summary(params)
    row = cells(table, "cell/w_i")
    assert row[-3:] == [f"{f(found['cell']['w_i']):.3f}" for f in (np.min, np.mean, np.max)]


def test_factors_take_options_and_gates():
    numbers = DimensionNumbers(0, 1, gates=3)
    found = factors({"u": KERNEL}, {"u": numbers}, gain=1.5, bounds=None)
    np.testing.assert_array_equal(found["u"], [1.5, 1.5, 1.5])


def test_empty_tree():
    assert summary({}).split() == summary({"scalar": 1.0}).splitlines()[0].split()
