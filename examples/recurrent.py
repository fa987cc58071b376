"""GRAPES and its controls in recurrent networks that read handwritten digits row by row.

A vanilla cell, an LSTM and a GRU. The kernels that are summed into one pre-activation share
their importance, every gate has a maximum of its own, and factors do not compound through
time. In a single recurrent layer the local form of GRAPES is then the same as the propagated
one, and is left out. Prints a table and draws learning_curves.png.
"""

from typing import Any

import flax.linen as nn
import optax

from examples import training

CELLS: dict[str, Any] = {
    "RNN": nn.SimpleCell,
    "LSTM": nn.LSTMCell,
    "GRU": nn.GRUCell,
}


class Reader(nn.Module):
    """Recurrent layers over the rows of an image, and a readout of the last state."""

    cell: Any = nn.LSTMCell  # or another that takes its width first
    width: int = 64
    layers: int = 1
    classes: int = 10

    @nn.compact
    def __call__(self, x):
        states: Any = x.reshape(*x.shape[:2], -1)
        for _ in range(self.layers):
            states = nn.RNN(self.cell(self.width))(states)
        return nn.Dense(self.classes, name="output")(states[:, -1])


def main() -> None:
    def contenders(options, classes):
        methods = training.methods(optax.sgd(options.learning_rate, momentum=0.9))
        return {
            f"{name}: {variant}": (Reader(cell, options.width, classes=classes), method)
            for name, cell in CELLS.items()
            for variant, method in methods.items()
            if not variant.startswith("local")
        }

    training.main(
        __doc__, "recurrent", contenders, seeds=4, epochs=20, learning_rate=0.03, width=64
    )


if __name__ == "__main__":
    main()
