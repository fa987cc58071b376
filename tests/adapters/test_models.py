"""Propagated GRAPES on whole models, against factors that the test itself puts behind layers.

linen and Haiku by an interceptor of its own, nnx and Equinox by layers that are wrapped.
"""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx

from grapes_optax import equinox as geqx
from grapes_optax import haiku as ghk
from grapes_optax import linen as glinen
from grapes_optax import nnx as gnnx

pytestmark = pytest.mark.usefixtures("promotion_of_frameworks")

KEY = jax.random.key(0)


@jax.custom_vjp
def times(z, factor):
    """z itself; what comes back is multiplied."""
    del factor
    return z


times.defvjp(lambda z, factor: (z, factor), lambda factor, g: (g * factor, None))


def factor(kernel, nodes=(-1,)):
    """Of the nodes, in the order of their axes."""
    axes = tuple(axis % kernel.ndim for axis in nodes)
    rest = tuple(axis for axis in range(kernel.ndim) if axis not in axes)
    return jnp.asarray(reference.factor(np.abs(np.asarray(kernel)).sum(rest), len(axes)))


def assert_same_gradients(forward, by_hand, plain, args):
    def gradient(function):
        def value(args):
            outs = jax.tree.leaves(function(*args))
            return sum(jnp.square(out).sum() for out in outs)

        return jax.tree.leaves(jax.grad(value)(args))

    actual, expected, before = map(gradient, (forward, by_hand, plain))
    assert len(actual) == len(expected)
    whole = max(jnp.abs(leaf).max() for leaf in expected)
    for one, other in zip(actual, expected, strict=True):
        # Softmax does not see the biases of keys, whose gradients are zero but for rounding.
        scale = max(jnp.abs(other).max(), 0.01 * whole)
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4 * scale)
    assert not np.allclose(actual[0], before[0], rtol=0.05)


# linen.


