"""One network, 5-7-6-3 with ReLU, in every framework, and its gradients by hand in NumPy."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import reference
from flax import nnx

import grapes_optax.equinox
import grapes_optax.haiku
import grapes_optax.linen
import grapes_optax.nnx

SIZES = (5, 7, 6, 3)
KEY = jax.random.key(0)


class LinenMLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        for size in SIZES[1:-1]:
            x = nn.relu(nn.Dense(size)(x))
        return nn.Dense(SIZES[-1])(x)


class Linen:
    """A model is what is differentiated; `arrays` and `build` go between it and a pytree."""

    grapes = grapes_optax.linen
    paths = tuple(f"Dense_{i}/kernel" for i in range(3))
    forward = staticmethod(LinenMLP().apply)

    @staticmethod
    def make(seed=0):
        return LinenMLP().init(jax.random.key(seed), jnp.ones((1, 5)))

    @staticmethod
    def arrays(model):
        return model

    @staticmethod
    def build(arrays):
        return arrays

    @staticmethod
    def weights(model):
        """Kernels, (inputs, nodes), and biases of the three layers."""
        layers = (model["params"][f"Dense_{i}"] for i in range(3))
        return [(layer["kernel"], layer["bias"]) for layer in layers]


class NnxMLP(nnx.Module):
    def __init__(self, seed=0):
        rngs = nnx.Rngs(seed)
        self.first = nnx.Linear(5, 7, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(7, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)])

    def __call__(self, x):
        hidden, output = self.layers
        return output(nnx.relu(hidden(nnx.relu(self.first(x)))))


class Nnx:
    grapes = grapes_optax.nnx
    paths = ("first/kernel", "layers/0/kernel", "layers/1/kernel")
    forward = staticmethod(NnxMLP.__call__)
    make = staticmethod(NnxMLP)

    @staticmethod
    def arrays(model):
        return nnx.to_pure_dict(nnx.state(model))

    @staticmethod
    def build(arrays):
        model = nnx.eval_shape(NnxMLP)
        graph, state = nnx.split(model)
        nnx.replace_by_pure_dict(state, arrays)
        return nnx.merge(graph, state)

    @staticmethod
    def weights(model):
        return [(m.kernel[...], m.bias[...]) for m in (model.first, *model.layers)]


class EquinoxMLP(eqx.Module):
    layers: list

    def __init__(self, seed=0):
        keys = jax.random.split(jax.random.key(seed), 3)
        sizes = zip(SIZES, SIZES[1:], keys, strict=False)
        self.layers = [eqx.nn.Linear(i, o, key=key) for i, o, key in sizes]

    def __call__(self, x):
        *hidden, output = self.layers
        for layer in hidden:
            x = jax.nn.relu(layer(x))
        return output(x)


class Equinox:
    grapes = grapes_optax.equinox
    paths = tuple(f"layers/{i}/weight" for i in range(3))
    forward = staticmethod(EquinoxMLP.__call__)
    make = staticmethod(EquinoxMLP)

    @staticmethod
    def arrays(model):
        return eqx.filter(model, eqx.is_array)

    @staticmethod
    def build(arrays):
        return arrays

    @staticmethod
    def weights(model):
        return [(layer.weight.T, layer.bias) for layer in model.layers]


HAIKU = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP(SIZES[1:])(x)))


class Haiku:
    grapes = grapes_optax.haiku
    paths = tuple(f"mlp/~/linear_{i}/w" for i in range(3))
    forward = staticmethod(HAIKU.apply)

    @staticmethod
    def make(seed=0):
        return HAIKU.init(jax.random.key(seed), jnp.ones((1, 5)))

    @staticmethod
    def arrays(model):
        return model

    @staticmethod
    def build(arrays):
        return arrays

    @staticmethod
    def weights(model):
        layers = (model[f"mlp/~/linear_{i}"] for i in range(3))
        return [(layer["w"], layer["b"]) for layer in layers]


def value(run, forward, model, x, **kwargs):
    """Of a forward function on a batch; those of Equinox take one example."""
    if run is not Equinox:
        return forward(model, x, **kwargs)
    return jax.vmap(lambda x: forward(model, x, **kwargs))(x)


FRAMEWORKS = {"linen": Linen, "nnx": Nnx, "equinox": Equinox, "haiku": Haiku}


# By hand.


def factor(kernel, **options):
    return reference.factor(reference.node_importance(np.asarray(kernel), 0, 1), 1, **options)


def gradients_by_hand(weights, x, factors=(1.0, 1.0, 1.0), back=None, direct=None):
    """Of the sum of squares of the logits; all matrices are (inputs, nodes or logits)."""
    weights = [(np.asarray(w, np.float64), np.asarray(b, np.float64)) for w, b in weights]
    back = [w for w, _ in weights] if back is None else back
    inputs, pre_activations = [np.asarray(x, np.float64)], []
    for w, b in weights:
        pre_activations.append(inputs[-1] @ w + b)
        inputs.append(np.maximum(pre_activations[-1], 0))
    at_logits = error = 2 * pre_activations[-1]
    gradients = []
    for i in (2, 1, 0):
        error = error * factors[i]
        gradients.insert(0, (inputs[i].T @ error, error.sum(0)))
        if i:
            error = at_logits @ direct[i].T if direct else error @ back[i].T
            error = error * (pre_activations[i - 1] > 0)
    return gradients
