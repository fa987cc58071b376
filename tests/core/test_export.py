"""A training step in one artifact for all platforms: serialised, loaded, and run on this one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grapes_optax import grapes_sgd
from grapes_optax.linen import feedback_alignment, init_feedback, propagated

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
MODEL = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(3)])


def hidden(path):
    return "layers_0" in path


@pytest.mark.usefixtures("promotion_of_frameworks")
@pytest.mark.parametrize("form", ["local", "propagated", "feedback alignment"])
def test_step_for_all_platforms(form):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)), jnp.float32)
    params = MODEL.init(jax.random.key(0), x)
    forward = {
        "local": lambda: MODEL.apply,
        "propagated": lambda: propagated(MODEL.apply, hidden),
        "feedback alignment": lambda: feedback_alignment(propagated(MODEL.apply, hidden)),
    }[form]()
    tx = grapes_sgd(0.1, momentum=0.9) if form == "local" else optax.sgd(0.1, momentum=0.9)
    feedback = {}
    if form == "feedback alignment":
        feedback = {"feedback": init_feedback(jax.random.key(1), forward, params, x)}
    leaves, structure = jax.tree.flatten((params, tx.init(params), feedback))

    def step(leaves, x):
        params, state, feedback = jax.tree.unflatten(structure, leaves)
        grads = jax.grad(lambda params: jnp.square(forward(params, x, **feedback)).sum())(params)
        updates, state = tx.update(grads, state, params)
        return jax.tree.leaves((optax.apply_updates(params, updates), state, feedback))

    exported = jax.export.export(jax.jit(step), platforms=PLATFORMS)(leaves, x)
    loaded = jax.export.deserialize(exported.serialize())
    assert set(loaded.platforms) == set(PLATFORMS)
    mine = theirs = leaves
    for _ in range(3):
        mine, theirs = jax.jit(step)(mine, x), loaded.call(theirs, x)
    for one, other, before in zip(mine, theirs, leaves, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
        assert one.shape == before.shape
    assert any(np.abs(one - before).max() > 1e-3 for one, before in zip(mine, leaves, strict=True))
