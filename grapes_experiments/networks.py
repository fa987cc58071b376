"""The networks of the experiments, in Flax linen: dense, convolutional, recurrent and spiking."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from grapes_optax.linen import SNU, SoftSNU


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


class ConvNet(nn.Module):
    """Convolutions of 3 x 3 with strides of 2, each twice as wide as the last, and a readout."""

    width: int = 16
    depth: int = 3
    classes: int = 10

    @nn.compact
    def __call__(self, x):
        x = x.reshape(*x.shape[:3], -1)  # grey images have no channels
        for layer in range(self.depth):
            x = nn.relu(nn.Conv(self.width * 2**layer, (3, 3), 2)(x))
        return nn.Dense(self.classes, name="output")(x.reshape(len(x), -1))


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
    """As `rate_code`, but of 16 random bits a spike: drawing them takes most of the time.

    The authors' rate of 6 / 20 is for 784 pixels; of 64 it leaves too little to learn from.
    """
    pixels = images.reshape(len(images), 1, -1)
    bits = jax.random.bits(key, (len(images), 20, pixels.shape[-1]), jnp.uint16)
    return (bits.astype(images.dtype) < (2**16 * rate) * pixels).astype(images.dtype)
