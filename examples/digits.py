"""GRAPES and its controls on scikit-learn's handwritten digits, in Flax.

A multilayer perceptron is trained by backpropagation, feedback alignment (FA) and direct
feedback alignment (DFA), each plain, with GRAPES, and with the controls that tell whether
it matters which node gets which factor. All seeds train at once. Prints a table and draws
learning_curves.png.
"""

import argparse
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tabulate import tabulate
from tqdm import tqdm

import grapes_optax
from grapes_optax import linen as grapes

BATCH = 32


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.relu(nn.Dense(128, kernel_init=nn.initializers.he_uniform())(x))
        return nn.Dense(10, name="output")(x)


def hidden(path: str) -> bool:
    """As in the paper, the output layer is not modulated."""
    return "output" not in path


class Method(NamedTuple):
    """An optimizer, and contexts of the backward pass that may use feedback weights."""

    optimizer: optax.GradientTransformation
    contexts: Callable[[Any], list] = lambda feedback: []
    direct: bool = False  # feedback weights from the logits, for DFA


def methods(rate: float) -> dict[str, Method]:
    """What is compared, by name; what stands before the colon is drawn in one panel."""
    sgd = optax.sgd(rate)

    def local(**options):
        description = grapes_optax.by_path(where=hidden)
        return grapes_optax.grapes_sgd(rate, dimension_numbers=description, **options)

    def propagated(**options):
        return Method(sgd, lambda feedback: [grapes.propagated(hidden, **options)])

    def aligned(**options):
        def contexts(feedback):
            modulation = [grapes.propagated(hidden, **options)] if options else []
            return [grapes.feedback_alignment(feedback), *modulation]

        return Method(sgd, contexts)

    def direct(optimizer):
        return Method(
            optimizer, lambda feedback: [grapes.direct_feedback_alignment(feedback)], direct=True
        )

    return {
        "BP: plain": Method(sgd),
        "BP: plain, twice the learning rate": Method(optax.sgd(2 * rate)),
        "BP: local GRAPES": Method(local()),
        "BP: local, mean factor": Method(local(control="mean")),
        "BP: local, neighbour's factor": Method(local(control="roll")),
        "BP: propagated GRAPES": propagated(),
        "BP: propagated, mean factor": propagated(control="mean"),
        "FA: plain": aligned(),
        "FA: propagated GRAPES": aligned(control=None),
        "FA: propagated, mean factor": aligned(control="mean"),
        "DFA: plain": direct(sgd),
        "DFA: local GRAPES": direct(local()),
        "DFA: local, mean factor": direct(local(control="mean")),
    }


