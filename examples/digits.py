"""Handwritten digits with a dense network in Flax nnx: plain training, GRAPES and its controls.

Every method has the same initial weights and batches, seed by seed. The controls: `mean` and
`propagated-mean`, the mean factor of its layer for every node; `twice`, plain at twice the rate.
Prints accuracies and differences; writes into --out a picture, and Orbax checkpoints METHOD-SEED.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from scipy import stats
from tabulate import tabulate
from tqdm import tqdm

from examples.data import SETS, load
from grapes_optax import by_path, scale_by_grapes
from grapes_optax.nnx import propagated


class MLP(nnx.Module):
    def __init__(self, inputs, classes, rngs):
        self.hidden1, self.hidden2 = (nnx.Linear(n, 128, rngs=rngs) for n in (inputs, 128))
        self.output = nnx.Linear(128, classes, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.hidden1(x.reshape(len(x), -1)))
        return self.output(nnx.relu(self.hidden2(x)))


def hidden(path):  # as in the paper, the output layer is not modulated
    return "output" not in path


SGD, LAYERS = optax.sgd(0.1), by_path(where=hidden)
METHODS = {  # the optimizer, and the forward function that is differentiated
    "plain": (SGD, MLP.__call__),
    "local": (optax.chain(scale_by_grapes(LAYERS), SGD), MLP.__call__),
    "mean": (optax.chain(scale_by_grapes(LAYERS, control="mean"), SGD), MLP.__call__),
    "propagated": (SGD, propagated(MLP.__call__, hidden)),
    "propagated-mean": (SGD, propagated(MLP.__call__, hidden, control="mean")),
    "twice": (optax.sgd(0.2), MLP.__call__),
}
PAIRS = "local plain", "local mean", "propagated plain", "propagated propagated-mean", "twice plain"
COLORS = "#000000", "#0072B2", "#E69F00", "#D55E00", "#CC79A7", "#009E73"  # of Okabe and Ito
LINES = "-", "-", "--", "-.", ":", (0, (9, 2))
plt.rc("axes.formatter", min_exponent=3)


@nnx.jit(static_argnames="forward")
def train_step(model, optimizer, metrics, images, labels, forward):
    def loss_fn(model):
        logits = forward(model, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), logits

    (loss, logits), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    metrics.update(loss=loss, logits=logits, labels=labels)
    optimizer.update(model, grads)


def train(method, seed, data, options):
    tx, forward = METHODS[method]
    images, labels, random = *map(np.asarray, data[:2]), np.random.default_rng(seed)
    model = MLP(images[0].size, SETS[options.dataset].classes, nnx.Rngs(seed))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    metrics = nnx.MultiMetric(loss=nnx.metrics.Average("loss"), accuracy=nnx.metrics.Accuracy())
    for _ in (bar := tqdm(range(options.epochs), f"{method}, seed {seed}", leave=False)):
        for rows in random.permutation(len(labels))[: len(labels) // 32 * 32].reshape(-1, 32):
            train_step(model, optimizer, metrics, images[rows], labels[rows], forward)
        bar.set_postfix({name: f"{value:.3f}" for name, value in metrics.compute().items()})
        metrics.reset()
        yield 100 * (model(data.test_images).argmax(-1) == data.test_labels).mean()
    with ocp.StandardCheckpointer() as saver:
        saver.save(options.out / f"{method}-{seed}", nnx.state((model, optimizer)), force=True)


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
    left.legend(frameon=False)
    right.set(xlabel="difference after the last epoch (points)", ymargin=0.15)
    right.axvline(0, c="black", lw=0.5)
    figure.savefig(folder / "learning_curves.png", dpi=150)
    print(f"\nWrote {folder}/learning_curves.png, and checkpoints beside it")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=["all", *METHODS], default="all", help="besides plain")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=6, help="two or more")
    parser.add_argument("--dataset", choices=SETS, default="digits")
    parser.add_argument("--data", help="folder of the other sets, see examples/data.py")
    parser.add_argument("--out", type=lambda path: Path(path).absolute(), default="runs/digits")
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
