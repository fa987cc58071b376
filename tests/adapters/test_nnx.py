"""The nnx adapter: what it changes in a model, what survives, and what it refuses."""

import copy

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import nnx

from grapes_optax import grapes_sgd, scale_by_grapes
from grapes_optax.nnx import (
    FeedbackWeights,
    direct_feedback_alignment,
    feedback_alignment,
    propagated,
)

RNG = np.random.default_rng(0)


pytestmark = pytest.mark.usefixtures("promotion_of_frameworks")


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


X = normal(4, 5)


class MLP(nnx.Module):
    def __init__(self, seed=0):
        rngs = nnx.Rngs(seed)
        self.first = nnx.Linear(5, 7, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(7, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)])

    def __call__(self, x):
        hidden, output = self.layers
        return output(nnx.relu(hidden(nnx.relu(self.first(x)))))


def loss(model, x=X):
    return jnp.square(model(x)).sum()


def hidden(path):
    return path != "layers/1/kernel"


def gradients(model, x=X):
    return nnx.to_pure_dict(nnx.jit(nnx.grad(loss))(model, x))


def assert_close(actual, desired):
    chex.assert_trees_all_close(actual, desired, rtol=2e-5, atol=2e-5)


def by_hand(model):
    """Gradients of the first layer with propagated GRAPES in both hidden layers."""
    w1, w2, w3 = (np.asarray(m.kernel[...]) for m in (model.first, *model.layers))
    z1 = np.asarray(X) @ w1
    z2 = np.maximum(z1, 0) @ w2
    f1, f2 = (reference.factor(reference.node_importance(w, 0, 1), 1) for w in (w1, w2))
    error = 2 * np.maximum(z2, 0) @ w3
    error = (error @ w3.T * (z2 > 0) * f2) @ w2.T * (z1 > 0) * f1
    return {"kernel": np.asarray(X).T @ error, "bias": error.sum(0)}


def test_propagated():
    model = MLP()
    assert propagated(model, hidden) is model
    assert isinstance(model.first, nnx.Linear)
    assert_close(gradients(model)["first"], by_hand(model))
    chex.assert_trees_all_equal(model(X), MLP()(X))


ONE_LAYER = {
    "Linear": (lambda r: nnx.Linear(5, 6, rngs=r), (4, 5), (0, 1)),
    "LinearGeneral": (lambda r: nnx.LinearGeneral(5, (3, 2), rngs=r), (4, 5), (0, (1, 2))),
    "LinearGeneral, two axes": (
        lambda r: nnx.LinearGeneral((5, 3), 6, axis=(-2, -1), rngs=r),
        (4, 5, 3),
        ((0, 1), 2),
    ),
    "LinearGeneral, batch": (
        lambda r: nnx.LinearGeneral(5, 6, batch_axis={0: 4}, rngs=r),
        (4, 2, 5),
        (1, 2),
    ),
    "Conv": (lambda r: nnx.Conv(3, 6, (3, 2), rngs=r), (2, 5, 4, 3), ((0, 1, 2), 3)),
    "ConvTranspose": (lambda r: nnx.ConvTranspose(3, 6, (3,), rngs=r), (2, 5, 3), ((0, 1), 2)),
    "ConvTranspose, transposed": (
        lambda r: nnx.ConvTranspose(3, 6, (3,), transpose_kernel=True, rngs=r),
        (2, 5, 3),
        ((0, 2), 1),
    ),
}


