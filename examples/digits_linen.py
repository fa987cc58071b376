"""Handwritten digits with a dense network in Flax linen and TrainState: plain training and GRAPES.

Every method sees the same initial weights and batches, seed by seed; `mean` and `propagated-mean`
are controls: every node gets the mean factor of its layer. The other digits_*.py do the same in
other frameworks. Prints test accuracies, ± standard deviation, and differences paired by seed, ±
95 % interval; writes nothing.
"""

import argparse

import jax
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from scipy import stats
from tabulate import tabulate
from tqdm import tqdm

from examples.data import load
from grapes_optax import by_path, scale_by_grapes
from grapes_optax.linen import propagated


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(128)(x.reshape(len(x), -1)))
        x = nn.relu(nn.Dense(128)(x))
        return nn.Dense(10, name="output")(x)


def hidden(path):  # as in the paper, the output layer is not modulated
    return "output" not in path


MODEL, SGD, LAYERS = MLP(), optax.sgd(0.1), by_path(where=hidden)
METHODS = {  # the optimizer, and the forward function that is differentiated
    "plain": (SGD, MODEL.apply),
    "local": (optax.chain(scale_by_grapes(LAYERS), SGD), MODEL.apply),
    "mean": (optax.chain(scale_by_grapes(LAYERS, control="mean"), SGD), MODEL.apply),
    "propagated": (SGD, propagated(MODEL.apply, hidden)),
    "propagated-mean": (SGD, propagated(MODEL.apply, hidden, control="mean")),
}
PAIRS = "local plain", "local mean", "propagated plain", "propagated propagated-mean"


@jax.jit
def train_step(state, images, labels):
    def loss_fn(params):
        logits = state.apply_fn({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    grads = jax.grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads)


@jax.jit
def accuracy(state, images, labels):
    logits = state.apply_fn({"params": state.params}, images)
    return 100 * (logits.argmax(-1) == labels).mean()


def train(method, seed, data, epochs):
    tx, forward = METHODS[method]
    images, labels, random = *map(np.asarray, data[:2]), np.random.default_rng(seed)
    params = MODEL.init(jax.random.key(seed), images[:1])["params"]
    state = TrainState.create(apply_fn=forward, params=params, tx=tx)
    for _ in tqdm(range(epochs), f"{method}, seed {seed}", leave=False):
        for rows in random.permutation(len(labels))[: len(labels) // 32 * 32].reshape(-1, 32):
            state = train_step(state, images[rows], labels[rows])
        yield accuracy(state, data.test_images, data.test_labels)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=["all", *METHODS], default="all", help="besides plain")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=6, help="two or more")
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
