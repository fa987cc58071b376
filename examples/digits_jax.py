"""GRAPES in pure JAX: `modulate_error` in the model, or the optimizer.

A dense network on scikit-learn's handwritten digits, without GRAPES, with its local and its
propagated form, and with the control of the local one: the mean factor of the layer for all its
nodes. The other digits_*.py do the same in other frameworks. Prints a table and writes nothing.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import stats
from tabulate import tabulate
from tqdm import tqdm

from examples.data import load
from grapes_optax import grapes_sgd, infer_dimension_numbers, modulate_error


def init(key):
    he, shapes = jax.nn.initializers.he_normal(), [(64, 128), (128, 128), (128, 10)]
    keys = jax.random.split(key, len(shapes))
    return [(he(key, shape), jnp.zeros(shape[1])) for key, shape in zip(keys, shapes, strict=True)]


def forward(params, images, modulate=lambda z, kernel: z):
    *hidden, (kernel, bias) = params
    x = images.reshape(len(images), -1)
    for w, b in hidden:
        x = jax.nn.relu(modulate(x @ w + b, w))  # the value stays, the error gets the factors
    return x @ kernel + bias


# These parameters have no names: the layers, and which is the output, are read from the program.
layers = infer_dimension_numbers(forward, init(jax.random.key(0)), jnp.ones((1, 8, 8)))
sgd, local = optax.sgd(0.1), partial(grapes_sgd, 0.1, weight_dimension_numbers=layers)
METHODS = {  # the forward function and the optimizer
    "plain": (forward, sgd),
    "local": (forward, local()),
    "propagated": (partial(forward, modulate=modulate_error), sgd),
    "mean": (forward, local(control="mean")),
}


@partial(jax.jit, static_argnums=(0, 1))
def train_step(forward, tx, params, opt_state, images, labels):
    def loss_fn(params):
        logits = forward(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    grads = jax.grad(loss_fn)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


@jax.jit
def accuracy(params, images, labels):
    return (forward(params, images).argmax(-1) == labels).mean()


def train(method, seed, epochs, data):
    forward, tx = METHODS[method]
    params = init(jax.random.key(seed))
    opt_state = tx.init(params)
    rng = np.random.default_rng(seed)
    for _ in tqdm(range(epochs), f"{method}, seed {seed}", leave=False):
        for batch in rng.permutation(len(data.train_labels))[: 42 * 32].reshape(-1, 32):
            images, labels = data.train_images[batch], data.train_labels[batch]
            params, opt_state = train_step(forward, tx, params, opt_state, images, labels)
    return 100 * float(accuracy(params, data.test_images, data.test_labels))


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
