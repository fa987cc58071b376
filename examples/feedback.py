"""Feedback alignment (FA) and direct feedback alignment (DFA) of handwritten digits, with GRAPES.

`-grapes` is the propagated form, `-mean` its control: every node gets the mean factor of its layer.
Every method sees the same initial weights, feedback weights and batches, seed by seed. After every
epoch the update under the rule is compared with the true gradient, over all training images: at 0
degrees they are aligned, at 90 orthogonal. Prints test accuracies and angles, ± standard deviation,
and differences paired by seed, ± 95 % interval; writes alignment.png into --out.
"""

import argparse
from pathlib import Path

import jax
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
        self.hidden1 = nnx.Linear(64, 128, rngs=rngs)
        self.hidden2 = nnx.Linear(128, 128, rngs=rngs)
        self.output = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.hidden1(x.reshape(len(x), -1)))
        return self.output(nnx.relu(self.hidden2(x)))


def hidden(path):  # as in the paper, the output layer is not modulated
    return "output" not in path


FA = grapes.feedback_alignment(MLP.__call__)
DFA = grapes.direct_feedback_alignment(MLP.__call__)
METHODS = {  # the forward function that is differentiated, and how its curve looks
    "BP": (lambda model, images, feedback: model(images), "#000000", "-"),
    "FA": (FA, "#0072B2", "-"),
    "FA-grapes": (grapes.propagated(FA, hidden), "#56B4E9", "--"),
    "FA-mean": (grapes.propagated(FA, hidden, control="mean"), "#009E73", ":"),
    "DFA": (DFA, "#D55E00", "-"),
    "DFA-grapes": (grapes.propagated(DFA, hidden), "#E69F00", "--"),
    "DFA-mean": (grapes.propagated(DFA, hidden, control="mean"), "#CC79A7", ":"),
}
PAIRS = "FA-grapes FA", "FA-grapes FA-mean", "DFA-grapes DFA", "DFA-grapes DFA-mean"
LAYERS = "hidden1", "hidden2"
plt.rc("axes.formatter", min_exponent=3)


def gradient(method, model, images, labels, feedback):
    def loss_fn(model):
        logits = METHODS[method][0](model, images, feedback=feedback)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return nnx.grad(loss_fn)(model)


@nnx.jit(static_argnames="method")
def train_step(method, model, optimizer, images, labels, feedback):
    optimizer.update(model, gradient(method, model, images, labels, feedback))


@nnx.jit(static_argnames="method")
def measure(method, model, data, feedback):
    update, true = (gradient(rule, model, *data[:2], feedback) for rule in (method, "BP"))
    angles = [alignment(update, true)[f"{layer}/kernel"].angle for layer in LAYERS]
    return 100 * (model(data.test_images).argmax(-1) == data.test_labels).mean(), *angles


def train(method, seed, data, epochs):
    images, labels, random = *map(np.asarray, data[:2]), np.random.default_rng(seed)
    model, rule = MLP(nnx.Rngs(seed)), DFA if method.startswith("DFA") else FA
    feedback = grapes.init_feedback(jax.random.key(seed), rule, model, images[:1])
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    for _ in tqdm(range(epochs), f"{method}, seed {seed}", leave=False):
        for rows in random.permutation(len(labels))[: len(labels) // 32 * 32].reshape(-1, 32):
            train_step(method, model, optimizer, images[rows], labels[rows], feedback)
        yield measure(method, model, data, feedback)


def report(results, folder):
    table, (figure, axes) = [], plt.subplots(2, 2, figsize=(8.4, 6), layout="constrained")
    for name, x in results.items():  # seeds, epochs, and accuracy and angles
        table.append([name, *(f"{e.mean():.2f} ± {e.std(ddof=1):.2f}" for e in x[:, -1].T)])
        (accuracy, *angles), epochs = x.mean(0).T, 1 + np.arange(x.shape[1])
        look = {"c": METHODS[name][1], "ls": METHODS[name][2], "label": name}
        axes[0, 0].semilogy(epochs, 100 - accuracy, **look)
        for ax, angle, layer in zip(axes[1] if name != "BP" else (), angles, LAYERS, strict=False):
            ax.plot(epochs, angle, **look)
            ax.set(xlabel="epoch", ylabel=f"angle to the gradient, {layer} (°)")
    for name, other in (pair.split() for pair in PAIRS if {*pair.split()} <= results.keys()):
        x, tick = (results[name] - results[other])[:, -1], f"{name}\nminus {other}"
        mean, half = x.mean(0), stats.t.ppf(0.975, len(x) - 1) * stats.sem(x)
        table.append(
            [
                tick.replace("\n", " "),
                *(f"{m:+z.2f} ± {h:.2f}" for m, h in zip(mean, half, strict=True)),
            ]
        )
        axes[0, 1].plot(x[:, 0], [tick] * len(x), "x", c="grey")
        axes[0, 1].errorbar(mean[0], tick, xerr=half[0], c="black", marker="o", capsize=6)
    print(tabulate(table, ("", "accuracy (%)", *(f"angle, {n} (°)" for n in LAYERS)), "github"))
    axes[0, 0].set(xlabel="epoch", ylabel="test error (%), mean over seeds")
    axes[0, 0].legend(frameon=False)
    axes[0, 1].set(xlabel="difference after the last epoch (points)")
    axes[0, 1].axvline(0, c="black", lw=0.5)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "alignment.png", dpi=150, pil_kwargs={"optimize": True})


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=["all", *METHODS], default="all", help="besides BP")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=6, help="two or more")
    parser.add_argument("--out", type=Path, default=Path("runs/feedback"))
    options = parser.parse_args(arguments)
    if options.epochs < 1 or options.seeds < 2:
        parser.error("one epoch and two seeds are the least")
    data, seeds, results = load(), range(options.seeds), {}
    for method in METHODS if options.method == "all" else dict.fromkeys(["BP", options.method]):
        results[method] = np.array([[*train(method, seed, data, options.epochs)] for seed in seeds])
    report(results, options.out)


if __name__ == "__main__":
    main()
