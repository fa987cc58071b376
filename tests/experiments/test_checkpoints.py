"""Training that was saved by Orbax and restored goes on bit for bit, whatever its state holds."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import grapes_optax as g
from grapes_optax import equinox as geqx
from grapes_optax import haiku as ghk
from grapes_optax import linen as glinen
from grapes_optax import nnx as gnnx

pytestmark = pytest.mark.usefixtures("promotion_of_frameworks")

STEPS, SAVED = 5, 3  # in the middle of what MultiSteps accumulates
SIZES = {"first": (4, 6), "second": (6, 6), "output": (6, 3)}
X = jnp.zeros((8, 4))


def batch(number):
    rng = np.random.default_rng(number)
    return tuple(jnp.asarray(rng.normal(size=(8, n)), jnp.float32) for n in (4, 3))


def error(logits, y):
    return jnp.square(logits - y).mean()


def falling(count):
    return 0.1 / (1 + count)


def broken_once(count):
    return jnp.where(count == SAVED - 1, jnp.nan, 1.0)


LAYERS = g.by_path(where=lambda path: "output" not in path)
SGD = g.grapes_sgd(falling, momentum=0.9, weight_dimension_numbers=LAYERS)
RMSPROP = g.grapes_rmsprop(1e-2, centered=True, momentum=0.9, nesterov=True)
PARTS = {"first": "sgd", "second": "rmsprop", "output": "adam"}
OPTIMIZERS = {
    "grapes_sgd": SGD,
    "grapes_sgd, bfloat16": g.grapes_sgd(0.1, 0.9, True, jnp.bfloat16, modulate="updates"),
    "grapes_rmsprop": RMSPROP,
    "chain, before": optax.chain(g.scale_by_grapes(LAYERS), optax.adam(1e-2)),
    "chain, after": optax.chain(optax.adam(1e-2), g.scale_by_grapes(LAYERS, control="mean")),
    "outgoing": optax.chain(
        g.scale_by_outgoing_importance([f"{name}/kernel" for name in SIZES]),
        optax.sgd(0.1, momentum=0.9),
    ),
    "multi_transform": optax.multi_transform(
        {"sgd": SGD, "rmsprop": RMSPROP, "adam": optax.adam(1e-2)}, PARTS
    ),
    "masked": optax.masked(SGD, {"first": True, "second": True, "output": False}),
    "inject_hyperparams": optax.inject_hyperparams(g.grapes_sgd)(falling, momentum=0.9, gain=1.5),
    "MultiSteps": optax.MultiSteps(SGD, 2),
    "apply_if_finite": optax.chain(
        optax.scale_by_schedule(broken_once), optax.apply_if_finite(RMSPROP, 3)
    ),
}


def of_optimizer(tx):
    def build(seed):
        def network(params, x):
            for name in SIZES:
                x = x @ params[name]["kernel"] + params[name]["bias"]
                x = x if name == "output" else jax.nn.relu(x)
            return x

        keys = jax.random.split(jax.random.key(seed), len(SIZES))
        params = {
            name: {"kernel": jax.random.normal(key, shape), "bias": jnp.ones(shape[1:])}
            for key, (name, shape) in zip(keys, SIZES.items(), strict=True)
        }

        def step(carry, x, y):
            params, state = carry
            grads = jax.grad(lambda params: error(network(params, x), y))(params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return (params, tx.init(params)), step

    return build


def in_shard_map(seed):
    """The fan-in of the second layer over devices, and the trace of its gradient too."""
    specs = {name: {"kernel": P(), "bias": P()} for name in SIZES}
    specs["second"]["kernel"] = P("model", None)
    mesh = jax.make_mesh((2,), ("model",))
    tx = g.grapes_sgd(0.1, momentum=0.9, weight_dimension_numbers=g.sharded(LAYERS, specs))
    carry, _ = of_optimizer(tx)(seed)
    of_state = optax.tree.map_params(tx, lambda _, spec: spec, carry[1], specs)
    update = jax.shard_map(
        tx.update, mesh=mesh, in_specs=(specs, of_state, specs), out_specs=(specs, of_state)
    )
    carry = jax.tree.map(
        lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), carry, (specs, of_state)
    )
    return carry, of_optimizer(optax.GradientTransformation(tx.init, update))(seed)[1]


def in_nnx(seed):
    rngs = nnx.Rngs(seed)
    layers = nnx.Linear(4, 6, rngs=rngs), nnx.relu, nnx.Linear(6, 3, rngs=rngs)
    model = nnx.Sequential(*layers)
    forward = gnnx.direct_feedback_alignment(nnx.Sequential.__call__)
    feedback = gnnx.init_feedback(jax.random.key(seed), forward, model, X)
    optimizer = nnx.Optimizer(model, g.grapes_sgd(falling, momentum=0.9), wrt=nnx.Param)
    graph, state = nnx.split((model, optimizer))

    def step(carry, x, y):
        state, feedback = carry
        model, optimizer = nnx.merge(graph, state)
        grads = nnx.grad(lambda model: error(forward(model, x, feedback=feedback), y))(model)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer)), feedback

    return (state, feedback), step


def in_linen(seed):
    """Kolen-Pollack: the feedback weights are trained too."""
    model = nn.Sequential([nn.Dense(6), nn.relu, nn.Dense(3)])
    params = model.init(jax.random.key(seed), X)
    rule = glinen.propagated(model.apply, lambda path: "layers_0" in path)
    forward = glinen.feedback_alignment(rule, rule="kolen_pollack")
    feedback = glinen.init_feedback(jax.random.key(seed), forward, params, X)
    states = [
        TrainState.create(apply_fn=forward, params=tree, tx=optax.sgd(falling, momentum=0.9))
        for tree in (params, feedback)
    ]

    def step(states, x, y):
        def loss(params, feedback):
            return error(states[0].apply_fn(params, x, feedback=feedback), y)

        grads = jax.grad(loss, (0, 1))(*(state.params for state in states))
        return [s.apply_gradients(grads=each) for s, each in zip(states, grads, strict=True)]

    return states, step


def in_equinox(seed):
    model = eqx.nn.MLP(4, 3, 6, 1, key=jax.random.key(seed))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    forward = geqx.feedback_alignment(lambda model, x: jax.vmap(model)(x))
    feedback = geqx.init_feedback(jax.random.key(seed), forward, model, X)

    def step(carry, x, y):
        params, state, feedback = carry

        def loss(params):
            return error(forward(eqx.combine(params, static), x, feedback=feedback), y)

        updates, state = RMSPROP.update(jax.grad(loss)(params), state, params)
        return eqx.apply_updates(params, updates), state, feedback

    return (params, RMSPROP.init(params), feedback), step


def in_haiku(seed):
    model = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([6, 3])(x)))
    params = model.init(jax.random.key(seed), X)
    forward = ghk.feedback_alignment(model.apply)
    feedback = ghk.init_feedback(jax.random.key(seed), forward, params, X)

    def step(carry, x, y):
        params, state, feedback = carry
        grads = jax.grad(lambda p: error(forward(p, x, feedback=feedback), y))(params)
        updates, state = RMSPROP.update(grads, state, params)
        return optax.apply_updates(params, updates), state, feedback

    return (params, RMSPROP.init(params), feedback), step


BUILDS = {name: of_optimizer(tx) for name, tx in OPTIMIZERS.items()}
BUILDS |= {
    "sharded": in_shard_map,
    "nnx.Optimizer": in_nnx,
    "linen TrainState": in_linen,
    "Equinox": in_equinox,
    "Haiku": in_haiku,
}


def run(step, state, numbers):
    step = jax.jit(step)
    for number in numbers:
        state = step(state, *batch(number))
    return state


def content(state):
    """Every bit, and where it lies."""
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(state)]
    return [
        (leaf.dtype, part.device, part.index, np.asarray(part.data).tobytes())
        for leaf in leaves
        for part in leaf.addressable_shards
    ]


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_restored_training_goes_on_bit_for_bit(build, tmp_path):
    state, step = build(0)
    halfway = run(step, state, range(SAVED))
    whole = run(step, halfway, range(SAVED, STEPS))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", halfway)
    fresh, step = build(1)
    with ocp.StandardCheckpointer() as checkpointer:
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, fresh)
        restored = checkpointer.restore(tmp_path / "state", like)
    assert jax.tree.structure(restored) == jax.tree.structure(fresh)
    assert content(restored) == content(halfway) != content(whole)
    assert content(run(step, restored, range(SAVED, STEPS))) == content(whole)
