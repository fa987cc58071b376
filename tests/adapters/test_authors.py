"""Every update of the authors' code, by the public interface on models of Flax, in float64.

authors_updates.npz holds weights before and after training steps, computed by the published
NumPy code (github.com/IBM/GRAPES): a network 12-10-8-6-4, ReLU, softmax cross-entropy,
batches of 8, no biases; authors_updates.md has all of it.
"""

import functools
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
from grapes_optax import modulate_error
from grapes_optax import nnx as gnnx

DATA = dict(np.load(Path(__file__).parent / "authors_updates.npz"))
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
# alignment, and its importance is then read at the weights, not at the look-ahead weights:
# `modulate_error` in the model takes any kernel.


def forward_of(run, grapes, forward):
    """A forward function under the rule; it takes feedback weights where there are any."""
    rule, *_ = run.rule.split("_")
    feedback = {run.paths[i]: b for i, b in kernels(f"{rule}/feedback/kernel").items()}
    if rule == "fa":
        forward = grapes.feedback_alignment(forward, not_first)
    if rule == "dfa":
        forward = grapes.direct_feedback_alignment(forward)
    if run.rule == "bp_grapes":
        return grapes.propagated(forward, hidden)
    return functools.partial(forward, feedback=feedback) if feedback else forward


def modulated(rule, z, weights, i):
    """A hidden pre-activation with the authors' factor for feedback alignment."""
    return modulate_error(z, weights[i], bounds=None) if rule == "fa_grapes" else z


class Linen:
    paths = tuple(f"Dense_{i}/kernel" for i in range(4))

    class Model(nn.Module):
        rule: str

        @nn.compact
        def __call__(self, x, weights):
            for i, size in enumerate(SIZES[1:-1]):
                z = nn.Dense(size, use_bias=False, param_dtype=jnp.float64)(x)
                x = jax.nn.relu(modulated(self.rule, z, weights, i))
            return nn.Dense(SIZES[-1], use_bias=False, param_dtype=jnp.float64)(x)

    def __init__(self, rule):
        self.rule = rule
        self.forward = forward_of(self, glinen, self.Model(rule).apply)

    def tree(self, key):
        return {"params": {f"Dense_{i}": {"kernel": k} for i, k in kernels(key).items()}}

    def gradient(self, params, weights, x, y):
        read = [weights["params"][f"Dense_{i}"]["kernel"] for i in range(3)]
        return jax.grad(lambda p: cross_entropy(self.forward(p, x, read), y))(params)


class Nnx:
    paths = tuple(f"layers/{i}/kernel" for i in range(4))

    class Model(nnx.Module):
        def __init__(self, rule, rngs):
            kwargs = {"use_bias": False, "param_dtype": jnp.float64, "rngs": rngs}
            self.rule = rule
            self.layers = nnx.List(
                [nnx.Linear(i, o, **kwargs) for i, o in itertools.pairwise(SIZES)]
            )

        def __call__(self, x, weights):
            *hidden, output = self.layers
            for i, layer in enumerate(hidden):
                x = jax.nn.relu(modulated(self.rule, layer(x), weights, i))
            return output(x)

    def __init__(self, rule):
        self.rule = rule
        self.forward = forward_of(self, gnnx, self.Model.__call__)
        self.graph, self.state = nnx.split(self.Model(rule, nnx.Rngs(0)))

    def tree(self, key):
        for i, kernel in kernels(key).items():
            self.state["layers"][i]["kernel"][...] = kernel
        return self.state

    def gradient(self, params, weights, x, y):
        read = [weights["layers"][i]["kernel"][...] for i in range(3)]

        def loss(params):
            return cross_entropy(self.forward(nnx.merge(self.graph, params), x, read), y)

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
