"""The training steps that Flax publishes, with GRAPES by the one line that the docs show.

A client is written out as published, but for the size of its first dense layer and for the data,
which are scikit-learn's digits. The test exchanges a line in its source.
"""

import inspect
import re
import textwrap
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import nnx
from flax.training import train_state
from flax.traverse_util import flatten_dict

import grapes_optax.linen
import grapes_optax.nnx
from examples.data import load

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("promotion_of_frameworks")]

PAGE = Path(__file__).parents[2] / "docs/examples_frameworks.md"


# The clients. Each yields its parameters before every step, and the accuracy or the loss at last.


class CNN(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 32, kernel_size=(3, 3), rngs=rngs)
        self.batch_norm1 = nnx.BatchNorm(32, rngs=rngs)
        self.dropout1 = nnx.Dropout(rate=0.025)
        self.conv2 = nnx.Conv(32, 64, kernel_size=(3, 3), rngs=rngs)
        self.batch_norm2 = nnx.BatchNorm(64, rngs=rngs)
        self.avg_pool = partial(nnx.avg_pool, window_shape=(2, 2), strides=(2, 2))
        self.linear1 = nnx.Linear(256, 256, rngs=rngs)
        self.dropout2 = nnx.Dropout(rate=0.025)
        self.linear2 = nnx.Linear(256, 10, rngs=rngs)

    def __call__(self, x, rngs: nnx.Rngs | None = None):
        x = self.avg_pool(nnx.relu(self.batch_norm1(self.dropout1(self.conv1(x), rngs=rngs))))
        x = self.avg_pool(nnx.relu(self.batch_norm2(self.conv2(x))))
        x = x.reshape(x.shape[0], -1)
        x = nnx.relu(self.dropout2(self.linear1(x), rngs=rngs))
        return self.linear2(x)


def nnx_tutorial(train, test, learning_rate=0.005, momentum=0.9):
    """docs_nnx/mnist_tutorial.md"""

    def loss_fn(model, batch, rngs=None):
        logits = model(batch["image"], rngs)
        loss = optax.softmax_cross_entropy_with_integer_labels(
            logits=logits, labels=batch["label"]
        ).mean()
        return loss, logits

    @nnx.jit
    def train_step(model, optimizer, metrics, rngs, batch):
        grad_fn = nnx.value_and_grad(loss_fn, has_aux=True)
        (loss, logits), grads = grad_fn(model, batch, rngs)
        metrics.update(loss=loss, logits=logits, labels=batch["label"])
        optimizer.update(model, grads)

    @nnx.jit
    def eval_step(model, metrics, batch):
        loss, logits = loss_fn(model, batch)
        metrics.update(loss=loss, logits=logits, labels=batch["label"])

    model = CNN(rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(
        model,
        optax.adamw(learning_rate, momentum),
        wrt=nnx.Param,
    )
    metrics = nnx.MultiMetric(
        accuracy=nnx.metrics.Accuracy(),
        loss=nnx.metrics.Average("loss"),
    )
    train_model = nnx.view(model, deterministic=False, use_running_average=False)
    eval_model = nnx.view(model, deterministic=True, use_running_average=True)
    rngs = nnx.Rngs(0)
    for batch in train:
        yield nnx.to_pure_dict(nnx.state(model, nnx.Param))
        train_step(train_model, optimizer, metrics, rngs, batch)
    metrics.reset()
    eval_step(eval_model, metrics, test)
    yield metrics.compute()["accuracy"]


def nnx_mnist(train, test, learning_rate=0.1, momentum=0.9):
    """examples/mnist/train.py"""

    def loss_fn(model, batch, rngs):
        logits = model(batch["image"], rngs)
        loss = optax.softmax_cross_entropy_with_integer_labels(
            logits=logits, labels=batch["label"]
        ).mean()
        return loss, logits

    @nnx.jit
    def train_step(model, optimizer, metrics, batch, rngs):
        grad_fn = nnx.value_and_grad(loss_fn, has_aux=True)
        (loss, logits), grads = grad_fn(model, batch, rngs)
        metrics.update(loss=loss, logits=logits, labels=batch["label"])
        optimizer.update(model, grads)

    @nnx.jit
    def eval_step(model, metrics, batch):
        loss, logits = loss_fn(model, batch, None)
        metrics.update(loss=loss, logits=logits, labels=batch["label"])

    model = CNN(rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(
        model,
        optax.sgd(learning_rate, momentum),
        wrt=nnx.Param,
    )
    metrics = nnx.MultiMetric(
        accuracy=nnx.metrics.Accuracy(),
        loss=nnx.metrics.Average("loss"),
    )
    rngs = nnx.Rngs(0)
    model.train()
    for batch in train:
        yield nnx.to_pure_dict(nnx.state(model, nnx.Param))
        train_step(model, optimizer, metrics, batch, rngs)
    metrics.reset()
    model.eval()
    eval_step(model, metrics, test)
    yield metrics.compute()["accuracy"]


class LinenCNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(features=32, kernel_size=(3, 3))(x)
        x = nn.relu(x)
        x = nn.avg_pool(x, window_shape=(2, 2), strides=(2, 2))
        x = nn.Conv(features=64, kernel_size=(3, 3))(x)
        x = nn.relu(x)
        x = nn.avg_pool(x, window_shape=(2, 2), strides=(2, 2))
        x = x.reshape((x.shape[0], -1))
        x = nn.Dense(features=256)(x)
        x = nn.relu(x)
        return nn.Dense(features=10)(x)


def linen_quick_start(train, test, learning_rate=0.01, momentum=0.9):
    """docs/quick_start.md, without its metrics"""

    def create_train_state(module, rng, learning_rate, momentum):
        params = module.init(rng, jnp.ones([1, 8, 8, 1]))["params"]
        tx = optax.sgd(learning_rate, momentum)
        return train_state.TrainState.create(
            apply_fn=module.apply,
            params=params,
            tx=tx,
        )

    @jax.jit
    def train_step(state, batch):
        def loss_fn(params):
            logits = state.apply_fn({"params": params}, batch["image"])
            return optax.softmax_cross_entropy_with_integer_labels(
                logits=logits, labels=batch["label"]
            ).mean()

        grads = jax.grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads)

    @jax.jit
    def pred_step(state, batch):
        logits = state.apply_fn({"params": state.params}, batch["image"])
        return logits.argmax(axis=1)

    state = create_train_state(LinenCNN(), jax.random.key(0), learning_rate, momentum)
    for batch in train:
        yield state.params
        state = train_step(state, batch)
    yield jnp.mean(pred_step(state, test) == test["label"])


def linen_mnist(train, test, learning_rate=0.1, momentum=0.9):
    """examples/mnist/train.py of Flax 0.8.2, the last ones in linen"""

    @jax.jit
    def apply_model(state, images, labels):
        def loss_fn(params):
            logits = state.apply_fn({"params": params}, images)
            one_hot = jax.nn.one_hot(labels, 10)
            loss = jnp.mean(optax.softmax_cross_entropy(logits=logits, labels=one_hot))
            return loss, logits

        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, logits), grads = grad_fn(state.params)
        accuracy = jnp.mean(jnp.argmax(logits, -1) == labels)
        return grads, loss, accuracy

    @jax.jit
    def update_model(state, grads):
        return state.apply_gradients(grads=grads)

    def create_train_state(rng):
        cnn = LinenCNN()
        params = cnn.init(rng, jnp.ones([1, 8, 8, 1]))["params"]
        tx = optax.sgd(learning_rate, momentum)
        return train_state.TrainState.create(apply_fn=cnn.apply, params=params, tx=tx)

    state = create_train_state(jax.random.key(0))
    for batch in train:
        yield state.params
        grads, _, _ = apply_model(state, batch["image"], batch["label"])
        state = update_model(state, grads)
    yield apply_model(state, test["image"], test["label"])[2]


