"""GRAPES in spyx: a spiking network of Flax nnx layers and leaky integrate-and-fire neurons.

Scikit-learn's handwritten digits as spike trains, without GRAPES, with its local and its
propagated form, and with the control of the local one: the mean factor of the layer for all its
nodes. The other digits_*.py train dense networks. Prints a table and writes nothing.
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


def hidden(path):
    return path == "layers/0/kernel"  # as in the paper, the output layer is not modulated


activation = spyx.axn.tanh()  # one function, for which the step compiles once


def make_model(seed):
    rngs = nnx.Rngs(seed)
    return spyx.nn.Sequential(
        nnx.Linear(64, 128, use_bias=False, rngs=rngs),
        spyx.nn.LIF((128,), activation=activation, rngs=rngs),
        nnx.Linear(128, 10, use_bias=False, rngs=rngs),
        spyx.nn.LI((10,), rngs=rngs),
    )


def local(**options):  # after Adam, which would divide by the factor
    return optax.chain(optax.adam(2e-3), scale_by_grapes(by_path(hidden), **options))


METHODS = {  # the forward function and the optimizer
    "plain": (spyx.nn.run, optax.adam(2e-3)),
    "local": (spyx.nn.run, local()),
    "propagated": (propagated(spyx.nn.run, hidden), optax.adam(2e-3)),
    "mean": (spyx.nn.run, local(control="mean")),
}


def encode(key, images):
    return rate_code(key, images.reshape(len(images), -1), rate=1.0)  # new spikes in every step


@nnx.jit(static_argnums=0)
def train_step(forward, model, optimizer, key, images, labels):
    def loss_fn(model):
        traces, _ = forward(model, encode(key, images), batch_major=True)
        return spyx.fn.integral_crossentropy()(traces, labels)

    grads = nnx.grad(loss_fn)(model)
    optimizer.update(model, grads)


@nnx.jit
def accuracy(model, key, images, labels):
    traces, _ = spyx.nn.run(model, encode(key, images), batch_major=True)
    return spyx.fn.integral_accuracy()(traces, labels)[0]


def train(method, seed, epochs, data):
    forward, tx = METHODS[method]
    model, rngs, rng = make_model(seed), nnx.Rngs(seed), np.random.default_rng(seed)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for _ in tqdm(range(epochs), f"{method}, seed {seed}", leave=False):
        for batch in rng.permutation(len(data.train_labels))[: 42 * 32].reshape(-1, 32):
            images, labels = data.train_images[batch], data.train_labels[batch]
            train_step(forward, model, optimizer, rngs(), images, labels)
    return 100 * float(accuracy(model, rngs(), data.test_images, data.test_labels))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=["all", *METHODS], default="all")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args(arguments)
    if min(options.epochs, options.seeds) < 1:
        parser.error("--epochs and --seeds are at least 1")
    data, seeds, results, rows = load(), range(options.seeds), {}, []
    for name in METHODS if options.method == "all" else [options.method]:
        results[name] = np.array([train(name, seed, options.epochs, data) for seed in seeds])
        rows.append([name, f"{results[name].mean():.2f} ± {results[name].std():.2f}"])
        if name != "plain" in results and len(seeds) > 1:
            difference = results[name] - results["plain"]  # paired by the seed
            margin = stats.sem(difference) * stats.t.ppf(0.975, len(seeds) - 1)
            rows[-1].append(f"{difference.mean():+.2f} ± {margin:.2f}")
    print(tabulate(rows, ["method", "test accuracy (%)", "minus plain (points)"], "github"))


if __name__ == "__main__":
    main()
