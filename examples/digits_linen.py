"""GRAPES in Flax linen, in a training loop with TrainState.

A dense network on scikit-learn's handwritten digits, without GRAPES, with its local and its
propagated form, and with the control of the local one: the mean factor of the layer for all its
nodes. The other digits_*.py do the same in other frameworks. Prints a table and writes nothing.
"""

import argparse
from functools import partial

import jax
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from scipy import stats
from tabulate import tabulate
from tqdm import tqdm

from examples.data import load
from grapes_optax import by_path, grapes_sgd
from grapes_optax.linen import propagated


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x.reshape(len(x), -1)
        for _ in range(2):
            x = nn.relu(nn.Dense(128)(x))
        return nn.Dense(10, name="output")(x)


def hidden(path):
    return "output" not in path  # as in the paper, the output layer is not modulated


model, sgd = MLP(), optax.sgd(0.1)
local = partial(grapes_sgd, 0.1, weight_dimension_numbers=by_path(hidden))
METHODS = {  # the forward function and the optimizer
    "plain": (model.apply, sgd),
    "local": (model.apply, local()),
    "propagated": (propagated(model.apply, hidden), sgd),
    "mean": (model.apply, local(control="mean")),
}


@jax.jit
def train_step(state, images, labels):
    def loss_fn(params):
        logits = state.apply_fn({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    grads = jax.grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads)


@jax.jit
def accuracy(state, images, labels):
    return (state.apply_fn({"params": state.params}, images).argmax(-1) == labels).mean()


def train(method, seed, epochs, data):
    apply_fn, tx = METHODS[method]
    params = model.init(jax.random.key(seed), data.train_images[:1])["params"]
    state = TrainState.create(apply_fn=apply_fn, params=params, tx=tx)
    rng = np.random.default_rng(seed)
    for _ in tqdm(range(epochs), f"{method}, seed {seed}", leave=False):
        for batch in rng.permutation(len(data.train_labels))[: 42 * 32].reshape(-1, 32):
            state = train_step(state, data.train_images[batch], data.train_labels[batch])
    return 100 * float(accuracy(state, data.test_images, data.test_labels))


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
