"""A small residual convolutional network in Flax nnx: plain training, GRAPES and its controls.

A node of a convolution is an output channel. `mean` and `propagated-mean` are the controls, which
give every node the mean factor of its layer. Prints test accuracies, ± standard deviation, and
differences paired by seed, ± 95 % interval; writes learning_curves.png into --out.
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


class Block(nnx.Module):
    def __init__(self, inputs, nodes, stride, rngs):
        self.conv0 = nnx.Conv(inputs, nodes, (1, 1), stride, use_bias=False, rngs=rngs)
        self.conv1 = nnx.Conv(inputs, nodes, (3, 3), stride, use_bias=False, rngs=rngs)
        self.conv2 = nnx.Conv(nodes, nodes, (3, 3), use_bias=False, rngs=rngs)
        self.norm1, self.norm2 = (nnx.GroupNorm(nodes, num_groups=1, rngs=rngs) for _ in "12")

    def __call__(self, x):
        y = nnx.relu(self.norm1(self.conv1(x)))
        return nnx.relu(self.conv0(x) + self.norm2(self.conv2(y)))


class ResNet(nnx.Module):
    def __init__(self, channels, classes, rngs):
        shapes = (channels, 16, 1), (16, 32, 2), (32, 64, 2)
        self.blocks = nnx.Sequential(*(Block(*shape, rngs) for shape in shapes))
        self.output = nnx.Linear(64, classes, rngs=rngs)

    def __call__(self, x):
        return self.output(self.blocks(x.reshape(*x.shape[:3], -1)).mean((1, 2)))


hidden = "output/kernel".__ne__  # as in the paper, the output layer is not modulated
SGD, LAYERS = optax.sgd(0.01, momentum=0.9), by_path(where=hidden)
METHODS = {  # the optimizer, and the forward function that is differentiated
    "plain": (SGD, ResNet.__call__),
    "local": (optax.chain(scale_by_grapes(LAYERS), SGD), ResNet.__call__),
    "mean": (optax.chain(scale_by_grapes(LAYERS, control="mean"), SGD), ResNet.__call__),
    "propagated": (SGD, propagated(ResNet.__call__, hidden)),
    "propagated-mean": (SGD, propagated(ResNet.__call__, hidden, control="mean")),
}
PAIRS = "local plain", "local mean", "propagated plain", "propagated propagated-mean"
COLORS = "#000000", "#0072B2", "#E69F00", "#D55E00", "#CC79A7"  # of Okabe and Ito
LINES = "-", "-", "--", "-.", ":"
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
    model = ResNet(images[0, ..., None].shape[2], SETS[options.dataset].classes, nnx.Rngs(seed))
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
    left.legend(frameon=False)
    right.set(xlabel="difference after the last epoch (points)", ymargin=0.15)
    right.axvline(0, c="black", lw=0.5)
    figure.savefig(folder / "learning_curves.png", dpi=150)
    print(f"\nWrote {folder}/learning_curves.png")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=["all", *METHODS], default="all", help="besides plain")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=4, help="two or more")
    parser.add_argument("--dataset", choices=SETS, default="digits")
    parser.add_argument("--data", help="folder of the other sets, see examples/data.py")
    parser.add_argument("--out", type=Path, default=Path("runs/resnet"))
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
