"""GRAPES and its controls on scikit-learn's handwritten digits, in Flax.

A multilayer perceptron is trained by backpropagation, feedback alignment (FA) and direct
feedback alignment (DFA), each plain, with GRAPES, and with the controls that tell whether
it matters which node gets which factor. All seeds train at once. Prints a table and draws
learning_curves.png.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import matplotlib.pyplot as plt
import numpy as np
import optax

import grapes_optax
from examples import training
from examples.training import Method, Run, hidden
from grapes_optax import linen as grapes


class MLP(nn.Module):
    width: int = 128
    classes: int = 10
    depth: int = 2  # hidden layers
    bias: bool = True
    keep: float = 1.0  # of the hidden nodes, where a key for "dropout" is given
    hidden_init: Any = nn.initializers.he_uniform()
    output_init: Any = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x):
        x = x.reshape(len(x), -1)
        for _ in range(self.depth):
            x = nn.relu(nn.Dense(self.width, self.bias, kernel_init=self.hidden_init)(x))
            x = nn.Dropout(1 - self.keep, deterministic=not self.has_rng("dropout"))(x)
        return nn.Dense(self.classes, self.bias, kernel_init=self.output_init, name="output")(x)


def methods(rate: float) -> dict[str, Method]:
    """What is compared, by name; what stands before the colon is drawn in one panel."""
    sgd = optax.sgd(rate)

    def local(**options):
        description = grapes_optax.by_path(where=hidden)
        return grapes_optax.grapes_sgd(rate, weight_dimension_numbers=description, **options)

    def propagated(**options):
        return Method(sgd, lambda forward: grapes.propagated(forward, hidden, **options))

    def aligned(**options):
        def rule(forward):
            forward = grapes.feedback_alignment(forward)
            return grapes.propagated(forward, hidden, **options) if options else forward

        return Method(sgd, rule, feedback=True)

    def direct(optimizer):
        return Method(optimizer, grapes.direct_feedback_alignment, feedback=True)

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


def factors(params: Any, layer: str) -> np.ndarray:
    """Factors of all nodes of a layer, all seeds together."""
    kernels = params["params"][layer]["kernel"]
    return np.ravel(jax.vmap(grapes_optax.importance_factor)(kernels))


PANELS = {"BP": "backpropagation", "FA": "feedback alignment", "DFA": "direct feedback alignment"}


def draw(results: Mapping[str, Run], path: Path) -> None:
    """Learning curves with a band over seeds, and the factors before and after training."""
    layout: Any = [["BP", "FA", "Dense_0"], ["BP", "DFA", "Dense_1"]]
    with plt.rc_context(training.LOOK):
        figure, axes = plt.subplot_mosaic(
            layout, figsize=(10, 5), width_ratios=[1.5, 1.1, 1], layout="constrained"
        )
        for rule, runs in training.panels(results).items():
            training.draw_errors(axes[rule], runs, PANELS[rule])
            axes[rule].legend()
        axes["FA"].set_xlabel("")
        _, first, last = results["BP: local GRAPES"]
        for layer in "Dense_0", "Dense_1":
            before, after = factors(first, layer), factors(last, layer)
            weights = np.full(before.size, 100 / before.size)
            percent = {"bins": np.linspace(1, 2, 41), "weights": weights}
            axes[layer].hist(before, **percent, color="#56B4E9", label="before training")
            axes[layer].hist(
                after, **percent, color="#000000", histtype="step", label="after training"
            )
            axes[layer].set(ylabel="nodes (%)", title=f"factors in {layer}, local GRAPES")
        axes["Dense_1"].legend(loc="upper left")
        axes["Dense_1"].set_xlabel("factor of the node")
        figure.suptitle(training.BAND, fontsize=9)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def main() -> None:
    def contenders(options, classes):
        return {
            name: (MLP(classes=classes), method)
            for name, method in methods(options.learning_rate).items()
        }

    training.main(
        __doc__, "digits", contenders, picture=draw, seeds=8, epochs=20, learning_rate=0.1
    )


if __name__ == "__main__":
    main()
