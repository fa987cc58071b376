"""Optax's own tests of its optimizers, read from the installed wheel and pointed at ours."""

import functools
import importlib.util
import itertools
import os
import pathlib
import types
import unittest
import warnings
from unittest import mock

import jax
import optax
import pytest
from absl.testing import parameterized

from grapes_optax import DimensionNumbers, grapes_rmsprop, grapes_sgd, scale_by_grapes

# The suites name no leaf, so that the default description knows no kernel in them.
pytestmark = pytest.mark.filterwarnings("ignore:GRAPES modulates nothing:UserWarning")


@pytest.fixture(autouse=True)
def _as_optax_runs_its_tests():
    x64 = jax.config.jax_enable_x64
    with jax.numpy_dtype_promotion("standard"):  # Optax itself promotes.
        yield
    jax.config.update("jax_enable_x64", x64)  # Where Float64Test fails it leaves it on.


# What is tested.


def by_rank(params):
    known = {2: DimensionNumbers(0, 1), 3: DimensionNumbers((0, 1), 2)}
    return jax.tree.map(lambda leaf: known.get(leaf.ndim), params)


def as_kernels(tree):
    """A tree of vectors alone as kernels of one input; other trees as they are."""
    vectors = all(leaf.ndim == 1 for leaf in jax.tree.leaves(tree))
    return jax.tree.map(lambda leaf: leaf[None], tree) if vectors else tree


def modulated(factory):
    """A factory whose optimizers have kernels to modulate: most targets of Optax are vectors.

    The description is no argument: to `optax.inject_hyperparams` a function is a schedule.
    """

    @functools.wraps(factory)
    def wrapper(**kwargs):
        kwargs["weight_dimension_numbers"] = kwargs.get("weight_dimension_numbers") or by_rank
        tx = factory(**kwargs)

        def update(updates, state, params, **extra_args):
            scaled, state = tx.update(as_kernels(updates), state, as_kernels(params), **extra_args)
            return jax.tree.map(lambda u, p: u.reshape(p.shape), scaled, params), state

        return optax.GradientTransformationExtraArgs(lambda p: tx.init(as_kernels(p)), update)

    return wrapper


MEAN_ONE = {"gain": 1.0, "bounds": None, "normalization": "mean"}


def grapes_adam(learning_rate: optax.ScalarOrSchedule, weight_dimension_numbers=None):
    # Unbounded and without the control, a weight that starts at 0 would stay there.
    grapes = scale_by_grapes(weight_dimension_numbers, **MEAN_ONE, control="mean")
    return optax.chain(grapes, optax.adam(learning_rate))


FACTORIES = {
    "grapes_sgd": grapes_sgd,
    "grapes_rmsprop": grapes_rmsprop,
    "modulated_sgd": modulated(grapes_sgd),
    "modulated_rmsprop": modulated(grapes_rmsprop),
    "modulated_adam": modulated(grapes_adam),
}

SGD = {"learning_rate": 1e-3, "momentum": 0.9}
RMSPROP = {"learning_rate": 5e-3}
AFTER = {"modulate": "updates"}

OPTIMIZERS = [
    {"opt_name": name, "opt_kwargs": kwargs}
    for name, kwargs in (
        ("grapes_sgd", SGD),
        ("grapes_rmsprop", RMSPROP),
        ("modulated_sgd", SGD),
        ("modulated_sgd", SGD | AFTER | {"control": "roll"}),
        ("modulated_rmsprop", RMSPROP | AFTER | {"momentum": 0.9}),
        ("modulated_adam", {"learning_rate": 1e-1}),
    )
]

UNWRAPPED = {"wrapper_name": None, "wrapper_kwargs": None}
WRAPPED = [
    {
        "opt_name": "modulated_sgd",
        "opt_kwargs": {"learning_rate": 1e-2},
        "wrapper_name": name,
        "wrapper_kwargs": kwargs,
    }
    for name, kwargs in (
        ("mechanize", {"weight_decay": 0.0}),
        ("schedule_free", {"learning_rate": 1e-2}),
    )
]