def digits() -> tuple[jax.Array, ...]:
    """Train and test images (n, 64) in [0, 1], and their labels."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images / 16, labels, test_size=0.25, random_state=0, stratify=labels)
    train_x, test_x, train_y, test_y = split
    return (
        jnp.asarray(train_x, jnp.float32),
        jnp.asarray(train_y),
        jnp.asarray(test_x, jnp.float32),
        jnp.asarray(test_y),
    )


@jax.jit
@jax.vmap
def initial_params(key: jax.Array) -> Any:
    return MLP().init(key, jnp.zeros((1, 64)))


def logits(params: Any, images: jax.Array) -> Any:
    return MLP().apply(params, images)


def train(
    method: Method, data: tuple, seeds: int, epochs: int, progress: tqdm
) -> tuple[np.ndarray, Any, Any]:
    """Trains all seeds at once: test accuracy (epochs, seeds), first and last parameters."""
    train_x, train_y, test_x, test_y = data
    optimizer = method.optimizer

    def loss(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()

    def epoch(params, state, feedback, key):
        def step(carry, batch):
            params, state = carry
            with contextlib.ExitStack() as stack:
                for context in method.contexts(feedback):
                    stack.enter_context(context)
                gradient = jax.grad(loss)(params, train_x[batch], train_y[batch])
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        batches = len(train_x) // BATCH
        order = jax.random.permutation(key, len(train_x))[: batches * BATCH]
        (params, state), _ = jax.lax.scan(step, (params, state), order.reshape(batches, BATCH))
        correct = jnp.argmax(logits(params, test_x), axis=-1) == test_y
        return params, state, correct.mean()

    # Every method sees the same initial weights and the same batches, seed by seed.
    keys = jax.random.split(jax.random.key(0), (epochs + 2, seeds))
    params = first = initial_params(keys[0])
    state, accuracies = jax.vmap(optimizer.init)(params), []
    feedback = jax.vmap(
        lambda key, params: grapes.init_feedback(
            key, MLP(), params, train_x[:1], direct=method.direct
        )
    )(keys[1], params)
    epoch = jax.jit(jax.vmap(epoch))
    for key in keys[2:]:
        params, state, accuracy = epoch(params, state, feedback, key)
        accuracies.append(accuracy)
        progress.update()
    return np.array(accuracies), first, params


def factors(params: Any, layer: str) -> np.ndarray:
    """Factors of all nodes of a layer, all seeds together."""
    kernels = params["params"][layer]["kernel"]
    return np.ravel(jax.vmap(grapes_optax.importance_factor)(kernels))


def mean_and_spread(accuracy: np.ndarray) -> str:
    return f"{100 * accuracy.mean():.2f} ± {100 * accuracy.std(ddof=1):.2f}"


# Colours of Okabe and Ito, with line styles that tell the lines apart in grey.
STYLES = {
    "plain": ("#000000", "-"),
    "plain, twice the learning rate": ("#999999", "--"),
    "local GRAPES": ("#0072B2", "-"),
    "local, mean factor": ("#E69F00", "--"),
    "local, neighbour's factor": ("#009E73", ":"),
    "propagated GRAPES": ("#D55E00", "-"),
    "propagated, mean factor": ("#CC79A7", (0, (5, 2))),
}
PANELS = {"BP": "backpropagation", "FA": "feedback alignment", "DFA": "direct feedback alignment"}


def draw(results: dict[str, tuple], path: Path) -> None:
    """Learning curves with a band over seeds, and the factors before and after training."""
    plt.rcParams |= {"font.size": 8, "axes.titlesize": 9}
    plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False}
    layout: Any = [["BP", "FA", "Dense_0"], ["BP", "DFA", "Dense_1"]]
    figure, axes = plt.subplot_mosaic(
        layout, figsize=(10, 5), width_ratios=[1.5, 1.1, 1], layout="constrained"
    )
    for name, (accuracy, *_) in results.items():
        rule, variant = name.split(": ")
        color, linestyle = STYLES[variant]
        error = 100 - 100 * accuracy
        epochs = 1 + np.arange(len(error))
        mean, spread = error.mean(1), error.std(1, ddof=1)
        axes[rule].plot(epochs, mean, lw=1.6, label=variant, color=color, linestyle=linestyle)
        axes[rule].fill_between(epochs, mean - spread, mean + spread, color=color, alpha=0.1, lw=0)
    for rule, title in PANELS.items():
        curves = axes[rule]
        curves.set_yscale("log")
        curves.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        curves.yaxis.set_major_formatter("{x:g}")
        curves.yaxis.set_minor_locator(NullLocator())
        curves.xaxis.set_major_locator(MaxNLocator(integer=True))
        curves.set(ylabel="test error (%)", title=title)
        curves.legend(frameon=False)
        if rule != "FA":
            curves.set_xlabel("epoch")
    _, *snapshots = results["BP: local GRAPES"]
    for layer in "Dense_0", "Dense_1":
        before, after = (factors(params, layer) for params in snapshots)
        percent = {
            "bins": np.linspace(1, 2, 41),
            "weights": np.full(before.size, 100 / before.size),
        }
        axes[layer].hist(before, **percent, color="#56B4E9", label="before training")
        axes[layer].hist(after, **percent, color="#000000", histtype="step", label="after training")
        axes[layer].set(ylabel="nodes (%)", title=f"factors in {layer}, local GRAPES")
    axes["Dense_1"].legend(frameon=False, loc="upper left")
    axes["Dense_1"].set_xlabel("factor of the node")
    figure.suptitle("Mean, and band of ± 1 standard deviation over seeds", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=8, help="networks, trained at once (>= 2)")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the training set")
    parser.add_argument("--learning-rate", type=float, default=0.1, help="of every method")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/digits"), help="folder of the picture"
    )
    options = parser.parse_args()
    if options.seeds < 2 or options.epochs < 1:
        parser.error("at least 2 seeds, for a standard deviation, and 1 epoch")

    contenders = methods(options.learning_rate)
    data = digits()
    with tqdm(total=len(contenders) * options.epochs, unit="epoch") as progress:
        results = {}
        for name, method in contenders.items():
            progress.set_description(name)
            results[name] = train(method, data, options.seeds, options.epochs, progress)
    rows = [
        (name, mean_and_spread(accuracy[0]), mean_and_spread(accuracy[-1]))
        for name, (accuracy, *_) in results.items()
    ]
    headers = "method", "after epoch 1", f"after epoch {options.epochs}"
    print(f"Test accuracy in %, mean and standard deviation over {options.seeds} seeds:\n")
    print(tabulate(rows, headers, tablefmt="github"))
    options.out.mkdir(parents=True, exist_ok=True)
    draw(results, options.out / "learning_curves.png")
    print(f"\nLearning curves and factors: {options.out / 'learning_curves.png'}")


if __name__ == "__main__":
    main()
