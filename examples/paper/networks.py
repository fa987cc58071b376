"""The networks of the experiments, in Flax linen: dense, ResNet-9, recurrent and spiking."""

from typing import Any

import flax.linen as nn
import jax

from grapes_optax.linen import SNU, SoftSNU
from grapes_optax.spiking import rate_code


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


SPIKING = {
    "SNU": (SNU, False),
    "sSNU": (SoftSNU, False),
    "recurrent SNU": (SNU, True),
    "recurrent sSNU": (SoftSNU, True),
}


class Spiking(nn.Module):
    cell: type[SNU] = SNU
    recurrent: bool = True
    width: int = 128
    layers: int = 1
    classes: int = 10

    @nn.compact
    def __call__(self, x):
        layers = [nn.RNN(self.cell(self.width, self.recurrent)) for _ in range(self.layers)]
        return nn.Dense(self.classes, name="output")(nn.Sequential(layers)(x).mean(axis=1))


def spikes(key: jax.Array, images: jax.Array, rate: float = 1.0) -> jax.Array:
    """The authors' rate of 6 / 20 is for 784 pixels; of 64 it leaves too little to learn from."""
    return rate_code(key, images.reshape(len(images), -1), steps=20, rate=rate)
