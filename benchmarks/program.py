"""What reading the layers from a program costs, once and outside of training.

Seconds of the processor for models of 100 layers: tracing the model by JAX, and all of
``infer_dimension_numbers``, which includes a trace. Run as ``python -m benchmarks.program``.
"""

import time

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.timing import markdown, versions
from grapes_optax import infer_dimension_numbers


class Deep(nn.Module):
    layers: int = 100

    @nn.compact
    def __call__(self, x):
        for _ in range(self.layers):
            x = nn.relu(nn.Dense(32)(x))
        return x


class Residual(nn.Module):
    blocks: int = 50

    @nn.compact
    def __call__(self, x):
        for _ in range(self.blocks):
            y = nn.relu(nn.GroupNorm(4)(nn.Conv(16, (3, 3))(x)))
            x = nn.relu(x + nn.GroupNorm(4)(nn.Conv(16, (3, 3))(y)))
        return x


class Transformer(nn.Module):
    blocks: int = 100

    @nn.compact
    def __call__(self, x):
        for _ in range(self.blocks):
            x = x + nn.MultiHeadAttention(num_heads=4)(nn.LayerNorm()(x))
            x = x + nn.Dense(32)(nn.gelu(nn.Dense(64)(nn.LayerNorm()(x))))
        return x


MODELS = {
    "100 dense layers": (Deep(), jnp.ones((2, 32))),
    "ResNet of 100 convolutions": (Residual(), jnp.ones((1, 8, 8, 16))),
    "100 transformer blocks, not scanned": (Transformer(), jnp.ones((1, 6, 32))),
}


def main() -> None:
    columns = {"model": [], "leaves": [], "trace (s)": [], "infer_dimension_numbers (s)": []}
    for name, (model, x) in MODELS.items():
        params = jax.eval_shape(model.init, jax.random.key(0), x)
        start = time.process_time()
        jax.make_jaxpr(lambda p, x, model=model: model.apply(p, x))(params, x)
        traced = time.process_time()
        infer_dimension_numbers(model.apply, params, x)
        read = time.process_time()
        row = (
            name,
            str(len(jax.tree.leaves(params))),
            f"{traced - start:.2f}",
            f"{read - traced:.2f}",
        )
        for column, cell in zip(columns.values(), row, strict=True):
            column.append(cell)
    print(f"{versions('jax', 'flax')}\n")
    print(markdown(columns))


if __name__ == "__main__":
    main()