CONSTRUCTORS = [
    ("scale_by_grapes", scale_by_grapes, {}),
    ("grapes_sgd", grapes_sgd, {"learning_rate": 0.1}),
    ("grapes_rmsprop", grapes_rmsprop, {"learning_rate": 0.1}),
    ("modulated", modulated(scale_by_grapes), {}),
    (
        "one_layer",
        modulated(scale_by_grapes),
        {"weight_dimension_numbers": DimensionNumbers(group="all")},
    ),
    ("mean", modulated(scale_by_grapes), {"control": "mean"}),
    ("roll", modulated(scale_by_grapes), {"control": "roll"}),
    ("norm", modulated(scale_by_grapes), {"control": "norm"}),
    ("mean_one", modulated(scale_by_grapes), MEAN_ONE),
    ("modulated_sgd", modulated(grapes_sgd), {"learning_rate": 0.1, "momentum": 0.9}),
    ("modulated_rmsprop", modulated(grapes_rmsprop), {"learning_rate": 0.1, "modulate": "updates"}),
]

# The suite splits axis 1 of three over the devices.
SPLIT = {
    "fan_in": DimensionNumbers((0, 1), 2),
    "nodes": DimensionNumbers(0, (1, 2)),
    "stack": DimensionNumbers(0, 2),
}
SHARDED = {
    "scale_by_grapes": scale_by_grapes(),
    "grapes_sgd": grapes_sgd(1.0, momentum=0.9),
    "grapes_rmsprop": grapes_rmsprop(1.0),
    "modulated_sgd": grapes_sgd(1.0, momentum=0.9, weight_dimension_numbers=SPLIT["fan_in"]),
    "modulated_rmsprop": grapes_rmsprop(
        1.0, weight_dimension_numbers=SPLIT["nodes"], modulate="updates"
    ),
    **{
        f"{axis}_{control}": scale_by_grapes(SPLIT[axis], control=control)
        for axis, control in itertools.product(SPLIT, (None, "mean", "roll", "reverse", "norm"))
    },
    **{f"{axis}_mean_one": scale_by_grapes(SPLIT[axis], **MEAN_ONE) for axis in SPLIT},
}


# The suites.


def view(module, **names):
    """What stands in for a module: the same names but for those given."""
    return types.SimpleNamespace(**vars(module) | names)


def load(path, suite, optimizers):
    """The class `suite` of a test file of Optax, with `optimizers` for Optax's own list.

    A list of optimizers is the only positional argument of a decorator. A test that is
    parametrized otherwise is not about optimizers in general, and is dropped.
    """

    def pointed_at_ours(decorator):
        def replacement(*lists, **grid):
            return decorator(optimizers, **grid) if len(lists) == 1 else lambda test: None

        return replacement

    file = pathlib.Path(optax.__file__).parent / path
    spec = importlib.util.spec_from_file_location(f"optax_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    decorators = {
        name: pointed_at_ours(getattr(parameterized, name))
        for name in ("product", "named_parameters")
    }
    with (
        mock.patch.multiple(parameterized, **decorators),
        mock.patch.dict(os.environ),  # sharding_test.py sets XLA_FLAGS,
        warnings.catch_warnings(action="ignore"),  # and makes a noisy_sgd that is deprecated.
    ):
        spec.loader.exec_module(module)

    if hasattr(module, "alias"):
        module.alias = view(module.alias, **FACTORIES)
    # Optax compares versions as strings: from JAX 0.10 on it would skip its tests of sharding.
    module.jax = view(jax, __version__="9")
    # Nothing is to be skipped: a test that would be fails.
    module.absltest = view(module.absltest, SkipTest=AssertionError)
    cls = getattr(module, suite)
    cls.skipTest = cls.fail
    return cls


AliasTest = load("_src/alias_test.py", "AliasTest", OPTIMIZERS)
ContribTest = load(
    "contrib/_common_test.py", "ContribTest", [opt | UNWRAPPED for opt in OPTIMIZERS] + WRAPPED
)
Float64Test = load("_src/float64_test.py", "Float64Test", CONSTRUCTORS)
ShardingTest = load("_src/sharding_test.py", "ShardingTest", list(SHARDED.items()))


# How many tests Optax 0.2.8 has; a later one may have more.
COUNTS = {AliasTest: 96, ContribTest: 128, Float64Test: 10, ShardingTest: 51}


@pytest.mark.parametrize("suite", COUNTS, ids=lambda suite: suite.__name__)
def test_no_test_is_lost(suite):
    assert len(unittest.defaultTestLoader.getTestCaseNames(suite)) >= COUNTS[suite]
