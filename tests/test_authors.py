"""Every update of the authors' code, by the public interface on models of Flax, in float64.

authors_updates.npz holds weights before and after training steps, computed by the published
NumPy code (github.com/IBM/GRAPES): a network 12-10-8-6-4, ReLU, softmax cross-entropy,
batches of 8, no biases.
"""

import contextlib
import itertools
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import grapes_optax
from grapes_optax import linen as glinen
from grapes_optax import nnx as gnnx

DATA = dict(np.load(Path(__file__).with_name("authors_updates.npz")))
SIZES = (12, 10, 8, 6, 4)
OPTIMIZERS = {
    "sgd": optax.sgd,
    "momentum": lambda lr: optax.sgd(lr, momentum=0.9),
    "nesterov": lambda lr: optax.sgd(lr, momentum=0.9, nesterov=True),
    "rmsprop": lambda lr: optax.rmsprop(lr, 0.9, 1e-8, eps_in_sqrt=True, initial_scale=0.0),
    "adam": optax.adam,
}
RULES = ("bp", "bp_grapes", "fa", "fa_grapes", "dfa", "dfa_grapes")


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield


def kernels(key):
    """Four kernels of the data, or those that there are."""
    return {i: jnp.asarray(DATA[f"{key}_{i}"]) for i in range(4) if f"{key}_{i}" in DATA}


def batch(step):
    rows = slice(8 * step, 8 * step + 8)
    return jnp.asarray(DATA["inputs"][rows]), jnp.asarray(DATA["targets"][rows])


def cross_entropy(logits, targets):
    return optax.losses.safe_softmax_cross_entropy(logits, targets).mean()


def hidden(path):
    return "3" not in path


def not_first(path):
    return "0" not in path


# Where the authors' rules differ, the options do: the factor is not clipped for feedback
# alignment, and its importance is then read at the weights, not at the look-ahead weights.


class Linen:
    paths = tuple(f"Dense_{i}/kernel" for i in range(4))

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            for size in SIZES[1:-1]:
                x = jax.nn.relu(nn.Dense(size, use_bias=False, param_dtype=jnp.float64)(x))
            return nn.Dense(SIZES[-1], use_bias=False, param_dtype=jnp.float64)(x)

    def __init__(self, rule):
        self.rule = rule
        self.feedback = {
            f"Dense_{i}": {"kernel": b}
            for i, b in kernels(f"{rule.split('_')[0]}/feedback/kernel").items()
        }

    def tree(self, key):
        return {"params": {f"Dense_{i}": {"kernel": k} for i, k in kernels(key).items()}}

    def rules(self, weights):
        if self.rule.startswith("fa"):
            yield glinen.feedback_alignment(self.feedback, not_first)
        if self.rule.startswith("dfa"):
            yield glinen.direct_feedback_alignment(self.feedback)
        if self.rule == "bp_grapes":
            yield glinen.propagated(hidden)
        if self.rule == "fa_grapes":
            yield glinen.propagated(hidden, importance=weights, bounds=None)

    def gradient(self, params, weights, x, y):
        with contextlib.ExitStack() as stack:
            for context in self.rules(weights):
                stack.enter_context(context)
            return jax.grad(lambda p: cross_entropy(self.Model().apply(p, x), y))(params)


class Nnx:
    paths = tuple(f"layers/{i}/kernel" for i in range(4))

    class Model(nnx.Module):
        def __init__(self, rngs):
            kwargs = {"use_bias": False, "param_dtype": jnp.float64, "rngs": rngs}
            self.layers = nnx.List(
                [nnx.Linear(i, o, **kwargs) for i, o in itertools.pairwise(SIZES)]
            )

        def __call__(self, x):
            *hidden, output = self.layers
            for layer in hidden:
                x = jax.nn.relu(layer(x))
            return output(x)

    def __init__(self, rule):
        model = self.Model(nnx.Rngs(0))
        if rule.startswith("fa"):
            gnnx.feedback_alignment(model, nnx.Rngs(1), not_first)
        if rule.startswith("dfa"):
            gnnx.direct_feedback_alignment(model, nnx.Rngs(1), batch(0)[0])
        if rule.endswith("_grapes") and not rule.startswith("dfa"):
            gnnx.propagated(model, hidden, bounds=None if rule == "fa_grapes" else (1.0, 2.0))
        for i, feedback in kernels(f"{rule.split('_')[0]}/feedback/kernel").items():
            model.layers[i].feedback[...] = feedback
        self.rule = rule
        self.graph, self.state, self.rest = nnx.split(model, nnx.Param, ...)

    def tree(self, key):
        state = self.state
        for i, kernel in kernels(key).items():
            state["layers"][i]["kernel"][...] = kernel
        return state

    def gradient(self, params, weights, x, y):
        def loss(params):
            return cross_entropy(nnx.merge(self.graph, params, self.rest)(x), y)

        with (
            gnnx.importance_from(weights) if self.rule == "fa_grapes" else contextlib.nullcontext()
        ):
            return jax.grad(loss)(params)


@pytest.mark.slow
@pytest.mark.parametrize("framework", [Linen, Nnx])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("rule", RULES)
def test_update(rule, name, framework):
    run = framework(rule)
    rate = float(DATA[f"{rule}/{name}/learning_rate"])
    optimizer = OPTIMIZERS[name](rate)
    outgoing = (
        grapes_optax.scale_by_outgoing_importance(run.paths)
        if rule == "dfa_grapes"
        else optax.identity()
    )
    params = jax.tree.map(jnp.copy, run.tree("initial/kernel"))
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, x, y):
        weights = params
        if name == "nesterov":  # Optax's parameters are the look-ahead weights
            trace = optax.tree.get(state, "trace")
            weights = jax.tree.map(lambda p, m: p + rate * 0.9 * m, params, trace)
        gradient = run.gradient(params, weights, x, y)
        gradient, _ = outgoing.update(gradient, optax.EmptyState(), weights)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    after = {}
    for number in range(10):
        params, state = step(params, state, *batch(number))
        after[number + 1] = params
    for steps in 3, 10:
        key = f"{rule}/{name}/after_{steps}_steps/"
        key += "lookahead" if name == "nesterov" else "kernel"
        for actual, expected in zip(
            jax.tree.leaves(after[steps]), jax.tree.leaves(run.tree(key)), strict=True
        ):
            np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12)


def test_data_tell_the_rules_apart():
    for name in OPTIMIZERS:
        ends = [DATA[f"{rule}/{name}/after_10_steps/kernel_1"] for rule in RULES]
        for i, one in enumerate(ends):
            for other in ends[:i]:
                assert np.abs(one - other).max() > 1e-6