class Encoder(nn.Module):
    latents: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(500, name="fc1")(x))
        return nn.Dense(self.latents, name="fc2_mean")(x), nn.Dense(
            self.latents, name="fc2_logvar"
        )(x)


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, z):
        return nn.Dense(64, name="fc2")(nn.relu(nn.Dense(500, name="fc1")(z)))


class VAE(nn.Module):
    latents: int = 20

    def setup(self):
        self.encoder = Encoder(self.latents)
        self.decoder = Decoder()

    def __call__(self, x, z_rng):
        mean, logvar = self.encoder(x)
        std = jnp.exp(0.5 * logvar)
        z = mean + jax.random.normal(z_rng, logvar.shape) * std
        return self.decoder(z), mean, logvar


def linen_vae(train, test, learning_rate=0.001):
    """examples/vae/train.py"""

    @jax.vmap
    def kl_divergence(mean, logvar):
        return -0.5 * jnp.sum(1 + logvar - jnp.square(mean) - jnp.exp(logvar))

    @jax.vmap
    def binary_cross_entropy_with_logits(logits, labels):
        logits = nn.log_sigmoid(logits)
        return -jnp.sum(labels * logits + (1.0 - labels) * jnp.log(-jnp.expm1(logits)))

    def loss(params, batch, z_rng):
        recon_x, mean, logvar = state.apply_fn({"params": params}, batch, z_rng)
        bce_loss = binary_cross_entropy_with_logits(recon_x, batch).mean()
        kld_loss = kl_divergence(mean, logvar).mean()
        return bce_loss + kld_loss

    @jax.jit
    def train_step(state, batch, z_rng):
        grads = jax.grad(loss)(state.params, batch, z_rng)
        return state.apply_gradients(grads=grads)

    def binarized(batch):
        return jnp.float32(batch["image"].reshape(-1, 64) > 0.5)

    rng, key = jax.random.split(jax.random.key(0))
    params = VAE().init(key, jnp.ones((1, 64)), rng)["params"]
    state = train_state.TrainState.create(
        apply_fn=VAE().apply,
        params=params,
        tx=optax.adam(learning_rate),
    )
    for batch in train:
        yield state.params
        rng, key = jax.random.split(rng)
        state = train_step(state, binarized(batch), key)
    yield -loss(state.params, binarized(test), rng)


