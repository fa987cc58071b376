"""A dense network over a mesh of two axes: GRAPES takes nothing, and the updates stay the same.

Trains on handwritten digits on one device, and on a mesh of 4 x 2 that divides the batch over its
first axis and every hidden kernel over both, fan-in and nodes. Compares the parameters after the
last epoch. Runs on any machine, as the eight devices are made of its CPU. Prints a table, writes
nothing.
"""

import argparse

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tabulate import tabulate
from tqdm import tqdm

from examples.data import load
from grapes_optax import by_path, scale_by_grapes
from grapes_optax.nnx import propagated


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.hidden1 = nnx.Linear(64, 128, rngs=rngs)
        self.hidden2 = nnx.Linear(128, 128, rngs=rngs)
        self.output = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.hidden1(x.reshape(len(x), -1)))
        return self.output(nnx.relu(self.hidden2(x)))


SPECS = {  # of kernels; the batch is divided over "data", what is not named is on all devices
    "hidden1": P("data", "model"),
    "hidden2": P("model", "data"),
    "output": P("model", None),
}


def hidden(path):  # as in the paper, the output layer is not modulated
    return "output" not in path


SGD, LAYERS = optax.sgd(0.1, momentum=0.5), by_path(where=hidden)
METHODS = {  # the optimizer, and the forward function that is differentiated
    "plain": (SGD, MLP.__call__),
    "local": (optax.chain(scale_by_grapes(LAYERS), SGD), MLP.__call__),
    "mean": (optax.chain(scale_by_grapes(LAYERS, control="mean"), SGD), MLP.__call__),
    "propagated": (SGD, propagated(MLP.__call__, hidden)),
}


@nnx.jit(static_argnames="forward")
def train_step(model, optimizer, images, labels, forward):
    def loss_fn(model):
        logits = forward(model, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    optimizer.update(model, nnx.grad(loss_fn)(model))


def train(method, mesh, data, epochs):
    tx, forward = METHODS[method]
    images, labels, random = *map(np.asarray, data[:2]), np.random.default_rng(0)
    model = MLP(nnx.Rngs(0))
    for name, spec in SPECS.items():
        kernel = getattr(model, name).kernel
        kernel[...] = jax.device_put(kernel[...], NamedSharding(mesh, spec))
    for bias in (model.hidden1.bias, model.hidden2.bias, model.output.bias):
        bias[...] = jax.device_put(bias[...], NamedSharding(mesh, P()))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for _ in tqdm(range(epochs), f"{method}, {mesh.size} devices", leave=False):
        for rows in random.permutation(len(labels))[: len(labels) // 32 * 32].reshape(-1, 32):
            batch = jax.device_put((images[rows], labels[rows]), NamedSharding(mesh, P("data")))
            train_step(model, optimizer, *batch, forward)
    return model


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=["all", *METHODS], default="all")
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args(arguments)
    if options.epochs < 1:
        parser.error("one epoch is the least")
    data, table, axes = load(), [], (("data", "model"), (AxisType.Auto,) * 2)
    meshes = [
        jax.make_mesh(s, *axes, devices=jax.devices()[: s[0] * s[1]]) for s in ((1, 1), (4, 2))
    ]
    for method in METHODS if options.method == "all" else [options.method]:
        one, many = (train(method, mesh, data, options.epochs) for mesh in meshes)
        right = one(np.asarray(data.test_images)).argmax(-1) == data.test_labels
        a, b = ([getattr(model, name).kernel[...] for name in SPECS] for model in (one, many))
        parts = " ".join("x".join(map(str, x.sharding.shard_shape(x.shape))) for x in b)
        off = [
            abs(np.asarray(x) - y).max() / abs(x).max()
            for x, y in zip(a, map(np.asarray, b), strict=True)
        ]
        table.append([method, f"{100 * right.mean():.2f}", parts, f"{max(off):.0e}"])
    heads = "method", "test accuracy (%)", "kernels on a device", "largest relative difference"
    print(tabulate(table, heads, "github"))


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    main()
