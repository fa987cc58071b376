"""Models of nnx: what is reached, what stays as it is, and what is refused."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import nnx

from grapes_optax import DimensionNumbers, alignment, scale_by_grapes
from grapes_optax.nnx import (
    direct_feedback_alignment,
    feedback_alignment,
    init_feedback,
    propagated,
)

RNG = np.random.default_rng(0)


pytestmark = pytest.mark.usefixtures("promotion_of_frameworks")


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


X = normal(4, 5)


def call(model, *args):
    return model(*args)


def gradients(model, x=X, forward=call, **kwargs):
    def loss(model, x):
        return jnp.square(forward(model, x, **kwargs)).sum()

    return nnx.to_pure_dict(nnx.jit(nnx.grad(loss))(model, x))


def assert_close(actual, desired):
    chex.assert_trees_all_close(actual, desired, rtol=2e-5, atol=2e-5)


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
    actual = gradients(layer, x, propagated(call, bounds=None))
    kernel = layer.kernel[...]
    factor = reference.factor(
        reference.node_importance(kernel, *axes), np.size(axes[1]), bounds=None
    )
    expected = reference.scale(plain["kernel"], kernel, *axes, bounds=None)
    np.testing.assert_allclose(actual["kernel"], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(actual["bias"], plain["bias"] * factor, rtol=1e-4, atol=1e-5)


class Everything(nnx.Module):
    """State of all kinds, a shared layer, a cycle, containers, and a bound method."""

    def __init__(self, seed=0):
        rngs = nnx.Rngs(seed)
        self.first = nnx.Linear(5, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.shared = nnx.Linear(6, 6, rngs=rngs)
        self.blocks = nnx.List([self.shared, nnx.Linear(6, 6, rngs=rngs)])
        self.more = nnx.data({"a": (nnx.Linear(6, 6, rngs=rngs),)})
        self.output = nnx.Linear(6, 3, rngs=rngs)
        self.itself = self
        self.calls = 0

    def __call__(self, x):
        assert self.itself is self
        assert self.blocks[0] is self.shared
        x = self.dropout(self.norm(self.first(x)))
        for block in (*self.blocks, self.shared, *self.more["a"]):
            x = nnx.relu(block(x))
        self.calls += 1
        self.seen = nnx.Intermediate(x)
        if self.calls == 1:
            self.late = nnx.Linear(6, 6, rngs=nnx.Rngs(1))
        return self.output(x)

    def encode(self, x):
        return nnx.relu(self.first(x))


def identities(model):
    kinds = nnx.Pytree, nnx.Variable
    return {id(node) for _, node in nnx.iter_graph(model) if isinstance(node, kinds)}


@pytest.mark.parametrize("rule", [propagated, feedback_alignment, direct_feedback_alignment])
def test_the_model_is_changed_as_by_a_plain_call(rule):
    model, plain = Everything(), Everything()
    before, variables = nnx.graphdef(model), identities(model)
    forward, kwargs = rule(Everything.__call__), {}
    if rule is not propagated:
        kwargs["feedback"] = init_feedback(jax.random.key(0), forward, model, X)
        assert nnx.graphdef(model) == before  # nothing is assigned, and no key is drawn
        assert model.dropout.rngs.count[...] == plain.dropout.rngs.count[...]
    for _ in range(2):
        chex.assert_trees_all_equal(forward(model, X, **kwargs), plain(X))
        assert nnx.graphdef(model) == nnx.graphdef(plain)
        chex.assert_trees_all_equal(nnx.state(model), nnx.state(plain))
    assert variables <= identities(model)
    assert model.itself is model
    assert model.blocks[0] is model.shared


def test_an_exception_leaves_what_a_plain_call_leaves():
    def raises(model, x):
        model(x)
        raise RuntimeError("mine")

    model, plain = Everything(), Everything()
    with pytest.raises(RuntimeError, match="mine"):
        propagated(raises)(model, X)
    plain(X)
    assert nnx.graphdef(model) == nnx.graphdef(plain)
    chex.assert_trees_all_equal(nnx.state(model), nnx.state(plain))


def test_any_method_and_what_it_returns():
    model = Everything()
    kernel = model.first.kernel[...]
    importance = reference.factor(reference.node_importance(kernel, 0, 1), 1)
    plain = gradients(model, X, Everything.encode)["first"]["bias"]
    bound = propagated(model.encode)
    np.testing.assert_array_equal(bound(X), model.encode(X))
    for forward in (
        propagated(Everything.encode),
        propagated(lambda model, x: model.encode(x)),
        lambda model, x: propagated(model.encode)(x),
    ):
        actual = gradients(model, X, forward)["first"]["bias"]
        np.testing.assert_allclose(actual, plain * importance, rtol=1e-5)
    out, same, first = propagated(lambda m, x: (m.encode(x), m, {"first": m.first}))(model, X)
    del out
    assert same is model
    assert first["first"] is model.first


@pytest.mark.parametrize("rule", [propagated, feedback_alignment])
def test_transforms_of_nnx_within_the_model(rule):
    class Stack(nnx.Module):
        def __init__(self, transform):
            @nnx.split_rngs(splits=3)
            @nnx.vmap(in_axes=(0,))
            def make(rngs):
                return nnx.Linear(5, 5, rngs=rngs)

            self.layers, self.transform = make(nnx.Rngs(0)), transform

        def __call__(self, x):
            if self.transform == "unrolled":
                for i in range(3):
                    layer = nnx.Linear(5, 5, rngs=nnx.Rngs(0))
                    layer.kernel[...] = self.layers.kernel[...][i]
                    layer.bias[...] = self.layers.bias[...][i]
                    x = nnx.relu(call_one(layer, x))
                return x
            if self.transform == "vmap":
                return nnx.vmap(call, in_axes=(0, None))(self.layers, x)
            step = {"scan": call, "remat": nnx.remat(call), "jit": nnx.jit(call)}[self.transform]

            @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            def scanned(x, layer):
                return nnx.relu(step(layer, x))

            return scanned(x, self.layers)

    feedback = {"layers/kernel": normal(5, 5)} if rule is feedback_alignment else {}
    given = {"feedback": feedback} if feedback else {}
    inner = {k.replace("layers/", ""): leaf for k, leaf in feedback.items()}
    call_one = functools.partial(rule(call), **({"feedback": inner} if feedback else {}))
    want = gradients(Stack("unrolled"), X, call)["layers"]
    for transform in "scan", "remat", "jit":
        model = Stack(transform)
        for _ in range(2):
            assert_close(gradients(model, X, rule(call), **given)["layers"], want)
    mapped = gradients(Stack("vmap"), X, rule(call), **given)["layers"]
    plain = gradients(Stack("vmap"), X, call)["layers"]
    if rule is propagated:
        for i in range(3):
            kernel = Stack("vmap").layers.kernel[...][i]
            factor = reference.factor(reference.node_importance(kernel, 0, 1), 1)
            np.testing.assert_allclose(mapped["bias"][i], plain["bias"][i] * factor, rtol=1e-4)
    else:
        assert_close(mapped, plain)  # one layer alone: no error travels


def test_within_transforms_of_nnx():
    forward = propagated(call)
    models = nnx.vmap(lambda key: nnx.Linear(5, 6, rngs=nnx.Rngs(key)))(
        jax.random.split(jax.random.key(0), 2)
    )
    grads = nnx.vmap(nnx.grad(lambda model, x: forward(model, x).sum()), in_axes=(0, None))(
        models, X
    )
    for i in range(2):
        factor = reference.factor(reference.node_importance(models.kernel[...][i], 0, 1), 1)
        np.testing.assert_allclose(grads["bias"][i], 4 * factor, rtol=1e-5)
    model = nnx.Linear(5, 6, rngs=nnx.Rngs(0))
    each = jax.vmap(lambda x: jax.grad(lambda x: forward(model, x).sum())(x))(X)
    whole = jax.grad(lambda x: forward(model, x).sum())(X)
    np.testing.assert_allclose(each, whole, rtol=1e-5)


def test_training_step_is_traced_once():
    model = nnx.Sequential(nnx.Linear(5, 7, rngs=nnx.Rngs(0)), nnx.relu)
    optimizer = nnx.Optimizer(model, optax.sgd(0.01), wrt=nnx.Param)
    forward, traces = propagated(call), []

    @nnx.jit
    def step(model, optimizer):
        traces.append(model)
        loss = lambda model: jnp.square(forward(model, X)).sum()  # noqa: E731
        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    for _ in range(5):
        expected = nnx.to_pure_dict(nnx.state(model))
        grads = gradients(model, X, forward)
        expected = jax.tree.map(lambda p, g: p - 0.01 * g, expected, grads)
        step(model, optimizer)
        assert_close(nnx.to_pure_dict(nnx.state(model)), expected)
    assert len(traces) == 1


@pytest.mark.parametrize("rule", [propagated, feedback_alignment, direct_feedback_alignment])
def test_frozen_and_retyped_kernels(rule):
    class Frozen(nnx.Variable):
        pass

    def model(kind):
        layers = (nnx.Linear(i, o, rngs=nnx.Rngs(i)) for i, o in ((5, 6), (6, 3)))
        model = nnx.Sequential(*layers)
        model.layers[1].kernel = kind(model.layers[1].kernel[...])
        return model

    forward = rule(call)
    kwargs = {}
    if rule is not propagated:
        kwargs["feedback"] = init_feedback(jax.random.key(0), forward, model(nnx.Param), X)
    want, got = (gradients(model(kind), X, forward, **kwargs) for kind in (nnx.Param, Frozen))
    assert_close(got["layers"][0], want["layers"][0])
    assert "kernel" not in got["layers"][1]


def test_what_is_no_layer():
    class Active(nnx.Linear):
        def __call__(self, x):
            return nnx.relu(super().__call__(x))

    class Weighted(nnx.Linear):
        @property
        def kernel(self):
            return self.raw / jnp.linalg.norm(self.raw[...])

        @kernel.setter
        def kernel(self, value):
            self.raw = value

    rngs = nnx.Rngs(0)
    lora = nnx.LoRALinear(5, 6, lora_rank=2, rngs=rngs)
    einsum = nnx.Einsum("bi,io->bo", (5, 6), rngs=rngs)
    for rule in propagated, feedback_alignment, direct_feedback_alignment:
        for module in Active(5, 6, rngs=rngs), lora, einsum:
            with pytest.raises(ValueError, match=rf"kernel: {type(module).__name__} is no layer"):
                rule(call)(module, X)
            model = nnx.Sequential(module, nnx.Linear(6, 3, rngs=rngs))
            excluded = rule(call, where=lambda path: "layers/0" not in path)
            kwargs = {}
            if rule is not propagated:
                kwargs["feedback"] = init_feedback(jax.random.key(0), excluded, model, X)
            np.testing.assert_array_equal(excluded(model, X, **kwargs), model(X))
    with pytest.raises(ValueError, match="kernel: Weighted is no layer"):
        propagated(call)(Weighted(5, 6, rngs=rngs), X)
    layers = {nnx.Einsum: DimensionNumbers()}
    registered = gradients(einsum, X, propagated(call, layers=layers))["kernel"]
    want = reference.scale(gradients(einsum)["kernel"], einsum.kernel[...], 0, 1)
    np.testing.assert_allclose(registered, want, rtol=1e-5)


def test_subclasses_that_leave_the_layer_alone():
    class Mine(nnx.Linear):
        def __init__(self, rngs):
            super().__init__(5, 6, rngs=rngs)
            self.note = "mine"

    want = gradients(nnx.Linear(5, 6, rngs=nnx.Rngs(0)), X, propagated(call))
    assert_close(gradients(Mine(nnx.Rngs(0)), X, propagated(call)), want)


def test_feedback_weights_are_no_variables():
    # They are an argument: no state of the model, no gradient, no optimizer meets them.
    model = nnx.Linear(5, 6, rngs=nnx.Rngs(0))
    forward = feedback_alignment(call)
    feedback = init_feedback(jax.random.key(0), forward, model, X)
    before = nnx.graphdef(model)
    assert set(gradients(model, X, forward, feedback=feedback)) == {"kernel", "bias"}
    assert nnx.graphdef(model) == before


def test_stacked_layers_draw_with_the_fan_in_of_one():
    stack = nnx.vmap(lambda key: nnx.Linear(64, 64, rngs=nnx.Rngs(key)))(
        jax.random.split(jax.random.key(0), 9)
    )
    forward = feedback_alignment(nnx.vmap(call, in_axes=(0, None)))
    (weights,) = init_feedback(jax.random.key(0), forward, stack, normal(2, 64)).values()
    np.testing.assert_allclose(weights.std(), np.sqrt(2 / 64), rtol=0.05)


def test_alignment_with_a_state():
    model = nnx.Sequential(nnx.Linear(5, 6, rngs=nnx.Rngs(0)), nnx.relu)
    forward = feedback_alignment(call)
    feedback = init_feedback(jax.random.key(0), forward, model, X)
    trees = model, nnx.state(model), nnx.to_pure_dict(nnx.state(model))
    angles = {float(alignment(feedback, tree)["layers/0/kernel"].angle) for tree in trees}
    assert len(angles) == 1


def test_direct_feedback_cannot_reach_into_loops():
    class Recurrent(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.rnn = nnx.RNN(nnx.SimpleCell(5, 6, rngs=rngs))
            self.hidden = nnx.Linear(6, 4, rngs=rngs)
            self.output = nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x):
            return self.output(nnx.relu(self.hidden(self.rnn(x)[:, -1])))

    x = normal(2, 3, 5)
    everywhere = direct_feedback_alignment(Recurrent.__call__)
    with pytest.raises(ValueError, match="inside a transform within the forward function"):
        init_feedback(jax.random.key(0), everywhere, Recurrent(), x)
    some = direct_feedback_alignment(Recurrent.__call__, lambda path: "rnn" not in path)
    feedback = init_feedback(jax.random.key(0), some, Recurrent(), x)
    shapes = jax.tree.map(jnp.shape, feedback)
    assert shapes == {"hidden/kernel": (6, 3), "output/kernel": (4, 3)}
    grads = gradients(Recurrent(), x, some, feedback=feedback)
    assert jnp.abs(grads["rnn"]["cell"]["dense_h"]["kernel"]).max() > 0


def test_direct_feedback_cannot_reach_a_scan_that_comes_first():
    """Its only layer is the first one that is called, but not each time that the loop calls it."""

    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs):
        return nnx.Linear(5, 5, rngs=rngs)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def scanned(layer, x):
        return nnx.relu(layer(x))

    rule = direct_feedback_alignment(lambda layers, x: scanned(layers, x))
    with pytest.raises(ValueError, match="inside a transform within the forward function"):
        init_feedback(jax.random.key(0), rule, make(nnx.Rngs(0)), normal(2, 5))


@pytest.mark.parametrize(
    "make",
    [nnx.SimpleCell, nnx.LSTMCell, nnx.OptimizedLSTMCell, nnx.GRUCell],
    ids=lambda make: make.__name__,
)
def test_local_and_propagated_form_agree_in_one_recurrent_layer(make):
    x = normal(2, 5, 3)
    model = nnx.RNN(make(3, 4, rngs=nnx.Rngs(0)))
    plain, modulated = (gradients(model, x, forward) for forward in (call, propagated(call)))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    local, _ = scale_by_grapes().update(plain, optax.EmptyState(), params)
    chex.assert_trees_all_close(modulated, local, rtol=1e-4, atol=1e-5)
    assert not np.allclose(jax.tree.leaves(plain)[-1], jax.tree.leaves(local)[-1], rtol=1e-2)
