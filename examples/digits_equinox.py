"""GRAPES in Equinox.

A dense network on scikit-learn's handwritten digits, without GRAPES, with its local and its
propagated form, and with the control of the local one: the mean factor of the layer for all its
nodes. The other digits_*.py do the same in other frameworks. Prints a table and writes nothing.
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
from grapes_optax import by_path, grapes_sgd
from grapes_optax.equinox import propagated


def hidden(path):
    return "layers/2" not in path  # as in the paper, the output layer is not modulated


plain, sgd = eqx.nn.MLP.__call__, optax.sgd(0.1)
local = partial(grapes_sgd, 0.1, weight_dimension_numbers=by_path(hidden))
METHODS = {  # the forward function and the optimizer
    "plain": (plain, sgd),
    "local": (plain, local()),
    "propagated": (propagated(plain, hidden), sgd),
    "mean": (plain, local(control="mean")),
}


@eqx.filter_jit
def train_step(forward, tx, model, opt_state, images, labels):
    @eqx.filter_grad
    def grad_fn(model):
        logits = jax.vmap(partial(forward, model))(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    params = eqx.filter(model, eqx.is_array)
    updates, opt_state = tx.update(grad_fn(model), opt_state, params)
    return eqx.apply_updates(model, updates), opt_state


@eqx.filter_jit
def accuracy(model, images, labels):
    return (jax.vmap(model)(images).argmax(-1) == labels).mean()


def train(method, seed, epochs, data):
    forward, tx = METHODS[method]
    model = eqx.nn.MLP(64, 10, width_size=128, depth=2, key=jax.random.key(seed))
    opt_state = tx.init(eqx.filter(model, eqx.is_array))
    images, test_images = (x.reshape(len(x), -1) for x in (data.train_images, data.test_images))
    rng = np.random.default_rng(seed)
    for _ in tqdm(range(epochs), f"{method}, seed {seed}", leave=False):
        for batch in rng.permutation(len(images))[: 42 * 32].reshape(-1, 32):
            model, opt_state = train_step(
                forward, tx, model, opt_state, images[batch], data.train_labels[batch]
            )
    return 100 * float(accuracy(model, test_images, data.test_labels))


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
