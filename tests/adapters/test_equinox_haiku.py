"""Layers and cells of Equinox and Haiku, against the factors of NumPy and the local form."""

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

from grapes_optax import equinox as geqx
from grapes_optax import haiku as ghk

pytestmark = pytest.mark.usefixtures("promotion_of_frameworks")

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def call(module, *args):
    return module(*args)


def gradients(forward, params, *args, **kwargs):
    def loss(params):
        return jnp.square(forward(params, *args, **kwargs)).sum()

    return jax.grad(loss)(params)


def factor(kernel, *axes):
    importance = reference.node_importance(np.asarray(kernel), *axes)
    return reference.factor(importance, np.size(axes[1]), bounds=None)


# Equinox.

EQUINOX = {
    "Linear": (eqx.nn.Linear(5, 6, key=KEY), (5,), (1, 0)),
    "Linear to a scalar": (eqx.nn.Linear(5, "scalar", key=KEY), (5,), (1, 0)),
    "Linear of a scalar": (eqx.nn.Linear("scalar", 6, key=KEY), (), (1, 0)),
    "Conv1d": (eqx.nn.Conv1d(3, 6, 3, key=KEY), (3, 8), ((1, 2), 0)),
    "Conv2d, groups": (eqx.nn.Conv2d(4, 6, 3, groups=2, key=KEY), (4, 6, 5), ((1, 2, 3), 0)),
    "ConvTranspose2d": (eqx.nn.ConvTranspose2d(3, 6, 3, key=KEY), (3, 5, 4), ((1, 2, 3), 0)),
}


@pytest.mark.parametrize(("layer", "shape", "axes"), EQUINOX.values(), ids=EQUINOX.keys())
def test_layers_of_equinox(layer, shape, axes):
    x = normal(*shape)
    rule = geqx.propagated(call, bounds=None)
    plain, modulated = (gradients(f, eqx.filter(layer, eqx.is_array), x) for f in (call, rule))
    np.testing.assert_allclose(
        modulated.weight, reference.scale(plain.weight, layer.weight, *axes, bounds=None), 1e-4
    )
    f = factor(layer.weight, *axes).reshape(-1, *(1 for _ in layer.bias.shape[1:]))
    np.testing.assert_allclose(modulated.bias, plain.bias * f, rtol=1e-4)
    np.testing.assert_array_equal(rule(layer, x), layer(x))
    # Feedback alignment of one layer carries the error to its input by the other kernel.
    forward = geqx.feedback_alignment(call)
    other = layer.weight + 1
    dx = jax.grad(lambda x: forward(layer, x, feedback={"weight": other}).sum())(x)
    swapped = eqx.tree_at(lambda layer: layer.weight, layer, other)
    np.testing.assert_allclose(dx, jax.grad(lambda x: swapped(x).sum())(x), rtol=1e-4, atol=1e-5)


