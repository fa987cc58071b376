"""GRAPES in the chain of transformations that people use, with its factors logged while it trains.

`mean` gives every node the mean factor of its layer; `behind` has GRAPES behind the weight decay,
as it is behind optax.adamw, where the factors multiply the decay too. Prints test accuracies,
± standard deviation, and differences paired by seed, ± 95 % interval. Writes into --out
learning_curves.png and METHOD.csv: accuracy and factors after each epoch, seed by seed.
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

from examples.data import load
from grapes_optax import by_path, factors, scale_by_grapes

LAYERS = by_path("output/kernel".__ne__)  # as in the paper, the output layer is not modulated
CLIP = optax.clip_by_global_norm(1.0)  # first: its threshold is for the gradients of the loss
MOMENTUM = optax.trace(0.9)  # before GRAPES, whose factors are then those of the present weights
GRAPES = scale_by_grapes(LAYERS)  # behind what divides by a size of the gradient, as Adam would
MEAN = scale_by_grapes(LAYERS, control="mean")
DECAY = optax.add_decayed_weights(1e-3)  # behind GRAPES, or the factors multiply the decay
METHODS = {  # the schedule of the learning rate comes last: it scales all of this
    "plain": (CLIP, MOMENTUM, DECAY),
    "local": (CLIP, MOMENTUM, GRAPES, DECAY),
    "mean": (CLIP, MOMENTUM, MEAN, DECAY),
    "behind": (CLIP, MOMENTUM, DECAY, GRAPES),
}
PAIRS = "local plain", "local mean", "behind local"
COLORS, LINES = ("#000000", "#0072B2", "#E69F00", "#D55E00"), ("-", "-", "--", "-.")
COLUMNS = "accuracy,min1,mean1,max1,min2,mean2,max2"  # of the factors in hidden layer 1 and 2
plt.rc("axes.formatter", min_exponent=3)


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.hidden1, self.hidden2 = (nnx.Linear(n, 128, rngs=rngs) for n in (64, 128))
        self.output = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.hidden1(x.reshape(len(x), -1)))
        return self.output(nnx.relu(self.hidden2(x)))


@nnx.jit
def train_step(model, optimizer, images, labels):
    def loss_fn(model):
        logits = model(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    optimizer.update(model, nnx.grad(loss_fn)(model))


def train(tx, method, seed, data, epochs):
    images, labels, random = *map(np.asarray, data[:2]), np.random.default_rng(seed)
    model = MLP(nnx.Rngs(seed))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for _ in tqdm(range(epochs), f"{method}, seed {seed}", leave=False):
        for rows in random.permutation(len(labels))[: len(labels) // 32 * 32].reshape(-1, 32):
            train_step(model, optimizer, images[rows], labels[rows])
        accuracy = 100 * (model(data.test_images).argmax(-1) == data.test_labels).mean()
        found = factors(nnx.state(model, nnx.Param), LAYERS)
        nodes = [np.ravel(found[layer]["kernel"]) for layer in ("hidden1", "hidden2")]
        yield accuracy, *(of(x) for x in nodes for of in (np.min, np.mean, np.max))


def report(results, folder):
    table, epochs = [], 1 + np.arange(results["plain"].shape[1])
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for (name, x), color, line in zip(results.items(), COLORS, LINES, strict=False):
        np.savetxt(folder / f"{name}.csv", x.reshape(-1, 7), "%.4f", ",", header=COLUMNS)
        table.append([name, *(f"{e.mean():.2f} ± {e.std(ddof=1):.2f}" for e in x.T[0, [0, -1]])])
        left.semilogy(epochs, 100 - x[..., 0].mean(0), c=color, ls=line, label=name)
    for name, other in (pair.split() for pair in PAIRS if {*pair.split()} <= results.keys()):
        x, label = (results[name] - results[other])[..., 0], f"{name} minus {other}"
        mean, half = x.mean(0), stats.t.ppf(0.975, len(x) - 1) * stats.sem(x)
        table.append([label, *(f"{mean[i]:+z.2f} ± {half[i]:.2f}" for i in (0, -1))])
        middle.plot(x[:, -1], [label] * len(x), "x", c="grey")
        middle.errorbar(mean[-1], label, xerr=half[-1], c="black", marker="o", capsize=6)
    print(tabulate(table, ("test accuracy (%)", "epoch 1", f"epoch {len(epochs)}"), "github"))
    for i, column in enumerate(COLUMNS.split(",")[1:], 1):
        style = {"c": COLORS[i > 3], "ls": (":", "-", "--")[i % 3], "label": column}
        right.plot(epochs, results.get("local", results["plain"])[..., i].mean(0), **style)
    ticks = epochs[:: len(epochs) // 8 + 1]
    left.set(xlabel="epoch", ylabel="test error (%), mean over seeds", xticks=ticks)
    middle.set(xlabel="difference after the last epoch (points)", ymargin=0.15)
    middle.axvline(0, c="black", lw=0.5)
    right.set(xlabel="epoch", ylabel="factors in hidden layers 1 and 2", xticks=ticks)
    left.legend(frameon=False)
    right.legend(frameon=False, loc="center right", bbox_to_anchor=(1, 0.75))
    figure.savefig(folder / "learning_curves.png", dpi=150)
    print(f"\nWrote {folder}/learning_curves.png, and METHOD.csv beside it")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=["all", *METHODS], default="all", help="besides plain")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seeds", type=int, default=6, help="two or more")
    parser.add_argument("--out", type=Path, default=Path("runs/chain"))
    options = parser.parse_args(arguments)
    if options.epochs < 1 or options.seeds < 2:
        parser.error("one epoch and two seeds are the least")
    options.out.mkdir(parents=True, exist_ok=True)
    data, seeds, results = load(), range(options.seeds), {}
    schedule = optax.cosine_decay_schedule(0.05, options.epochs * (len(data.train_labels) // 32))
    for m in METHODS if options.method == "all" else dict.fromkeys(["plain", options.method]):
        tx = optax.chain(*METHODS[m], optax.scale_by_learning_rate(schedule))
        results[m] = np.array([[*train(tx, m, seed, data, options.epochs)] for seed in seeds])
    report(results, options.out)


if __name__ == "__main__":
    main()
