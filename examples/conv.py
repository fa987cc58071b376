"""GRAPES and its controls in a small residual convolutional network on handwritten digits.

A node of a convolution is an output channel. In the propagated form the factors of the eight
convolutions compound, towards the input. Prints a table and draws learning_curves.png.
"""

import flax.linen as nn
import optax

from examples import training


class ResNet9(nn.Module):
    """Eight convolutions, two residual blocks among them, and a linear readout.

    Strides instead of pooling, and group normalisation with one group: all state is in the
    parameters, and any width and any size of image will do.
    """

    width: int = 8
    classes: int = 10

    @nn.compact
    def __call__(self, x):
        def block(x, width, strides=1):
            x = nn.Conv(width, (3, 3), strides, use_bias=False)(x)
            return nn.relu(nn.GroupNorm(num_groups=1)(x))

        x = block(x.reshape(*x.shape[:3], -1), self.width)  # grey images have no channels
        for factor, residual in (2, True), (4, False), (8, True):
            x = block(x, factor * self.width, strides=2)
            if residual:
                x += block(block(x, factor * self.width), factor * self.width)
        return nn.Dense(self.classes, name="output")(x.mean((1, 2)))


def main() -> None:
    def contenders(options, classes):
        methods = training.methods(optax.sgd(options.learning_rate, momentum=0.9))
        return {name: (ResNet9(options.width, classes), method) for name, method in methods.items()}

    training.main(__doc__, "conv", contenders, seeds=3, epochs=10, learning_rate=0.005, width=8)


if __name__ == "__main__":
    main()
