"""Wrong calls of every public function: the exception names the argument, and what is right."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx as flax_nnx

import grapes_optax as g
from grapes_optax import DimensionNumbers, linen, nnx
from grapes_optax.spiking import rate_code

K = jnp.ones((4, 6))
P = {"a": {"kernel": K, "bias": jnp.ones(6)}, "out": {"kernel": jnp.ones((6, 3))}}
G = jax.tree.map(jnp.ones_like, P)
KEY = jax.random.key(0)
CHAIN = {name: jnp.ones((3, 3)) for name in "abc"}


def init(description, params=P):
    return g.scale_by_grapes(description).init(params)


def update(updates, params, description=None):
    return g.scale_by_grapes(description).update(updates, optax.EmptyState(), params)


def outgoing(layers, updates=CHAIN, params=CHAIN):
    return g.scale_by_outgoing_importance(layers).update(updates, optax.EmptyState(), params)


# Options of the factor, wherever they are given: the keyword, and the phrase that names it.
OPTIONS = [
    ({"gain": -1}, ValueError, "gain must be finite and not negative, got -1"),
    ({"gain": np.float32("nan")}, ValueError, "gain must be finite and not negative, got nan"),
    ({"gain": float("inf")}, ValueError, "gain must be finite"),
    ({"gain": jnp.array(-2.0)}, ValueError, "gain must be finite and not negative"),
    ({"gain": np.array(-2.0)}, ValueError, "gain must be finite and not negative"),
    ({"gain": jnp.ones(2)}, ValueError, "gain must be one real number"),
    ({"gain": np.ones((1, 1))}, ValueError, "gain must be one real number"),
    ({"gain": 1j}, TypeError, "gain must be a number, got 1j"),
    ({"gain": jnp.array(True)}, ValueError, "gain must be one real number"),
    ({"gain": True}, TypeError, "gain must be a number, got True"),
    ({"gain": "2"}, TypeError, "gain must be a number, got '2'"),
    ({"gain": None}, TypeError, "gain must be a number, got None"),
    ({"gain": optax.constant_schedule(2.0)}, TypeError, "goes through optax.inject_hyperparams"),
    ({"bounds": (2, 1)}, ValueError, "bounds must satisfy 0 <= low <= high, got (2, 1)"),
    ({"bounds": (-1, 1)}, ValueError, "bounds must satisfy"),
    ({"bounds": (float("nan"), 1)}, ValueError, "bounds must satisfy"),
    ({"bounds": (1, float("nan"))}, ValueError, "bounds must satisfy"),
    ({"bounds": (float("inf"),) * 2}, ValueError, "bounds must satisfy"),
    ({"bounds": 2.0}, ValueError, "bounds must be a pair of numbers (low, high)"),
    ({"bounds": (1,)}, ValueError, "bounds must be a pair"),
    ({"bounds": (1, 2, 3)}, ValueError, "bounds must be a pair"),
    ({"bounds": "12"}, ValueError, "bounds must be a pair"),
    ({"bounds": ("low", "high")}, ValueError, "bounds must be a pair"),
    ({"bounds": (None, 2)}, ValueError, "bounds must be a pair"),
    ({"bounds": {"low": 1, "high": 2}}, ValueError, "bounds must be a pair"),
    ({"normalization": "sum"}, ValueError, "Unknown normalization 'sum': choose one of"),
    ({"normalization": None}, ValueError, "Unknown normalization None"),
    ({"normalization": ["max"]}, ValueError, "Unknown normalization ['max']"),
    ({"normalization": jnp.max}, ValueError, "Unknown normalization"),
    ({"control": "shuffle"}, ValueError, "Unknown control 'shuffle': choose one of"),
    ({"control": ""}, ValueError, "Unknown control ''"),
    ({"control": ["mean"]}, ValueError, "Unknown control ['mean']"),
    ({"control": True}, ValueError, "Unknown control True"),
]
TAKE_OPTIONS = {
    "scale_by_grapes": g.scale_by_grapes,
    "grapes_sgd": lambda **options: g.grapes_sgd(0.1, **options),
    "grapes_rmsprop": lambda **options: g.grapes_rmsprop(0.1, **options),
    "importance_factor": lambda **options: g.importance_factor(K, **options),
    "modulate_error": lambda **options: g.modulate_error(jnp.ones(6), K, **options),
    "summary": lambda **options: g.summary(P, **options),
    "factors": lambda **options: g.factors(P, **options),
    "scale_by_outgoing_importance": lambda **options: g.scale_by_outgoing_importance(
        ["a", "b"], **options
    ),
}


@pytest.mark.parametrize("name", TAKE_OPTIONS)
@pytest.mark.parametrize(("options", "error", "phrase"), OPTIONS)
def test_options(name, options, error, phrase):
    if name == "scale_by_outgoing_importance" and "control" in options:
        pytest.skip("has no control")
    with pytest.raises(error, match=re.escape(phrase)):
        TAKE_OPTIONS[name](**options)


# Descriptions, wherever they are given.
DESCRIPTIONS = [
    ("kernel", TypeError, "weight_dimension_numbers holds 'kernel' at (root)"),
    (3, TypeError, "weight_dimension_numbers holds 3 at (root)"),
    ({"a": 3, "out": None}, TypeError, "weight_dimension_numbers holds 3 at a"),
    ((0, 1), TypeError, "weight_dimension_numbers holds 0 at 0"),
    ({"a": None}, ValueError, "says nothing of out/kernel"),
    ({"a": None, "out": None, "b": DimensionNumbers()}, ValueError, "describes b, where they have"),
    (
        {"a": DimensionNumbers(), "out": DimensionNumbers(0, 2)},
        ValueError,
        "of out/kernel: output_",
    ),
    ({"a": None, "out": DimensionNumbers(0, 0)}, ValueError, "must name distinct axes"),
    ({"a": None, "out": DimensionNumbers((), 1)}, ValueError, "out/kernel leave no fan-in"),
    ({"a": None, "out": DimensionNumbers(0, ())}, ValueError, "output_axis is empty"),
    ({"a": None, "out": DimensionNumbers("0", 1)}, TypeError, "reduction_axis must be an int or"),
    ({"a": None, "out": DimensionNumbers(0.0, 1)}, TypeError, "reduction_axis must be an int or"),
    ({"a": None, "out": DimensionNumbers(False, True)}, TypeError, "reduction_axis must be an int"),
    ({"a": None, "out": DimensionNumbers(None, 1)}, TypeError, "reduction_axis must be an int or"),
    ({"a": None, "out": DimensionNumbers(group=[])}, TypeError, "out/kernel: unhashable"),
    ({"a": None, "out": DimensionNumbers(gates=2)}, ValueError, "2 gates do not divide"),
    ({"a": None, "out": DimensionNumbers(gates=0)}, ValueError, "gates must be a positive int"),
    ({"a": None, "out": DimensionNumbers(gates=True)}, ValueError, "gates must be a positive int"),
    ({"a": None, "out": DimensionNumbers(gates="4")}, ValueError, "gates must be a positive int"),
    (lambda params: None, TypeError, "is a function that returned None"),
    (lambda params: "kernel", TypeError, "holds 'kernel' at (root)"),
    (
        g.by_path(lambda path: False),
        ValueError,
        "`where` selects none of the kernels: there are a/",
    ),
    (jnp.ones(3), TypeError, "weight_dimension_numbers holds"),
]
TAKE_DESCRIPTIONS = {
    "init": init,
    "update": lambda description: update(G, P, description),
    "grapes_sgd": lambda numbers: g.grapes_sgd(0.1, weight_dimension_numbers=numbers).init(P),
    "grapes_rmsprop": lambda numbers: g.grapes_rmsprop(0.1, weight_dimension_numbers=numbers).init(
        P
    ),
    "summary": lambda description: g.summary(P, description),
    "factors": lambda description: g.factors(P, description),
}


@pytest.mark.parametrize("name", TAKE_DESCRIPTIONS)
@pytest.mark.parametrize(("description", "error", "phrase"), DESCRIPTIONS)
def test_descriptions(name, description, error, phrase):
    with pytest.raises(error, match=re.escape(phrase)):
        TAKE_DESCRIPTIONS[name](description)


# One kernel, and the numbers that describe it.
KERNELS = [
    ((K, 3.0), TypeError, "weight_dimension_numbers must be DimensionNumbers"),
    ((K, "last"), TypeError, "weight_dimension_numbers must be DimensionNumbers"),
    ((K, (0, 1)), TypeError, "weight_dimension_numbers must be DimensionNumbers"),
    ((K, DimensionNumbers(0, 2)), ValueError, "names axis 2, out of range for 2 axes"),
    ((K, DimensionNumbers(0, 0)), ValueError, "must name distinct axes"),
    ((K, DimensionNumbers((), 1)), ValueError, "leaves no fan-in"),
    ((K, DimensionNumbers(gates=4)), ValueError, "4 gates do not divide the last node axis"),
    ((jnp.ones(4),), ValueError, "A kernel has two axes or more"),
    ((1.0,), ValueError, "A kernel has two axes or more"),
    (("kernel",), TypeError, "The kernel must be an array of numbers, got 'kernel'"),
    ((None,), TypeError, "The kernel must be an array of numbers, got None"),
    ((P,), TypeError, "The kernel must be an array of numbers, got {"),
    ((K > 0,), TypeError, "The kernel must be an array of numbers, got an array of bool"),
]


@pytest.mark.parametrize("function", [g.node_importance, g.importance_factor])
@pytest.mark.parametrize(("arguments", "error", "phrase"), KERNELS)
def test_kernels(function, arguments, error, phrase):
    with pytest.raises(error, match=re.escape(phrase)):
        function(*arguments)


@pytest.mark.parametrize(("arguments", "error", "phrase"), KERNELS)
def test_kernels_of_a_pre_activation(arguments, error, phrase):
    kernel, *numbers = arguments
    if numbers == [(0, 1)]:
        pytest.skip("a sequence has one for each kernel")
    with pytest.raises(error, match=re.escape(phrase)):
        g.modulate_error(
            jnp.ones(6), kernel, weight_dimension_numbers=numbers[0] if numbers else None
        )


CALLS = {
    "modulate_error, no kernel": (
        lambda: g.modulate_error(jnp.ones(6)),
        ValueError,
        "modulate_error needs the kernels",
    ),
    "modulate_error, z of other nodes": (
        lambda: g.modulate_error(jnp.ones(5), K),
        ValueError,
        "nodes of the kernel do not match the pre-activation",
    ),
    "modulate_error, z is no array": (
        lambda: g.modulate_error("z", K),
        TypeError,
        "z must be an array, got 'z'",
    ),
    "modulate_error, z of integers": (
        lambda: g.modulate_error(jnp.ones(6, int), K),
        TypeError,
        "z must be an array of floats, got int32",
    ),
    "modulate_error, other nodes": (
        lambda: g.modulate_error(jnp.ones(6), K, jnp.ones((4, 5))),
        ValueError,
        "must have the same nodes",
    ),
    "modulate_error, too few numbers": (
        lambda: g.modulate_error(jnp.ones(6), K, K, weight_dimension_numbers=[DimensionNumbers()]),
        ValueError,
        "2 kernels have 1 weight_dimension_numbers",
    ),
    "by_path, a name": (
        lambda: g.by_path("output"),
        TypeError,
        "where must be a function of a path",
    ),
    "by_path, names": (lambda: g.by_path(["a"]), TypeError, "where must be a function of a path"),
    "by_path, the parameters": (lambda: g.by_path(P), TypeError, "where must be a function"),
    "by_path, a step count": (
        lambda: g.by_path()(jnp.zeros((), int)),
        TypeError,
        'static_args="weight_dimension_numbers"',
    ),
    "by_path, a string": (lambda: g.by_path()("kernel"), TypeError, "by_path describes parameters"),
    "by_path, under inject_hyperparams": (
        lambda: optax.inject_hyperparams(g.grapes_sgd)(
            0.1, weight_dimension_numbers=g.by_path()
        ).init(P),
        TypeError,
        'static_args="weight_dimension_numbers"',
    ),
    "params, a string": (lambda: init(None, "kernel"), TypeError, "params hold 'kernel' at (root)"),
    "params, with a string": (
        lambda: init(None, P | {"name": "net"}),
        TypeError,
        "params hold 'net' at name",
    ),
    "init, of integers": (
        lambda: init(DimensionNumbers(), jnp.ones((2, 3), int)),
        TypeError,
        "of (root): int32 cannot be modulated",
    ),
    "init, of a number": (
        lambda: init({"a": DimensionNumbers()}, {"a": 1.0}),
        TypeError,
        "of a: 1.0 cannot be modulated",
    ),
    "update, without params": (
        lambda: g.scale_by_grapes().update(G, optax.EmptyState()),
        ValueError,
        "call update(updates, state, params)",
    ),
    "update, of other params": (
        lambda: update(G, {"params": {"net": P}}),
        ValueError,
        "updates and params must be trees of the same arrays",
    ),
    "update, of another shape": (
        lambda: update(G | {"out": {"kernel": jnp.ones((1, 3))}}, P),
        ValueError,
        "out/kernel has the shape (1, 3) among the updates, and (6, 3)",
    ),
    "grapes_sgd, unknown order": (
        lambda: g.grapes_sgd(0.1, modulate="both"),
        ValueError,
        "Unknown modulate 'both': choose one of",
    ),
    "grapes_rmsprop, unknown order": (
        lambda: g.grapes_rmsprop(0.1, modulate=["updates"]),
        ValueError,
        "Unknown modulate ['updates']: choose one of",
    ),
    "outgoing, one layer": (lambda: outgoing(["a"]), ValueError, "two kernels or more"),
    "outgoing, a string": (lambda: outgoing("abc"), ValueError, "two kernels or more"),
    "outgoing, no paths": (lambda: outgoing(3), TypeError, "layers must be a sequence of paths"),
    "outgoing, the layers": (
        lambda: outgoing([K, K]),
        TypeError,
        "layers must be a sequence of paths",
    ),
    "outgoing, a path twice": (lambda: outgoing(["a", "b", "a"]), ValueError, "names a twice"),
    "outgoing, unknown": (
        lambda: outgoing(["a", "d"]),
        ValueError,
        "d is no dense kernel among the parameters: there are a, b, c",
    ),
    "outgoing, not dense": (
        lambda: outgoing(["a", "b"], {"a": jnp.ones(3), "b": K}, {"a": jnp.ones(3), "b": K}),
        ValueError,
        "a is no dense kernel",
    ),
    "outgoing, not in a chain": (
        lambda: outgoing(["a", "b"], {"a": K, "b": K}, {"a": K, "b": K}),
        ValueError,
        "the 6 nodes of a are not the 4 inputs of b",
    ),
    "outgoing, without params": (
        lambda: outgoing(["a", "b"], CHAIN, None),
        ValueError,
        "call update(updates, state, params)",
    ),
    "alignment, missing": (
        lambda: g.alignment({"a": K}, {"b": K}),
        ValueError,
        "the second tree has no leaf a of shape (4, 6)",
    ),
    "alignment, another shape": (
        lambda: g.alignment({"a": K}, {"a": K.T}),
        ValueError,
        "the second tree has no leaf a of shape (4, 6)",
    ),
    **{
        f"SNU of {name}, {options}": (
            lambda make=make, options=options: make(**{"features": 3} | options),
            ValueError,
            phrase,
        )
        for name, make in {
            "linen": lambda **options: linen.SNU(**options),
            "nnx": lambda features, **options: nnx.SNU(
                2, features, rngs=flax_nnx.Rngs(0), **options
            ),
        }.items()
        for options, phrase in [
            ({"features": 0}, "features, the number of units, must be positive; got 0"),
            ({"features": 2.5}, "features, the number of units, must be positive; got 2.5"),
            ({"decay": float("nan")}, "must be in [0, 1]; got nan"),
            ({"decay": 1.5}, "must be in [0, 1]; got 1.5"),
            ({"decay": -0.1}, "must be in [0, 1]; got -0.1"),
        ]
    },
    **{
        f"{rule.__name__}, layers={layers}": (
            lambda rule=rule, layers=layers: rule(len, layers=layers),
            TypeError,
            "layers must map classes to DimensionNumbers",
        )
        for rule in (linen.propagated, nnx.feedback_alignment, linen.direct_feedback_alignment)
        for layers in ([object], {object: 3}, {"Dense": DimensionNumbers()})
    },
    "rate_code, rate": (
        lambda: rate_code(KEY, jnp.ones((1, 3)), rate=5),
        ValueError,
        "rate must be a probability in [0, 1], got 5",
    ),
    "rate_code, rate, not a number": (
        lambda: rate_code(KEY, jnp.ones((1, 3)), rate=float("nan")),
        ValueError,
        "rate must be a probability in [0, 1], got nan",
    ),
    "rate_code, steps": (
        lambda: rate_code(KEY, jnp.ones((1, 3)), steps=0),
        ValueError,
        "steps must be a positive int, got 0",
    ),
    "rate_code, half a step": (
        lambda: rate_code(KEY, jnp.ones((1, 3)), steps=2.5),
        ValueError,
        "steps must be a positive int, got 2.5",
    ),
    "rate_code, integers": (
        lambda: rate_code(KEY, jnp.ones((1, 3), int)),
        TypeError,
        "images must be floats",
    ),
    "rate_code, pixels": (
        lambda: rate_code(KEY, 255 * jnp.ones((1, 3))),
        ValueError,
        "takes pixels in [0, 1]",
    ),
    "rate_code, not a number": (
        lambda: rate_code(KEY, jnp.array([jnp.nan])),
        ValueError,
        "takes pixels in [0, 1]",
    ),
    "rate_code, a pixel": (
        lambda: rate_code(KEY, jnp.array(0.5)),
        ValueError,
        "images must have an axis of pixels",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls(name):
    call, error, phrase = CALLS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(error, match=re.escape(phrase)):
            call()
