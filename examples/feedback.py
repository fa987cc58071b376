"""Feedback alignment (FA) and direct feedback alignment (DFA) in Flax nnx, with GRAPES.

`-mean` is the control: every node gets its layer's mean factor. After each epoch the update is
compared with the true gradient, over all training images: at 90 degrees it is orthogonal. Prints
means, ± standard deviation, and paired differences, ± 95 %; writes alignment.png into --out.
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
from grapes_optax import alignment
from grapes_optax import nnx as grapes


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.hidden1, self.hidden2 = (nnx.Linear(n, 128, rngs=rngs) for n in (64, 128))
        self.output = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.hidden1(x.reshape(len(x), -1)))
        return self.output(nnx.relu(self.hidden2(x)))


hidden = "output/kernel".__ne__  # as in the paper, the output layer is not modulated
FA = grapes.feedback_alignment(MLP.__call__)
DFA = grapes.direct_feedback_alignment(MLP.__call__)
METHODS = {  # the forward function that is differentiated, and how its curve looks
    "BP": (lambda model, images, feedback: model(images), {"c": "#000000", "ls": "-"}),
    "FA": (FA, {"c": "#0072B2", "ls": "-"}),
    "FA-grapes": (grapes.propagated(FA, hidden), {"c": "#56B4E9", "ls": "--"}),
    "FA-mean": (grapes.propagated(FA, hidden, control="mean"), {"c": "#009E73", "ls": ":"}),
    "DFA": (DFA, {"c": "#D55E00", "ls": "-"}),
    "DFA-grapes": (grapes.propagated(DFA, hidden), {"c": "#E69F00", "ls": "--"}),
    "DFA-mean": (grapes.propagated(DFA, hidden, control="mean"), {"c": "#CC79A7", "ls": ":"}),
}
PAIRS = "FA-grapes FA", "FA-grapes FA-mean", "DFA-grapes DFA", "DFA-grapes DFA-mean"
LAYERS = "hidden1", "hidden2"
plt.rcParams.update({"axes.formatter.min_exponent": 3, "figure.constrained_layout.use": True})


def loss_fn(model, method, images, labels, feedback):
    logits = METHODS[method][0](model, images, feedback=feedback)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@nnx.jit(static_argnames="method")
def train_step(model, optimizer, method, images, labels, feedback):
    optimizer.update(model, nnx.grad(loss_fn)(model, method, images, labels, feedback))


@nnx.jit(static_argnames="method")
def measure(model, method, data, feedback):
    update, true = (nnx.grad(loss_fn)(model, rule, *data[:2], feedback) for rule in (method, "BP"))
    angles = [alignment(update, true)[f"{layer}/kernel"].angle for layer in LAYERS]
    return 100 * (model(data.test_images).argmax(-1) == data.test_labels).mean(), *angles


def train(method, seed, data, epochs):
    images, labels, random = *map(np.asarray, data[:2]), np.random.default_rng(seed)
    rngs, rule = nnx.Rngs(seed), DFA if method.startswith("DFA") else FA
    optimizer = nnx.Optimizer(model := MLP(rngs), optax.sgd(0.1), wrt=nnx.Param)
    feedback = grapes.init_feedback(rngs(), rule, model, images[:1])
    for _ in tqdm(range(epochs), f"{method}, seed {seed}", leave=False):
        for rows in random.permutation(len(labels))[: len(labels) // 32 * 32].reshape(-1, 32):
            train_step(model, optimizer, method, images[rows], labels[rows], feedback)
        yield measure(model, method, data, feedback)


def report(results, folder):
    table, (figure, ((left, right), below)) = [], plt.subplots(2, 2, figsize=(10, 6.5))
    for name, x in results.items():  # seeds, epochs, and accuracy and angles
        table.append([name, *(f"{e.mean():.2f} ± {e.std(ddof=1):.2f}" for e in x[:, -1].T)])
        (accuracy, *angles), epochs = x.mean(0).T, 1 + np.arange(x.shape[1])
        left.semilogy(epochs, 100 - accuracy, **METHODS[name][1], label=name)
        for ax, angle, layer in zip(below if name != "BP" else (), angles, LAYERS, strict=False):
            ax.plot(epochs, angle, **METHODS[name][1])
            ax.set(xlabel="epoch", ylabel=f"angle to the gradient, {layer} (°)")
    for name, other in (pair.split() for pair in PAIRS if {*pair.split()} <= results.keys()):
        x, label = (results[name] - results[other])[:, -1], f"{name} minus {other}"
        mean, half = x.mean(0), stats.t.ppf(0.975, len(x) - 1) * stats.sem(x)
        table.append([label, *(f"{mean[i]:+z.2f} ± {half[i]:.2f}" for i in range(3))])
        right.plot(x[:, 0], [label] * len(x), "x", c="grey")
        right.errorbar(mean[0], label, xerr=half[0], c="black", marker="o", capsize=6)
    print(tabulate(table, ("", "accuracy (%)", *(f"angle, {n} (°)" for n in LAYERS)), "github"))
    left.set(xlabel="epoch", ylabel="test error (%), mean over seeds")
    left.legend(frameon=False)
    right.set(xlabel="difference after the last epoch (points)", ymargin=0.15)
    right.axvline(0, c="black", lw=0.5)
    print(f"\nWrote {folder}/alignment.png")
    figure.savefig(folder / "alignment.png", dpi=110, pil_kwargs={"optimize": True})


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=["all", *METHODS], default="all", help="besides BP")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=6, help="two or more")
    parser.add_argument("--out", type=Path, default=Path("runs/feedback"))
    options = parser.parse_args(arguments)
    if options.epochs < 1 or options.seeds < 2:
        parser.error("one epoch and two seeds are the least")
    options.out.mkdir(parents=True, exist_ok=True)
    data, seeds, results = load(), range(options.seeds), {}
    for method in METHODS if options.method == "all" else dict.fromkeys(["BP", options.method]):
        results[method] = np.array([[*train(method, seed, data, options.epochs)] for seed in seeds])
    report(results, options.out)


if __name__ == "__main__":
    main()
