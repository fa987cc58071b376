"""GRAPES and its controls in a small vision transformer on handwritten digits.

Patches of 2 x 2 pixels are the tokens. A node of the attention is an entry of a head's query,
key or value, or an output. Under Adam, which divides the gradient by its running size, the
propagated form mostly cancels; the local form acts on the updates here, and does not. Prints a
table and draws learning_curves.png.
"""

import flax.linen as nn
import optax

from examples import training


class Transformer(nn.Module):
    """Pre-norm blocks over the patches of an image, and a readout of the mean token."""

    width: int = 32
    blocks: int = 1
    heads: int = 4
    patch: int = 2
    classes: int = 10

    @nn.compact
    def __call__(self, x):
        batch, height, breadth, *_ = x.shape
        rows, columns = height // self.patch, breadth // self.patch
        x = x.reshape(batch, rows, self.patch, columns, self.patch, -1)
        x = x.swapaxes(2, 3).reshape(batch, rows * columns, -1)
        x = nn.Dense(self.width, name="embedding")(x)
        place = nn.initializers.normal(1.0)
        x += self.param("position", place, (1, rows * columns, self.width))
        for _ in range(self.blocks):
            whole = self.heads * max(1, self.width // self.heads)  # any width will do
            attention = nn.MultiHeadDotProductAttention(self.heads, qkv_features=whole)
            x += attention(nn.LayerNorm()(x))
            y = nn.gelu(nn.Dense(2 * self.width)(nn.LayerNorm()(x)))
            x += nn.Dense(self.width)(y)
        return nn.Dense(self.classes, name="output")(nn.LayerNorm()(x).mean(1))


def main() -> None:
    def contenders(options, classes):
        methods = training.methods(optax.adam(options.learning_rate))
        return {
            name: (Transformer(options.width, classes=classes), method)
            for name, method in methods.items()
        }

    training.main(
        __doc__, "attention", contenders, seeds=4, epochs=20, learning_rate=3e-3, width=32
    )


if __name__ == "__main__":
    main()
