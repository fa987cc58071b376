"""Recurrent networks in Flax nnx that read digits row by row: plain training, GRAPES, its control.

Kernels summed into one pre-activation share their importance, every gate has a maximum of its own,
and factors do not compound through time: with one recurrent layer `local` and `propagated` are the
same, so that `mean` controls both. Prints test accuracies, ± standard deviation, and differences
paired by seed, ± 95 % interval; writes learning_curves.png into --out.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from scipy import stats
from tabulate import tabulate
from tqdm import tqdm

from examples.data import SETS, load
from grapes_optax import by_path, scale_by_grapes
from grapes_optax.nnx import propagated

CELLS = {"RNN": nnx.SimpleCell, "LSTM": nnx.LSTMCell, "GRU": nnx.GRUCell}


class Reader(nnx.Module):
    def __init__(self, cell, inputs, classes, rngs):
        self.rnn = nnx.RNN(CELLS[cell](inputs, 64, rngs=rngs))
        self.output = nnx.Linear(64, classes, rngs=rngs)

    def __call__(self, x):
        return self.output(self.rnn(x.reshape(*x.shape[:2], -1))[:, -1])


hidden = "output/kernel".__ne__  # as in the paper, the output layer is not modulated
SGD, LAYERS = optax.sgd(0.03, momentum=0.9), by_path(where=hidden)
METHODS = {  # the optimizer, and the forward function that is differentiated
    "plain": (SGD, Reader.__call__),
    "local": (optax.chain(scale_by_grapes(LAYERS), SGD), Reader.__call__),
    "mean": (optax.chain(scale_by_grapes(LAYERS, control="mean"), SGD), Reader.__call__),
    "propagated": (SGD, propagated(Reader.__call__, hidden)),
}
PAIRS = "local plain", "local mean", "propagated plain", "propagated local"
COLORS = "#000000", "#0072B2", "#E69F00", "#D55E00"  # of Okabe and Ito
LINES = "-", "-", "--", "-."
plt.rc("axes.formatter", min_exponent=3)


@nnx.jit(static_argnames="forward")
def train_step(model, optimizer, images, labels, forward):
    def loss_fn(model):
        logits = forward(model, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    optimizer.update(model, nnx.grad(loss_fn)(model))


def train(method, seed, data, options):
    tx, forward = METHODS[method]
    images, labels, random = *map(np.asarray, data[:2]), np.random.default_rng(seed)
    inputs, classes = images[0, 0].size, SETS[options.dataset].classes
    model = Reader(options.cell, inputs, classes, nnx.Rngs(seed))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for _ in tqdm(range(options.epochs), f"{method}, seed {seed}", leave=False):
        for rows in random.permutation(len(labels))[: len(labels) // 32 * 32].reshape(-1, 32):
            train_step(model, optimizer, images[rows], labels[rows], forward)
        yield 100 * (model(data.test_images).argmax(-1) == data.test_labels).mean()


def report(results, folder):
    table, (figure, (left, right)) = [], plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for (name, x), color, line in zip(results.items(), COLORS, LINES, strict=False):
        table.append([name, *(f"{e.mean():.2f} ± {e.std(ddof=1):.2f}" for e in x.T[[0, -1]])])
        left.semilogy(1 + np.arange(len(x.T)), 100 - x.mean(0), c=color, ls=line, label=name)
    for name, other in (pair.split() for pair in PAIRS if {*pair.split()} <= results.keys()):
        x, label = results[name] - results[other], f"{name} minus {other}"
        mean, half = x.mean(0), stats.t.ppf(0.975, len(x) - 1) * stats.sem(x)
        table.append([label, *(f"{mean[i]:+z.2f} ± {half[i]:.2f}" for i in (0, -1))])
        right.plot(x[:, -1], [label] * len(x), "x", c="grey")
        right.errorbar(mean[-1], label, xerr=half[-1], c="black", marker="o", capsize=6)
    print(tabulate(table, ("test accuracy (%)", "epoch 1", f"epoch {len(x.T)}"), "github"))
    left.set(xlabel="epoch", ylabel="test error (%), mean over seeds")
    left.xaxis.get_major_locator().set_params(integer=True)
    left.legend(frameon=False)
    right.set(xlabel="difference after the last epoch (points)", ymargin=0.15)
    right.axvline(0, c="black", lw=0.5)
    figure.savefig(folder / "learning_curves.png", dpi=150)
    print(f"\nWrote {folder}/learning_curves.png")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=["all", *METHODS], default="all", help="besides plain")
    parser.add_argument("--cell", choices=CELLS, default="GRU")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=4, help="two or more")
    parser.add_argument("--dataset", choices=SETS, default="digits")
    parser.add_argument("--data", help="folder of the other sets, see examples/data.py")
    parser.add_argument("--out", type=Path, default=Path("runs/recurrent"))
    options = parser.parse_args(arguments)
    if options.epochs < 1 or options.seeds < 2:
        parser.error("one epoch and two seeds are the least")
    options.out.mkdir(parents=True, exist_ok=True)
    data, seeds, results = load(options.dataset, options.data), range(options.seeds), {}
    for method in METHODS if options.method == "all" else dict.fromkeys(["plain", options.method]):
        results[method] = np.array([[*train(method, seed, data, options)] for seed in seeds])
    report(results, options.out)


if __name__ == "__main__":
    main()
