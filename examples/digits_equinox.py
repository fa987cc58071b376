"""Handwritten digits with a dense network in Equinox: plain training, GRAPES and its controls.

Every method sees the same initial weights and batches, seed by seed; `mean` and `propagated-mean`
are controls: every node gets the mean factor of its layer. The other digits_*.py do the same in
other frameworks. Prints test accuracies, ± standard deviation, and differences paired by seed, ±
95 % interval; writes nothing.
"""

import argparse
from functools import partial

import equinox as eqx
import jax
import numpy as np
import optax
from scipy import stats
from tabulate import tabulate
from tqdm import tqdm

from examples.data import load
from grapes_optax import by_path, scale_by_grapes
from grapes_optax.equinox import propagated


def hidden(path):  # as in the paper, the output layer is not modulated
    return "layers/2" not in path


MLP, SGD, LAYERS = eqx.nn.MLP, optax.sgd(0.1), by_path(where=hidden)
METHODS = {  # the optimizer, and the forward function that is differentiated
    "plain": (SGD, MLP.__call__),
    "local": (optax.chain(scale_by_grapes(LAYERS), SGD), MLP.__call__),
    "mean": (optax.chain(scale_by_grapes(LAYERS, control="mean"), SGD), MLP.__call__),
    "propagated": (SGD, propagated(MLP.__call__, hidden)),
    "propagated-mean": (SGD, propagated(MLP.__call__, hidden, control="mean")),
}
PAIRS = "local plain", "local mean", "propagated plain", "propagated propagated-mean"


@eqx.filter_jit
def train_step(model, opt_state, images, labels, tx, forward):
    def loss_fn(model):
        logits = jax.vmap(partial(forward, model))(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    grads = eqx.filter_grad(loss_fn)(model)
    updates, opt_state = tx.update(grads, opt_state, eqx.filter(model, eqx.is_array))
    return eqx.apply_updates(model, updates), opt_state


@eqx.filter_jit
def accuracy(model, images, labels):
    return 100 * (jax.vmap(model)(images).argmax(-1) == labels).mean()


def train(method, seed, data, epochs):
    tx, forward = METHODS[method]
    images, labels, random = *map(np.asarray, data[:2]), np.random.default_rng(seed)
    images, test_images = (x.reshape(-1, 64) for x in (images, data.test_images))
    model = MLP(64, 10, width_size=128, depth=2, key=jax.random.key(seed))
    opt_state = tx.init(eqx.filter(model, eqx.is_array))
    for _ in tqdm(range(epochs), f"{method}, seed {seed}", leave=False):
        for rows in random.permutation(len(labels))[: len(labels) // 32 * 32].reshape(-1, 32):
            model, opt_state = train_step(model, opt_state, images[rows], labels[rows], tx, forward)
        yield accuracy(model, test_images, data.test_labels)


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
