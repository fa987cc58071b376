"""What a sharded step of GRAPES sends between devices, read from its compiled HLO."""

import math
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tabulate import tabulate

from grapes_optax import grapes_sgd

DEVICES = 8
SIZE = 4096
SHARDINGS = {
    "fan-in": {"kernel": P("x", None), "bias": P()},
    "nodes": {"kernel": P(None, "x"), "bias": P("x")},
}
COLLECTIVE = re.compile(
    r" = (?P<shapes>.+?) (?P<name>all-gather|all-reduce|all-to-all|collective-\w+|reduce-scatter"
    r"|ragged-all-to-all)(-start)?\("
)
ARRAY = re.compile(r"(?P<dtype>[a-z]+\d*)\w*\[(?P<sizes>[\d,]*)\]")


def nbytes(dtype: str, sizes: str) -> int:
    # HLO names types by their bits (f32, bf16, f8e4m3fn), but for pred.
    bits = int(re.sub(r"\D", "", dtype) or 8)
    return math.prod(int(size) for size in sizes.split(",") if size) * bits // 8


def collectives(hlo: str) -> Iterator[tuple[str, str, int]]:
    """Name, shapes and bytes on one device of every collective in the text of a module."""
    for match in COLLECTIVE.finditer(hlo):
        arrays = list(ARRAY.finditer(match["shapes"]))
        shapes = " ".join(array[0] for array in arrays)
        yield match["name"], shapes, sum(nbytes(*array.groups()) for array in arrays)


def compiled_step(specs: dict[str, P]) -> str:
    mesh = jax.make_mesh((DEVICES,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    shapes = {"kernel": (SIZE, SIZE), "bias": (SIZE,)}
    # Without data: compiling needs shapes and shardings only.
    params = {
        name: jax.ShapeDtypeStruct(
            shapes[name], jnp.float32, sharding=NamedSharding(mesh, specs[name])
        )
        for name in shapes
    }
    tx = grapes_sgd(1e-3)
    state = jax.eval_shape(tx.init, params)

    def step(
        params: optax.Params, state: optax.OptState, grads: optax.Updates
    ) -> tuple[optax.Params, optax.OptState]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
    hlo = compiled.as_text()
    assert hlo is not None
    return hlo


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    rows = [
        (f"{SIZE} x {SIZE} over {name}", *collective)
        for name, specs in SHARDINGS.items()
        for collective in list(collectives(compiled_step(specs))) or [("none", "", 0)]
    ]
    print(f"### Collectives of a grapes_sgd step on {DEVICES} CPU devices\n")
    print(tabulate(rows, ("kernel", "collective", "shape", "bytes"), tablefmt="github"))


if __name__ == "__main__":
    main()
