"""Handwritten digits as spike trains with a spiking network in spyx: plain training and GRAPES.

Every method sees the same initial weights, batches and spikes, seed by seed; `mean` and
`propagated-mean` are controls: every node gets the mean factor of its layer. Prints test
accuracies, ± standard deviation, and differences paired by seed, ± 95 % interval; writes nothing.
"""

import argparse

import numpy as np
import optax
import spyx
from flax import nnx
from scipy import stats
from tabulate import tabulate
from tqdm import tqdm

from examples.data import load
from grapes_optax import by_path, scale_by_grapes
from grapes_optax.nnx import propagated
from grapes_optax.spiking import rate_code


def make_model(seed):
    rngs = nnx.Rngs(seed)
    return spyx.nn.Sequential(
        nnx.Linear(64, 128, use_bias=False, rngs=rngs),
        spyx.nn.LIF((128,), activation=ACTIVATION, rngs=rngs),
        nnx.Linear(128, 10, use_bias=False, rngs=rngs),
        spyx.nn.LI((10,), rngs=rngs),
    )


def hidden(path):  # as in the paper, the output layer is not modulated
    return path == "layers/0/kernel"


ACTIVATION = spyx.axn.tanh()  # one function for all networks, so that the step compiles once
ADAM, LAYERS = optax.adam(2e-3), by_path(where=hidden)
METHODS = {  # the optimizer, where GRAPES comes after Adam, and the function that is differentiated
    "plain": (ADAM, spyx.nn.run),
    "local": (optax.chain(ADAM, scale_by_grapes(LAYERS)), spyx.nn.run),
    "mean": (optax.chain(ADAM, scale_by_grapes(LAYERS, control="mean")), spyx.nn.run),
    "propagated": (ADAM, propagated(spyx.nn.run, hidden)),
    "propagated-mean": (ADAM, propagated(spyx.nn.run, hidden, control="mean")),
}
PAIRS = "local plain", "local mean", "propagated plain", "propagated propagated-mean"


def encode(key, images):
    return rate_code(key, images.reshape(len(images), -1), rate=1.0)


@nnx.jit(static_argnames="forward")
def train_step(model, optimizer, key, images, labels, forward):
    def loss_fn(model):
        traces, _ = forward(model, encode(key, images), batch_major=True)
        return spyx.fn.integral_crossentropy()(traces, labels)

    grads = nnx.grad(loss_fn)(model)
    optimizer.update(model, grads)


@nnx.jit
def accuracy(model, key, images, labels):
    traces, _ = spyx.nn.run(model, encode(key, images), batch_major=True)
    return 100 * spyx.fn.integral_accuracy()(traces, labels)[0]


def train(method, seed, data, epochs):
    tx, forward = METHODS[method]
    images, labels, random = *map(np.asarray, data[:2]), np.random.default_rng(seed)
    model, rngs = make_model(seed), nnx.Rngs(seed)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for _ in tqdm(range(epochs), f"{method}, seed {seed}", leave=False):
        for rows in random.permutation(len(labels))[: len(labels) // 32 * 32].reshape(-1, 32):
            train_step(model, optimizer, rngs(), images[rows], labels[rows], forward)
        yield accuracy(model, rngs(), data.test_images, data.test_labels)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=["all", *METHODS], default="all", help="besides plain")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=4, help="two or more")
    options = parser.parse_args(arguments)
    if options.epochs < 1 or options.seeds < 2:
        parser.error("one epoch and two seeds are the least")
    data, seeds, results, table = load(), range(options.seeds), {}, []
    for method in METHODS if options.method == "all" else dict.fromkeys(["plain", options.method]):
        x = np.array([[*train(method, seed, data, options.epochs)] for seed in seeds])
        table.append([method, *(f"{e.mean():.2f} ± {e.std(ddof=1):.2f}" for e in x.T[[0, -1]])])
        results[method] = x
    for name, other in (pair.split() for pair in PAIRS if {*pair.split()} <= results.keys()):
        x, label = results[name] - results[other], f"{name} minus {other}"
        mean, half = x.mean(0), stats.t.ppf(0.975, len(x) - 1) * stats.sem(x)
        table.append([label, *(f"{mean[i]:+z.2f} ± {half[i]:.2f}" for i in (0, -1))])
    print(tabulate(table, ("test accuracy (%)", "epoch 1", f"epoch {options.epochs}"), "github"))


if __name__ == "__main__":
    main()