# What the docs show.


def shown() -> dict[tuple[str, str], tuple[str, str]]:
    """By client and form, the line as published and the line with GRAPES."""
    blocks = re.findall(r"```\n(\w+), (\w+):\n- (.*)\n\+ (.*)\n```", PAGE.read_text())
    return {(client, form): (old, new) for client, form, old, new in blocks}


def changed(client, form):
    """The client with that one line exchanged."""
    old, new = shown()[client.__name__, form]
    source = textwrap.dedent(inspect.getsource(client))
    assert len(re.findall(rf"^ *{re.escape(old)}$", source, re.M)) == 1, old
    adapter = grapes_optax.nnx if client.__name__.startswith("nnx") else grapes_optax.linen
    names = vars(grapes_optax) | globals() | {"propagated": adapter.propagated}
    exec(compile(source.replace(old, new), PAGE.name, "exec"), names)
    return names[client.__name__]


class Case(NamedTuple):
    steps: int
    floor: float  # of the accuracy, or of the negative loss
    hidden: dict[str, tuple]  # layers that are modulated, with the axes of fan-in and nodes
    last: str  # of them, that before the output layer
    adam: bool = False


CNN_LAYERS = {"conv1": ((0, 1, 2), 3), "conv2": ((0, 1, 2), 3), "linear1": (0, 1)}
LINEN_LAYERS = {"Conv_0": ((0, 1, 2), 3), "Conv_1": ((0, 1, 2), 3), "Dense_0": (0, 1)}
VAE_LAYERS = dict.fromkeys(
    ["encoder/fc1", "encoder/fc2_mean", "encoder/fc2_logvar", "decoder/fc1"], (0, 1)
)
# Chance is 0.1, and the loss of the autoencoder 44 before it is trained.
CASES = {
    nnx_tutorial: Case(70, 0.8, CNN_LAYERS, "linear1", adam=True),
    nnx_mnist: Case(70, 0.8, CNN_LAYERS, "linear1"),
    linen_quick_start: Case(100, 0.55, LINEN_LAYERS, "Dense_0"),
    linen_mnist: Case(60, 0.6, LINEN_LAYERS, "Dense_0"),
    linen_vae: Case(60, -30, VAE_LAYERS, "decoder/fc1", adam=True),
}


LIKE_OTHERS = nnx_mnist, linen_mnist  # their networks and nearly their steps


def batches(steps):
    data, rng = load(), np.random.default_rng(0)
    images, labels = np.asarray(data.train_images)[..., None], np.asarray(data.train_labels)
    for _ in range(steps):
        rows = rng.integers(len(images), size=32)
        yield {"image": images[rows], "label": labels[rows]}


def change(before, after):
    """Of every parameter in a step."""
    before, after = (flatten_dict(tree, sep="/") for tree in (before, after))
    return {name: np.asarray(after[name], float) - np.asarray(before[name]) for name in before}


@cache
def published(client):
    """Parameters and their change in the first step."""
    run = client(batches(2), None)
    before, after = next(run), next(run)
    return flatten_dict(before, sep="/"), change(before, after)


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("form", ["local", "propagated"])
@pytest.mark.parametrize(
    "client",
    [
        pytest.param(client, id=client.__name__, marks=[pytest.mark.slow] * (client in LIKE_OTHERS))
        for client in CASES
    ],
)
def test_client(client, form):
    case, data = CASES[client], load()
    test = {"image": data.test_images[..., None], "label": data.test_labels}
    first, second, *_, last = changed(client, form)(batches(case.steps), test)
    assert last > case.floor
    weights, plain = published(client)
    modulated = change(first, second)
    if form == "propagated" and case.adam:
        return  # the first step of Adam is a sign, in which no factor is seen
    for layer, axes in case.hidden.items():
        kernel, bias = f"{layer}/kernel", f"{layer}/bias"
        assert relative(modulated[kernel], plain[kernel]) > 0.1
        if form == "local" or layer == case.last:  # the others have factors of layers above, too
            expected = reference.scale(plain[kernel], weights[kernel], *axes)
            assert relative(modulated[kernel], expected) < 1e-3
            importance = reference.node_importance(weights[kernel], *axes)
            expected = plain[bias] * reference.factor(importance, 1)
            assert relative(modulated[bias], expected) < 1e-3
    others = {name for name in plain if name.rpartition("/")[0] not in case.hidden}
    assert others
    for name in others:
        if form == "local" or "norm" not in name:
            assert relative(modulated[name], plain[name]) < 1e-6, name


def test_every_client_is_shown():
    assert set(shown()) == {(c.__name__, form) for c in CASES for form in ("local", "propagated")}
