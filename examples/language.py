"""A small causal transformer in Flax nnx on characters: plain training, GRAPES and its controls.

It learns Python's help texts, and is tested on their last tenth. `local` acts behind Adam, before
which a factor cancels; `mean` and `propagated-mean` give every node its layer's mean factor. Prints
bits per character ± deviation, paired differences ± 95 %; writes learning_curves.png into --out.
"""

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from scipy import stats
from tabulate import tabulate
from tqdm import tqdm

from grapes_optax import by_path, scale_by_grapes
from grapes_optax.nnx import propagated

WIDTH, CONTEXT, BATCH = 32, 32, 32
CODES = np.frombuffer("\n".join(topics.values()).encode("ascii", "ignore"), np.uint8)
WINDOWS = np.lib.stride_tricks.sliding_window_view(CODES, CONTEXT + 1)
SPLIT = len(WINDOWS) * 9 // 10


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm1, self.norm2 = (nnx.LayerNorm(WIDTH, rngs=rngs) for _ in "12")
        self.attention = nnx.MultiHeadAttention(4, WIDTH, decode=False, rngs=rngs)
        self.up, self.down = (nnx.Linear(n, m, rngs=rngs) for n, m in ((WIDTH, 128), (128, WIDTH)))

    def __call__(self, x):
        x += self.attention(self.norm1(x), mask=nnx.make_causal_mask(x[..., 0]))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class GPT(nnx.Module):
    def __init__(self, rngs):
        self.characters, self.places = (nnx.Embed(n, WIDTH, rngs=rngs) for n in (128, CONTEXT))
        self.blocks = nnx.Sequential(Block(rngs), Block(rngs), nnx.LayerNorm(WIDTH, rngs=rngs))
        self.output = nnx.Linear(WIDTH, 128, rngs=rngs)

    def __call__(self, codes):
        return self.output(self.blocks(self.characters(codes) + self.places(np.arange(CONTEXT))))


ADAM, hidden = optax.adam(3e-3), "output/kernel".__ne__  # the output layer is not modulated
METHODS = {  # the optimizer, and the forward function that is differentiated
    "plain": (ADAM, GPT.__call__),
    "local": (optax.chain(ADAM, scale_by_grapes(by_path(hidden))), GPT.__call__),
    "mean": (optax.chain(ADAM, scale_by_grapes(by_path(hidden), control="mean")), GPT.__call__),
    "propagated": (ADAM, propagated(GPT.__call__, hidden)),
    "propagated-mean": (ADAM, propagated(GPT.__call__, hidden, control="mean")),
}
PAIRS = "local plain", "local mean", "propagated plain", "propagated propagated-mean"
COLORS = "#000000", "#0072B2", "#E69F00", "#D55E00", "#CC79A7"  # of Okabe and Ito
LINES = "-", "-", "--", "-.", ":"


def bits_per_character(model, windows, forward=GPT.__call__):
    logits = forward(model, windows[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])
    return losses.mean() / np.log(2)


@nnx.jit(static_argnames="forward")
def train_step(model, optimizer, windows, forward):
    optimizer.update(model, nnx.grad(bits_per_character)(model, windows, forward))


def train(method, tx, forward, seed, epochs):
    random, model = np.random.default_rng(seed), GPT(nnx.Rngs(seed))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for _ in tqdm(range(epochs), f"{method}, seed {seed}", leave=False):
        for rows in random.integers(SPLIT, size=(100, BATCH)):
            train_step(model, optimizer, WINDOWS[rows], forward)
        yield bits_per_character(model, WINDOWS[SPLIT + CONTEXT :: CONTEXT])


def report(results, folder):
    table, (figure, (left, right)) = [], plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for (name, x), color, line in zip(results.items(), COLORS, LINES, strict=False):
        table.append([name, *(f"{e.mean():.3f} ± {e.std(ddof=1):.3f}" for e in x.T[[0, -1]])])
        left.plot(1 + np.arange(len(x.T)), x.mean(0), c=color, ls=line, label=name)
    for name, other in (pair.split() for pair in PAIRS if {*pair.split()} <= results.keys()):
        x, label = results[name] - results[other], f"{name} minus {other}"
        mean, half = x.mean(0), stats.t.ppf(0.975, len(x) - 1) * stats.sem(x)
        table.append([label, *(f"{mean[i]:+z.3f} ± {half[i]:.3f}" for i in (0, -1))])
        right.plot(x[:, -1], [label] * len(x), "x", c="grey")
        right.errorbar(mean[-1], label, xerr=half[-1], c="black", marker="o", capsize=6)
    print(tabulate(table, ("bits per character", "epoch 1", f"epoch {len(x.T)}"), "github"))
    left.set(xlabel="epoch", ylabel="bits per character, mean over seeds")
    left.legend(frameon=False)
    right.set(xlabel="difference after the last epoch (bits)", ymargin=0.15)
    right.axvline(0, c="black", lw=0.5)
    figure.savefig(folder / "learning_curves.png", dpi=150)
    print(f"\nWrote {folder}/learning_curves.png")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=["all", *METHODS], default="all", help="besides plain")
    parser.add_argument("--epochs", type=int, default=5, help="of 100 steps")
    parser.add_argument("--seeds", type=int, default=3, help="two or more")
    parser.add_argument("--out", type=Path, default=Path("runs/language"))
    options = parser.parse_args(arguments)
    if options.epochs < 1 or options.seeds < 2:
        parser.error("one epoch and two seeds are the least")
    options.out.mkdir(parents=True, exist_ok=True)
    epochs, seeds, results = options.epochs, range(options.seeds), {}
    for method in METHODS if options.method == "all" else dict.fromkeys(["plain", options.method]):
        results[method] = np.array([[*train(method, *METHODS[method], s, epochs)] for s in seeds])
    report(results, options.out)


if __name__ == "__main__":
    main()
