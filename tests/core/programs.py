"""Programs with layers that were written down by hand, for tests of infer_dimension_numbers."""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from grapes_optax import (
    DimensionNumbers,
    infer_dimension_numbers,
)

KEY = jax.random.key(0)


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


TOKENS = array(2, 3, dtype=jnp.int32)


class Layer(NamedTuple):
    """Kernels, path to (fan-in, nodes), that are summed; and their biases, path to nodes."""

    kernels: Mapping[str, tuple[Any, Any]]
    biases: Mapping[str, Any] = {}
    gates: int = 1


class Case(NamedTuple):
    """A program, and the layers that it has."""

    make: Callable[[], tuple[Callable, Any, Sequence[Any]]]
    layers: Sequence[Layer]
    options: Mapping[str, Any] = {}
    unsettled: str | None = None  # pattern that the warning matches


def one(kernel="kernel", fan_in=0, nodes=1, bias: str | None = "bias", along=0, gates=1):
    return Layer({kernel: (fan_in, nodes)}, {bias: along} if bias else {}, gates)


def below(branch: str, *layers: Layer):
    """The same layers at paths in a branch."""
    return [
        Layer(
            {f"{branch}/{path}": axes for path, axes in layer.kernels.items()},
            {f"{branch}/{path}": axes for path, axes in layer.biases.items()},
            layer.gates,
        )
        for layer in layers
    ]


def as_tuple(axes):
    return (axes,) if isinstance(axes, int) else tuple(axes)


def by_leaf(description):
    leaves = jax.tree_util.tree_leaves_with_path(
        description, is_leaf=lambda x: x is None or isinstance(x, DimensionNumbers)
    )
    paths = (
        keys[:-1] if keys and keys[-1] == jax.tree_util.GetAttrKey("value") else keys
        for keys, _ in leaves
    )
    names = (jax.tree_util.keystr(path, simple=True, separator="/") for path in paths)
    return {name: value for name, (_, value) in zip(names, leaves, strict=True) if value}


def assert_layers(description, layers):
    found = by_leaf(description)
    expected = {}
    for layer in layers:
        # The label is the path of the kernel that is first in the tree.
        group = next((path or "(root)" for path in found if path in layer.kernels), None)
        for path, (fan_in, nodes) in layer.kernels.items():
            numbers = as_tuple(fan_in), as_tuple(nodes)
            expected[path] = DimensionNumbers(*numbers, group, layer.gates)
        for path, nodes in layer.biases.items():
            expected[path] = DimensionNumbers((), as_tuple(nodes), group)
    assert found == expected


# What is an output layer is tested by itself.
infer_all = functools.partial(infer_dimension_numbers, modulate_output=True)


def inferred(case: Case):
    apply_fn, params, inputs = case.make()
    if case.unsettled is None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return infer_all(apply_fn, params, *inputs, **case.options)
    with pytest.warns(UserWarning, match=case.unsettled) as record:
        description = infer_all(apply_fn, params, *inputs, **case.options)
    assert len(record) == 1
    return description


# Programs of each framework, without computing anything.


def linen(module, *inputs):
    """Of the parameters and, as the first input, the other collections."""

    def make():
        variables = dict(jax.eval_shape(module.init, KEY, *inputs))
        params = variables.pop("params")

        def apply(params, rest, *inputs):
            return module.apply({"params": params, **rest}, *inputs, mutable=list(rest))

        return apply, params, (variables, *inputs)

    return make


def flax_nnx(build, *inputs, call=lambda module, *inputs: module(*inputs)):
    def make():
        graph, params, rest = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))), nnx.Param, ...)

        def apply(params, rest, *inputs):
            return call(nnx.merge(graph, params, rest), *inputs)

        return apply, params, (rest, *inputs)

    return make


def haiku(function, *inputs):
    def make():
        network = hk.transform(function)
        params = jax.eval_shape(network.init, KEY, *inputs)
        return lambda params, *inputs: network.apply(params, None, *inputs), params, inputs

    return make


def equinox(build, *inputs, call=lambda module, *inputs: module(*inputs)):
    def make():
        module = eqx.filter_eval_shape(build, KEY)
        params, rest = eqx.partition(module, lambda x: isinstance(x, jax.ShapeDtypeStruct))
        return lambda params, *x: call(eqx.combine(params, rest), *x), params, inputs

    return make


def plain(function, params, *inputs):
    return lambda: (function, params, inputs)


# What several tables name.

X, IMAGE = array(2, 3, 5), array(2, 8, 8, 4)
ATTENTION = [
    *(
        layer
        for name in ("query", "key", "value")
        for layer in below(name, one(nodes=(1, 2), along=(0, 1)))
    ),
    *below("out", one(fan_in=(0, 1), nodes=2)),
]
CONV = one(fan_in=(0, 1, 2), nodes=3)
STACKED = one(fan_in=1, nodes=2, along=1)
STACKED_CONV = one(fan_in=(1, 2, 3), nodes=4, along=1)


def pair(i, h, bias_i=True, bias_h=True, gates=1, fan_in=0, nodes=1):
    biases = {f"{name}/bias": 0 for name, there in ((i, bias_i), (h, bias_h)) if there}
    kernels = {f"{name}/kernel": (fan_in, nodes) for name in (i, h)}
    return Layer(kernels, biases, gates)


LSTM = [pair("ii", "hi", False), pair("if", "hf", False), pair("ig", "hg", False)]
LSTM += [pair("io", "ho", False)]
SEQUENCE = array(2, 3, 5)
FUSED = {"b": array(28), "u": array(7, 28), "w": array(5, 28)}
STEP, STEPS = (array(2, 5), array(2, 7)), array(3, 2, 5)
SUM = Layer({"w": (0, 1), "u": (0, 1)}, {"b": 0})
GATES = SUM._replace(gates=4)


def sum_of(p, x, h):
    return x @ p["w"] + h @ p["u"] + p["b"]


def split_after(p, x, h):
    i, f, g, o = jnp.split(sum_of(p, x, h), 4, -1)
    return jax.nn.sigmoid(i) * jnp.tanh(g) + jax.nn.sigmoid(f) * jnp.tanh(o)


def split_before(p, x, h):
    parts = zip(jnp.split(x @ p["w"] + p["b"], 4, -1), jnp.split(h @ p["u"], 4, -1), strict=True)
    i, f, g, o = (a + b for a, b in parts)
    return i * g + f * o