class Model(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    shared: eqx.nn.Shared
    norm: eqx.nn.LayerNorm

    def __init__(self):
        self.attention = eqx.nn.MultiheadAttention(2, 6, key=KEY)
        pair = eqx.nn.Embedding(9, 6, key=KEY), eqx.nn.Linear(6, 9, key=KEY)
        self.shared = eqx.nn.Shared(pair, lambda p: p[1].weight, lambda p: p[0].weight)
        self.norm = eqx.nn.LayerNorm(6)

    def __call__(self, tokens):
        embedding, output = self.shared()
        x = jax.vmap(embedding)(tokens)
        return jax.vmap(output)(jax.vmap(self.norm)(self.attention(x, x, x)))


def test_what_equinox_composes():
    model, tokens = Model(), jnp.arange(5)
    forward = geqx.propagated(Model.__call__)
    feedback = geqx.feedback_alignment(forward)
    drawn = geqx.init_feedback(KEY, feedback, model, tokens)
    projections = {f"attention/{name}_proj/weight" for name in ("query", "key", "value", "output")}
    assert set(drawn) == projections | {"shared/pytree/1/weight"}
    for grad in eqx.filter_grad, lambda f: eqx.filter_jit(eqx.filter_grad(f)):
        grads = grad(lambda model: jnp.square(forward(model, tokens)).sum())(model)
        plain = grad(lambda model: jnp.square(model(tokens)).sum())(model)
        assert jax.tree.structure(grads) == jax.tree.structure(plain)
        assert jnp.isfinite(optax.tree.norm(eqx.filter(grads, eqx.is_array)))
    np.testing.assert_array_equal(forward(model, tokens), model(tokens))
    assert type(geqx.propagated(lambda m, t: (m(t), m))(model, tokens)[1]) is Model


def test_what_is_no_layer_of_equinox():
    class Active(eqx.nn.Linear):
        def __call__(self, x, *, key=None):
            return jax.nn.relu(super().__call__(x))

    gru, active = eqx.nn.GRUCell(3, 4, key=KEY), Active(3, 4, key=KEY)
    with pytest.raises(ValueError, match=r"weight_ih: GRUCell is no layer.*exclude it.*local form"):
        geqx.propagated(call)(gru, normal(3), normal(4))
    with pytest.raises(ValueError, match="weight: Active is no layer"):
        geqx.feedback_alignment(call)(active, normal(3))
    embedding = eqx.nn.Sequential([eqx.nn.Embedding(5, 3, key=KEY), eqx.nn.Linear(3, 4, key=KEY)])
    geqx.propagated(call)(embedding, jnp.int32(2))  # an embedding is no kernel


def test_stacked_layers_of_equinox():
    make = eqx.filter_vmap(lambda key: eqx.nn.Linear(64, 64, key=key))
    layers = make(jax.random.split(KEY, 9))

    def forward(layers, x):
        return jax.lax.scan(lambda x, layer: (jax.nn.relu(layer(x)), None), x, layers)[0]

    rule = geqx.feedback_alignment(forward)
    (weights,) = geqx.init_feedback(KEY, rule, layers, normal(64)).values()
    np.testing.assert_allclose(weights.std(), np.sqrt(2 / 64), rtol=0.05)

    def unrolled(layers, x):
        for i in range(9):
            x = jax.nn.relu(jax.tree.map(lambda leaf, i=i: leaf[i], layers)(x))
        return x

    grads = [
        gradients(rule, layers, x, feedback={"weight": weights})
        for rule, x in ((geqx.feedback_alignment(f), jnp.ones(64)) for f in (forward, unrolled))
    ]
    for one, other in zip(*map(jax.tree.leaves, grads), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


# Haiku.

HAIKU = {
    "Linear": (lambda: hk.Linear(6), (4, 5), (0, 1)),
    "Conv1D": (lambda: hk.Conv1D(6, 3), (2, 5, 3), ((0, 1), 2)),
    "Conv2D, channels first": (
        lambda: hk.Conv2D(6, 3, data_format="NCHW"),
        (2, 3, 5, 4),
        ((0, 1, 2), 3),
    ),
    "Conv2DTranspose": (lambda: hk.Conv2DTranspose(6, 3), (2, 5, 4, 3), ((0, 1, 3), 2)),
    "DepthwiseConv2D": (lambda: hk.DepthwiseConv2D(2, 3), (2, 5, 4, 3), ((0, 1, 2), 3)),
}


def transformed(function, *inputs):
    network = hk.without_apply_rng(hk.transform(function))
    return network.apply, network.init(KEY, *inputs)


@pytest.mark.parametrize(("make", "shape", "axes"), HAIKU.values(), ids=HAIKU.keys())
def test_layers_of_haiku(make, shape, axes):
    x = normal(*shape)
    apply, params = transformed(lambda x: make()(x), x)
    rule = ghk.propagated(apply, bounds=None)
    ((_, plain),), ((_, modulated),) = (gradients(f, params, x).items() for f in (apply, rule))
    ((name, leaves),) = params.items()
    expected = reference.scale(plain["w"], leaves["w"], *axes, bounds=None)
    np.testing.assert_allclose(modulated["w"], expected, rtol=1e-4, atol=1e-4)
    f = factor(leaves["w"], *axes).reshape(leaves["b"].shape)
    np.testing.assert_allclose(modulated["b"], plain["b"] * f, rtol=1e-4)
    forward, other = ghk.feedback_alignment(apply), leaves["w"] + 1
    dx = jax.grad(lambda x: forward(params, x, feedback={f"{name}/w": other}).sum())(x)
    swapped = jax.grad(lambda x: apply({name: leaves | {"w": other}}, x).sum())(x)
    np.testing.assert_allclose(dx, swapped, rtol=1e-4, atol=1e-5)


@jax.custom_vjp
def times(z, factor):
    """z itself; what comes back is multiplied."""
    del factor
    return z


times.defvjp(lambda z, factor: (z, factor), lambda factor, g: (g * factor, None))


def lstm_by_hand(params, x, kernels, through_time):
    w, b = params["lstm/linear"]["w"], params["lstm/linear"]["b"]
    units, inputs = b.size // 4, x.shape[-1]
    f = reference.factor(sum(kernels).reshape(4, units), 1).reshape(-1)
    h = c = jnp.zeros((x.shape[1], units))
    outputs = []
    for step in x:
        if through_time:
            z = times(jnp.concatenate([step, h], -1) @ w + b, f)
        else:
            z = times(step @ w[:inputs] + b, f) + h @ times(w[inputs:], f)
        i, g, forget, o = jnp.split(z, 4, axis=-1)
        c = jax.nn.sigmoid(forget + 1) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        outputs.append(h)
    return jnp.stack(outputs)


def vanilla_by_hand(params, x, kernels, through_time):
    first, second = params["vanilla_rnn/linear"], params["vanilla_rnn/linear_1"]
    f = reference.factor(sum(kernels), 1)
    h, outputs = jnp.zeros((x.shape[1], f.size)), []
    for step in x:
        z = times(step @ first["w"] + first["b"], f)
        if through_time:
            z = z + times(h @ second["w"] + second["b"], f)
        else:
            z = z + h @ times(second["w"], f) + times(second["b"], f)
        h = jax.nn.relu(z)
        outputs.append(h)
    return jnp.stack(outputs)


@pytest.mark.parametrize("through_time", [False, True])
@pytest.mark.parametrize(
    ("cell", "by_hand"), [(hk.LSTM, lstm_by_hand), (hk.VanillaRNN, vanilla_by_hand)]
)
def test_cells_of_haiku(cell, by_hand, through_time):
    def unroll(x):
        core = cell(6)
        return hk.dynamic_unroll(core, x, core.initial_state(2))[0]

    x = normal(4, 2, 5)
    apply, params = transformed(unroll, x)
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)
    rule = ghk.propagated(apply, through_time=through_time)

    def gradients_of(forward):
        value = lambda params, x: jnp.square(forward(params, x)).sum()  # noqa: E731
        return jax.jit(jax.grad(value, argnums=(0, 1)))(params, x)

    def hand(weights, x):  # factors are of the weights, constants of the step
        return by_hand(
            weights, x, [np.abs(leaves["w"]).sum(0) for leaves in params.values()], through_time
        )

    for one, other in zip(*map(jax.tree.leaves, map(gradients_of, (rule, hand))), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4 * jnp.abs(other).max())


def test_layer_stack_of_haiku():
    def stacked(x):
        x = hk.Linear(64)(x)
        stack = hk.experimental.layer_stack(9)
        return hk.Linear(3)(stack(lambda x: jax.nn.relu(hk.Linear(64)(x)))(x))

    x = normal(2, 64)
    apply, params = transformed(stacked, x)
    rule = ghk.feedback_alignment(apply)
    feedback = ghk.init_feedback(KEY, rule, params, x)
    assert {path.rpartition("/")[0] for path in feedback} == set(params)
    weights = feedback["__layer_stack_no_per_layer/linear/w"]
    np.testing.assert_allclose(weights.std(), np.sqrt(2 / 64), rtol=0.05)
    some = ghk.propagated(apply, lambda path: "stack" in path)
    plain, modulated = (gradients(f, params, x) for f in (apply, some))
    np.testing.assert_allclose(modulated["linear_1"]["w"], plain["linear_1"]["w"], rtol=1e-5)
    ratio = modulated["__layer_stack_no_per_layer/linear"]["b"][-1]
    ratio = ratio / plain["__layer_stack_no_per_layer/linear"]["b"][-1]
    f = reference.node_importance(params["__layer_stack_no_per_layer/linear"]["w"][-1], 0, 1)
    expected = np.where(np.isnan(ratio), ratio, reference.factor(f, 1))
    np.testing.assert_allclose(ratio, expected, rtol=1e-4)


def test_direct_feedback_cannot_reach_a_stack_that_comes_first():
    def stacked(x):
        x = hk.experimental.layer_stack(3)(lambda x: jnp.tanh(hk.Linear(8)(x)))(x)
        return hk.Linear(3)(x)

    x = normal(2, 8)
    apply, params = transformed(stacked, x)
    rule = ghk.direct_feedback_alignment(apply)
    with pytest.raises(ValueError, match="inside a transform within the forward function"):
        ghk.init_feedback(KEY, rule, params, x)


def test_what_is_no_layer_of_haiku():
    def unroll(x):
        core = hk.GRU(6)
        return hk.dynamic_unroll(core, x, core.initial_state(2))[0]

    x = normal(4, 2, 5)
    apply, params = transformed(unroll, x)
    with pytest.raises(ValueError, match=r"gru/w_.: GRU is no layer"):
        ghk.propagated(apply)(params, x)


def test_custom_getters_of_haiku():
    def cubed(next_getter, value, context):
        value = next_getter(value)
        return value**3 if context.name == "w" else value

    def net(x):
        with hk.custom_getter(cubed):
            return hk.Linear(3)(x)

    x = normal(4, 5)
    apply, params = transformed(net, x)
    forward = ghk.propagated(apply, bounds=None)
    grads = jax.grad(lambda params: forward(params, x).sum())(params)["linear"]["b"]
    importance = reference.node_importance(np.asarray(params["linear"]["w"]) ** 3, 0, 1)
    expected = 4 * reference.factor(importance, 1, bounds=None)
    np.testing.assert_allclose(grads, expected, rtol=1e-5)
    aligned = ghk.feedback_alignment(apply)
    feedback = ghk.init_feedback(jax.random.key(0), aligned, params, x)
    with pytest.raises(ValueError, match="linear/w: a custom getter changes the kernel"):
        aligned(params, x, feedback=feedback)