@pytest.mark.parametrize(("make", "shape", "axes"), ONE_LAYER.values(), ids=ONE_LAYER.keys())
def test_layers_that_are_reached(make, shape, axes):
    layer, x = make(nnx.Rngs(0)), normal(*shape)
    plain = gradients(layer, x)
    actual = gradients(propagated(layer, bounds=None), x)
    kernel = layer.kernel[...]
    factor = reference.factor(
        reference.node_importance(kernel, *axes), np.size(axes[1]), bounds=None
    )
    expected = reference.scale(plain["kernel"], kernel, *axes, bounds=None)
    np.testing.assert_allclose(actual["kernel"], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(actual["bias"], plain["bias"] * factor, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_reached():
    einsum = nnx.Einsum("bi,io->bo", (5, 6), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="kernel: the module multiplies by hand"):
        propagated(einsum)
    with pytest.raises(ValueError, match="No layer was reached"):
        propagated(MLP(), where=lambda path: "nowhere" in path)
    with pytest.raises(ValueError, match="No layer was reached"):
        feedback_alignment(nnx.LayerNorm(5, rngs=nnx.Rngs(0)), nnx.Rngs(0))


def test_training_step_is_traced_once():
    model = propagated(MLP(), hidden)
    optimizer = nnx.Optimizer(model, optax.sgd(0.01), wrt=nnx.Param)

    @nnx.jit
    @chex.assert_max_traces(n=1)
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(loss)(model))

    for _ in range(3):
        expected = nnx.to_pure_dict(nnx.state(model.first))
        expected = jax.tree.map(lambda p, g: p - 0.01 * g, expected, gradients(model)["first"])
        step(model, optimizer)
        assert_close(nnx.to_pure_dict(nnx.state(model.first)), expected)


def test_jit_tells_the_modes_apart():
    jitted = nnx.jit(lambda model: nnx.grad(loss)(model))
    model = MLP()
    plain = nnx.to_pure_dict(jitted(model))["first"]
    assert_close(plain, gradients(model)["first"])
    propagated(model, hidden)
    assert_close(nnx.to_pure_dict(jitted(model))["first"], by_hand(model))
    assert not np.allclose(plain["kernel"], by_hand(model)["kernel"])


def test_survives_split_merge_clone_and_checkpoint():
    model = propagated(MLP(), hidden)
    expected = by_hand(model)
    graph, state = nnx.split(model)
    copies = [nnx.merge(graph, state), nnx.clone(model), copy.deepcopy(model)]
    saved = nnx.to_pure_dict(nnx.state(MLP()))
    restored = propagated(MLP(seed=1), hidden)
    assert not np.allclose(restored.first.kernel[...], model.first.kernel[...])
    nnx.update(restored, saved)
    for one in (*copies, restored):
        assert_close(gradients(one)["first"], expected)


def test_options_may_be_changed():
    model = propagated(propagated(MLP(), hidden, control="roll"), hidden)
    assert_close(gradients(model)["first"], by_hand(model))


def test_vmapped_seeds():
    @nnx.vmap
    def make(key):
        return propagated(MLP(key), hidden)

    models = make(jax.random.split(jax.random.key(0), 2))
    grads = nnx.vmap(nnx.grad(loss), in_axes=(0, None))(models, X)
    for i, key in enumerate(jax.random.split(jax.random.key(0), 2)):
        one = jax.tree.map(lambda x, i=i: x[i], nnx.to_pure_dict(grads)["first"])
        assert_close(one, by_hand(MLP(key)))


def test_bfloat16():
    layer = nnx.Linear(5, 6, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    grads = gradients(propagated(layer))
    assert {g.dtype for g in grads.values()} == {jnp.dtype("float32")}
    assert propagated(layer)(X).dtype == jnp.bfloat16


def test_both_forms_at_once_are_refused():
    model = propagated(MLP(), hidden)
    with pytest.raises(ValueError, match=r"first/kernel has propagated GRAPES already"):
        nnx.Optimizer(model, grapes_sgd(0.1), wrt=nnx.Param)
    nnx.Optimizer(MLP(), grapes_sgd(0.1), wrt=nnx.Param)


# Feedback


def test_feedback_is_no_parameter():
    model = feedback_alignment(MLP(), nnx.Rngs(1))
    assert set(nnx.to_pure_dict(nnx.state(model, nnx.Param))["first"]) == {"kernel", "bias"}
    assert isinstance(model.first.feedback, FeedbackWeights)
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    before = model.first.feedback[...]
    optimizer.update(model, nnx.grad(loss)(model))
    chex.assert_trees_all_equal(model.first.feedback[...], before)
    shapes = [leaf.shape for leaf in jax.tree.leaves(nnx.state(optimizer, nnx.OptState))]
    parameters = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sorted(filter(None, shapes)) == sorted(2 * [leaf.shape for leaf in parameters])


def test_feedback_carries_the_error():
    model = feedback_alignment(MLP(), nnx.Rngs(1))
    first, second, third = (model.first, *model.layers)
    z1 = np.asarray(first(X))
    z2 = np.asarray(second(np.maximum(z1, 0)))
    error = 2 * np.asarray(model(X)) @ np.asarray(third.feedback[...]).T * (z2 > 0)
    error = error @ np.asarray(second.feedback[...]).T * (z1 > 0)
    assert_close(gradients(model)["first"]["bias"], error.sum(0))


def test_direct_feedback():
    model = direct_feedback_alignment(MLP(), nnx.Rngs(1), X)
    assert not hasattr(model.first, "feedback")
    assert model.layers[0].feedback.shape == (7, 3)
    z1 = np.asarray(model.first(X))
    error = 2 * np.asarray(model(X)) @ np.asarray(model.layers[0].feedback[...]).T * (z1 > 0)
    assert_close(gradients(model)["first"]["bias"], error.sum(0))
    chex.assert_trees_all_equal(model(X), MLP()(X))


def test_direct_feedback_missing():
    model = direct_feedback_alignment(MLP(), nnx.Rngs(1), X)
    del model.layers[0].feedback
    with pytest.raises(ValueError, match="no feedback weights for layers/0/kernel"):
        model(X)


def test_wrong_feedback():
    model = feedback_alignment(MLP(), nnx.Rngs(1))
    model.first.feedback = FeedbackWeights(jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"of first/kernel have shape \(2, 3\), not \(5, 7\)"):
        model(X)
    del model.first.feedback
    with pytest.raises(ValueError, match="no feedback weights for first/kernel"):
        model(X)
    model.first.feedback = nnx.Param(jnp.ones((5, 7)))
    with pytest.raises(ValueError, match="first/kernel are a Param"):
        propagated(model)
    with pytest.raises(ValueError, match="Unknown rule 'sign'"):
        feedback_alignment(MLP(), nnx.Rngs(1), rule="sign")


def test_random_signs_change_with_every_batch():
    model = feedback_alignment(MLP(), nnx.Rngs(1), rule="random_sign")
    first, second = (gradients(model)["first"]["kernel"] for _ in range(2))
    assert not np.allclose(first, second)


def test_direct_feedback_needs_one_array():
    class Pair(MLP):
        def __call__(self, x):
            return super().__call__(x), x

    with pytest.raises(ValueError, match="not tuple"):
        direct_feedback_alignment(Pair(), nnx.Rngs(1), X)


def test_direct_feedback_cannot_reach_into_loops():
    class Recurrent(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.einsum = nnx.Einsum("bti,io->bto", (5, 5), rngs=rngs)
            self.rnn = nnx.RNN(nnx.SimpleCell(5, 6, rngs=rngs))
            self.hidden = nnx.Linear(6, 4, rngs=rngs)
            self.output = nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x):
            return self.output(nnx.relu(self.hidden(self.rnn(self.einsum(x))[:, -1])))

    x = normal(2, 3, 5)
    with pytest.raises(ValueError, match="inside a transform within the model"):
        direct_feedback_alignment(
            Recurrent(), nnx.Rngs(1), x, where=lambda path: "einsum" not in path
        )
    model = direct_feedback_alignment(
        Recurrent(), nnx.Rngs(1), x, where=lambda path: path.startswith(("hidden", "output"))
    )
    assert model.hidden.feedback.shape == (6, 3)
    assert model.output.feedback.shape == (4, 3)
    grads = nnx.to_pure_dict(nnx.grad(loss)(model, x))
    assert jnp.abs(grads["rnn"]["cell"]["dense_h"]["kernel"]).max() > 0


@pytest.mark.parametrize(
    "make",
    [nnx.SimpleCell, nnx.LSTMCell, nnx.OptimizedLSTMCell, nnx.GRUCell],
    ids=lambda make: make.__name__,
)
def test_local_and_propagated_form_agree_in_one_recurrent_layer(make):
    def gradient(model):
        return nnx.jit(nnx.grad(lambda model: jnp.square(model(x)).sum()))(model)

    x = normal(2, 5, 3)
    model = nnx.RNN(make(3, 4, rngs=nnx.Rngs(0)))
    plain, params = gradient(model), nnx.state(model, nnx.Param)
    local, _ = scale_by_grapes().update(plain, optax.EmptyState(), params)
    modulated = gradient(propagated(model))
    got, want, before = (nnx.to_pure_dict(tree) for tree in (modulated, local, plain))
    chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-5)
    assert not np.allclose(jax.tree.leaves(before)[-1], jax.tree.leaves(want)[-1], rtol=1e-2)