class Encoder(nn.Module):
    """Two blocks of a transformer, the kernels of attention with two axes of nodes."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 8)(tokens)
        for _ in range(2):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(2)(y, y)
            y = nn.gelu(nn.Dense(16)(nn.LayerNorm()(x)))
            x = x + nn.Dense(8)(y)
        return nn.Dense(5)(x.mean(axis=1))


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3))(x))
        y = nn.BatchNorm(use_running_average=True)(nn.Conv(6, (3, 3), strides=2)(x))
        x = nn.relu(y + nn.Conv(6, (1, 1), strides=2)(x))
        x = nn.ConvTranspose(4, (2, 2), strides=(2, 2))(x)
        return nn.Dense(1)(x.mean((1, 2))), nn.Dense(3)(x.mean((1, 2)))


LINEN = {
    "transformer": (Encoder(), jax.random.randint(KEY, (3, 4), 0, 11)),
    "residual network of two heads": (ResNet(), jax.random.normal(KEY, (2, 8, 8, 3))),
}


@pytest.mark.parametrize("name", LINEN)
def test_linen(name):
    model, x = LINEN[name]
    variables = model.init(KEY, x)

    def intercept(next_fun, args, kwargs, context):
        z = next_fun(*args, **kwargs)
        layer = context.module
        if not isinstance(layer, nn.Dense | nn.DenseGeneral | nn.Conv | nn.ConvTranspose):
            return z
        kernel = variables["params"]
        for part in layer.path:
            kernel = kernel[part]
        to_heads = isinstance(layer, nn.DenseGeneral) and layer.name in ("query", "key", "value")
        return times(z, factor(kernel["kernel"], (-2, -1) if to_heads else (-1,)))

    def by_hand(variables):
        with nn.intercept_methods(intercept):
            return model.apply(variables, x)

    forward = glinen.propagated(lambda variables: model.apply(variables, x))
    plain = lambda variables: model.apply(variables, x)  # noqa: E731
    assert_same_gradients(forward, by_hand, plain, (variables,))


# nnx.


class NnxTimes(nnx.Module):
    def __init__(self, layer, factor):
        self.layer, self.factor = layer, nnx.Variable(factor)

    def __call__(self, *args, **kwargs):
        return times(self.layer(*args, **kwargs), self.factor[...])


def nnx_by_hand(module):
    for name, child in list(vars(module).items()):
        if isinstance(child, nnx.Linear | nnx.LinearGeneral | nnx.Conv):
            to_heads = name in ("query", "key", "value")
            f = factor(child.kernel[...], (-2, -1) if to_heads else (-1,))
            setattr(module, name, NnxTimes(child, f))
        elif isinstance(child, nnx.Module):
            nnx_by_hand(child)
    return module


class ViT(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.patches = nnx.Conv(3, 8, (4, 4), strides=4, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.mlp = nnx.Sequential(
            nnx.Linear(8, 16, rngs=rngs), nnx.gelu, nnx.Linear(16, 8, rngs=rngs)
        )
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        x = self.patches(x).reshape(len(x), -1, 8)
        x = x + self.attention(self.norm(x))
        x = x + self.mlp(x)
        return self.head(x.mean(1))


class ActorCritic(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(1)
        self.body = nnx.List([nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)])
        self.actor, self.critic = nnx.Linear(8, 3, rngs=rngs), nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        for layer in self.body:
            x = jnp.tanh(layer(x))
        return self.actor(x), self.critic(x)


@pytest.mark.parametrize(("make", "shape"), [(ViT, (2, 8, 8, 3)), (ActorCritic, (4, 6))])
def test_nnx(make, shape):
    x = jax.random.normal(KEY, shape)
    graph, params = nnx.split(make())

    def by_hand(params):
        concrete = nnx_by_hand(make())  # of the same seed, and so of the same weights
        flat = nnx.to_flat_state(nnx.state(concrete, nnx.Param))
        names = {tuple(p for p in path if p != "layer"): path for path, _ in flat}
        given = [(names[path], leaf) for path, leaf in nnx.to_flat_state(params)]
        nnx.update(concrete, nnx.from_flat_state(given))
        return concrete(x)

    forward = gnnx.propagated(lambda model: model(x))
    functions = (
        (lambda p: forward(nnx.merge(graph, p))),
        by_hand,
        (lambda p: nnx.merge(graph, p)(x)),
    )
    assert_same_gradients(*functions, (params,))


# Equinox.


class EqxTimes(eqx.Module):
    layer: eqx.Module
    factor: jax.Array

    def __call__(self, x, **kwargs):
        z = self.layer(x, **kwargs)
        return times(z, self.factor.reshape(-1, *(1 for _ in z.shape[1:])))


class GraphNet(eqx.Module):
    """Messages along the edges of a graph, two rounds with weights of their own."""

    message: list
    update: list
    readout: eqx.nn.Linear

    def __init__(self):
        keys = jax.random.split(KEY, 5)
        self.message = [eqx.nn.Linear(12, 6, key=key) for key in keys[:2]]
        self.update = [eqx.nn.Linear(12, 6, key=key) for key in keys[2:4]]
        self.readout = eqx.nn.Linear(6, 2, key=keys[4])

    def __call__(self, nodes):
        senders, receivers = jnp.array([0, 1, 2, 3, 0]), jnp.array([1, 2, 3, 0, 2])
        for message, update in zip(self.message, self.update, strict=True):
            pairs = jnp.concatenate([nodes[senders], nodes[receivers]], -1)
            sums = jax.ops.segment_sum(jnp.tanh(jax.vmap(message)(pairs)), receivers, 4)
            nodes = jnp.tanh(jax.vmap(update)(jnp.concatenate([nodes, sums], -1)))
        return self.readout(nodes.sum(0))


def autoencoder():
    keys = jax.random.split(KEY, 4)
    return eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(2, 4, 3, stride=2, key=keys[0]),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Conv2d(4, 6, 2, key=keys[1]),
            eqx.nn.Lambda(jax.nn.softplus),
            eqx.nn.ConvTranspose2d(6, 4, 2, key=keys[2]),
            eqx.nn.ConvTranspose2d(4, 2, 3, stride=2, key=keys[3]),
        ]
    )


@pytest.mark.parametrize(("make", "shape"), [(GraphNet, (4, 6)), (autoencoder, (2, 7, 7))])
def test_equinox(make, shape):
    model, x = make(), jax.random.normal(KEY, shape)
    is_layer = lambda m: isinstance(m, eqx.nn.Linear | eqx.nn.Conv | eqx.nn.ConvTranspose)  # noqa: E731
    factors = [
        factor(layer.weight, (0,))
        for layer in jax.tree.leaves(model, is_leaf=is_layer)
        if is_layer(layer)
    ]

    def by_hand(model):
        left = iter(factors)
        wrap = lambda m: EqxTimes(m, next(left)) if is_layer(m) else m  # noqa: E731
        return jax.tree.map(wrap, model, is_leaf=is_layer)(x)

    arrays, static = eqx.partition(model, eqx.is_array)
    rule = geqx.propagated(lambda model: model(x))
    functions = (
        (lambda a, f=f: f(eqx.combine(a, static))) for f in (rule, by_hand, lambda model: model(x))
    )
    assert_same_gradients(*functions, (arrays,))


# Haiku.


def conv_net(x):
    x = jax.nn.relu(hk.Conv2D(4, 3)(x))
    x = x + hk.DepthwiseConv2D(1, 3)(x)
    x = hk.Conv2DTranspose(3, 2, stride=2)(x)
    return hk.nets.MLP([8, 2])(x.mean((1, 2)))


def attention(x):
    for _ in range(2):
        y = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
        x = x + hk.MultiHeadAttention(2, 4, w_init=hk.initializers.VarianceScaling(), model_size=8)(
            y, y, y
        )
        x = x + hk.nets.MLP([16, 8], activation=jnp.tanh)(x)
    return hk.Linear(3)(x)


@pytest.mark.parametrize(("net", "shape"), [(conv_net, (2, 6, 6, 3)), (attention, (2, 4, 8))])
def test_haiku(net, shape):
    x = jax.random.normal(KEY, shape)
    network = hk.without_apply_rng(hk.transform(net))
    params = network.init(KEY, x)

    def intercept(next_fun, args, kwargs, context):
        z = next_fun(*args, **kwargs)
        leaves = params.get(context.module.module_name, {})
        if context.method_name != "__call__" or "w" not in leaves:
            return z
        transposed = isinstance(context.module, hk.ConvNDTranspose)
        return times(z, factor(leaves["w"], (-2,) if transposed else (-1,)))

    def by_hand(params):
        with hk.intercept_methods(intercept):
            return network.apply(params, x)

    plain = lambda params: network.apply(params, x)  # noqa: E731
    assert_same_gradients(ghk.propagated(plain), by_hand, plain, (params,))
