"""Handwritten digits with a dense network in pure JAX: plain training, GRAPES and its controls.

Every method sees the same initial weights and batches, seed by seed; `mean` and `propagated-mean`
are controls: every node gets the mean factor of its layer. The other digits_*.py do the same in
other frameworks. Prints test accuracies, ± standard deviation, and differences paired by seed, ±
95 % interval; writes nothing.
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
from grapes_optax import infer_dimension_numbers, modulate_error, scale_by_grapes


def init(key):
    lecun, shapes = jax.nn.initializers.lecun_normal(), [(64, 128), (128, 128), (128, 10)]
    keys = jax.random.split(key, len(shapes))
    return [
        (lecun(key, shape), jnp.zeros(shape[1])) for key, shape in zip(keys, shapes, strict=True)
    ]


def plain(params, x, modulate=lambda z, kernel: z):
    *hidden, (kernel, bias) = params
    x = x.reshape(len(x), -1)
    for w, b in hidden:
        x = jax.nn.relu(modulate(x @ w + b, w))
    return x @ kernel + bias


propagated = partial(plain, modulate=modulate_error)  # the value stays, the error is multiplied
propagated_mean = partial(plain, modulate=partial(modulate_error, control="mean"))

# The parameters have no names: layers, and which one is the output, are read from the program.
LAYERS = infer_dimension_numbers(plain, init(jax.random.key(0)), jnp.ones((1, 8, 8)))
SGD = optax.sgd(0.1)
METHODS = {  # the optimizer, and the forward function that is differentiated
    "plain": (SGD, plain),
    "local": (optax.chain(scale_by_grapes(LAYERS), SGD), plain),
    "mean": (optax.chain(scale_by_grapes(LAYERS, control="mean"), SGD), plain),
    "propagated": (SGD, propagated),
    "propagated-mean": (SGD, propagated_mean),
}
PAIRS = "local plain", "local mean", "propagated plain", "propagated propagated-mean"


@partial(jax.jit, static_argnames=("tx", "forward"))
def train_step(params, opt_state, images, labels, tx, forward):
    def loss_fn(params):
        logits = forward(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    grads = jax.grad(loss_fn)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


@jax.jit
def accuracy(params, images, labels):
    return 100 * (plain(params, images).argmax(-1) == labels).mean()


def train(method, seed, data, epochs):
    tx, forward = METHODS[method]
    images, labels, random = *map(np.asarray, data[:2]), np.random.default_rng(seed)
    params = init(jax.random.key(seed))
    opt_state = tx.init(params)
    for _ in tqdm(range(epochs), f"{method}, seed {seed}", leave=False):
        for rows in random.permutation(len(labels))[: len(labels) // 32 * 32].reshape(-1, 32):
            params, opt_state = train_step(
                params, opt_state, images[rows], labels[rows], tx, forward
            )
        yield accuracy(params, data.test_images, data.test_labels)


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
