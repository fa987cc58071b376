"""What a step of an optimizer costs on accelerators, read from what it compiles to for them.

Nothing runs: XLA's compilers for GPUs and TPUs compile the donated step of every optimizer, on one
chip and sharded over many, and the program tells its bytes, kernels and collectives.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tabulate import tabulate

from benchmarks import accelerators, hlo, scale
from benchmarks.optimizers import OPTIMIZERS
from grapes_optax import DimensionNumbers

WHOLE = P()
ALL = tuple(OPTIMIZERS)
TWO = ALL[:2]


class Tree(NamedTuple):
    """Shapes of parameters, how they lie over the mesh, and which are layers."""

    shapes: Any
    specs: Any
    numbers: Any = None  # the tree of descriptions of scale_by_grapes


def dense(layers: int, inputs: int, nodes: int, *, bias: bool, spec: P = WHOLE) -> Tree:
    one: dict[str, tuple[int, ...]] = {"kernel": (inputs, nodes)}
    lies = {"kernel": spec}
    if bias:
        one["bias"], lies["bias"] = (nodes,), P(*spec[1:])
    names = [f"Dense_{i}" for i in range(layers)]
    return Tree(dict.fromkeys(names, one), dict.fromkeys(names, lies))


def transformer(shape: scale.Transformer) -> Tree:
    kernels, others = shape.kernels(), shape.others()
    specs = {name: P(None, *scale.DIVIDED[kernel.kind]) for name, kernel in kernels.items()}
    return Tree(
        {name: kernel[:3] for name, kernel in kernels.items()} | others,
        specs | {name: P(*scale.spec_of(name)) for name in others},
        dict.fromkeys(kernels, DimensionNumbers(1, 2)) | dict.fromkeys(others),
    )


class Case(NamedTuple):
    tree: str
    make: Callable[[], Tree]
    dtype: str
    chips: int
    layout: str
    optimizers: tuple[str, ...]


def cases(accelerator: str) -> Iterator[Case]:
    small = {
        "4096 x 4096": lambda: dense(1, 4096, 4096, bias=False),
        "64 x (512 x 512, bias)": lambda: dense(64, 512, 512, bias=True),
    }
    for name, make in small.items():
        for dtype in ("float32", "bfloat16"):
            # Muon compiles for half a minute, many of its layers for many of them.
            muon = name == "4096 x 4096" and dtype == "float32"
            yield Case(name, make, dtype, 1, "whole", ALL if muon else ALL[:-1])
    for chips in accelerators.ACCELERATORS[accelerator].topologies:
        for layout in scale.LAYOUTS if chips > 1 else ():
            if scale.cost(scale.TRANSFORMERS["7B"], layout, chips):
                yield Case("7B", _seven_billion, "float32", chips, layout, TWO)


def small_cases(accelerator: str) -> Iterator[Case]:
    """A few seconds of the same."""
    del accelerator
    yield Case("1024 x 1024", lambda: dense(1, 1024, 1024, bias=False), "float32", 1, "whole", TWO)
    both = P("data", "model")
    layers = lambda: dense(3, 1024, 1024, bias=True, spec=both)  # noqa: E731
    yield Case("3 x (1024 x 1024, bias)", layers, "float32", 8, "both", TWO)
    yield Case("transformer", lambda: transformer(scale.SMALL), "float32", 8, "both", TWO)


def _seven_billion() -> Tree:
    return transformer(scale.TRANSFORMERS["7B"])


def measured(accelerator: str, case: Case, optimizer: str) -> dict[str, Any]:
    """Compiles a step and counts what one device does in it."""
    chip, tree = accelerators.ACCELERATORS[accelerator], case.make()
    sizes = scale.mesh_shape(case.layout, case.chips)
    devices = accelerators.devices(accelerator, case.chips)
    mesh = Mesh(devices.reshape(*sizes.values()), tuple(sizes))

    def array(shape: tuple[int, ...], spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, case.dtype, sharding=NamedSharding(mesh, spec))

    params = jax.tree.map(array, tree.shapes, tree.specs, is_leaf=lambda x: isinstance(x, tuple))
    tx = OPTIMIZERS[optimizer](tree.numbers)
    state = jax.eval_shape(tx.init, params)
    if case.chips == 1:
        state = jax.tree.map(lambda x: x.update(sharding=NamedSharding(mesh, WHOLE)), state)

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    # Leaves stay as they lie: XLA may divide a whole one otherwise, and not reuse its memory.
    places = jax.tree.map(lambda x: x.sharding, (params, state))
    lowered = jax.jit(step, donate_argnums=(0, 1), out_shardings=places).lower(
        params, state, params
    )
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None
    assert memory is not None
    program = hlo.read(text, chip.platform)
    held = sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(params)
    )
    return {
        "accelerator": accelerator,
        "tree": case.tree,
        "dtype": case.dtype,
        "chips": case.chips,
        "layout": case.layout,
        "optimizer": optimizer,
        "parameters": held,
        "state": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)),
        "bytes": program.nbytes,
        "kernels": program.kernels,
        "temporary": memory.temp_size_in_bytes,
        "collectives": [
            {**collective._asdict(), "times": times}
            for collective, times in sorted(program.collectives.items())
        ],
        "compile_seconds": round(seconds, 2),
        "memory_seconds": program.nbytes / chip.bandwidth,
        "link_seconds": sum(
            # A reduction among n devices sends every byte 2 (n - 1) / n times, at the least.
            times * collective.nbytes * 2 * (case.chips - 1) / case.chips / chip.links
            for collective, times in program.collectives.items()
        ),
    }


def row(m: dict[str, Any]) -> list[str]:
    sent = [
        f"{c['times']} {c['name']} ({c['reduction']}) of {c['nbytes']:,} B"
        for c in m["collectives"]
    ]
    return [
        m["optimizer"],
        f"{m['bytes'] / m['parameters']:.2f}",
        f"{m['state'] / m['parameters']:.2f}",
        f"{m['kernels']:,}",
        f"{m['temporary'] / 2**20:,.2f}",
        f"{m['memory_seconds'] * 1e6:,.1f}",
        f"{m['link_seconds'] * 1e6:,.1f}",
        f"{m['compile_seconds']:.1f}",
        ", ".join(sent),
    ]


HEAD = (
    "optimizer",
    "bytes / parameters",
    "state / parameters",
    "kernels",
    "temporary (MiB)",
    "memory (µs)",
    "links (µs)",
    "compile (s)",
    "collectives",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    known = accelerators.ACCELERATORS
    parser.add_argument("--accelerators", nargs="+", choices=known, default=list(known))
    parser.add_argument("--small", action="store_true", help="a few seconds of the same")
    parser.add_argument("--output", type=Path, default=scale.RESULTS, help="JSON (%(default)s)")
    options = parser.parse_args()
    for name in options.accelerators:
        if absent := accelerators.missing(name):
            parser.error(f"{', '.join(absent)} must be installed to compile for {name}.")

    jax.config.update("jax_platforms", "cpu")
    packages = {"jax", "jaxlib", "optax"}
    results = []
    for name in options.accelerators:
        chip = known[name]
        packages |= set(accelerators.COMPILERS[chip.platform])
        print(f"\n## {name}\n\n{chip.source}")
        for case in (small_cases if options.small else cases)(name):
            of_case = [measured(name, case, optimizer) for optimizer in case.optimizers]
            results += of_case
            print(f"\n### {case.tree}, {case.dtype}, {case.layout} on {case.chips}\n")
            align = ("left", *["right"] * (len(HEAD) - 2), "left")
            rows = [row(m) for m in of_case]
            print(tabulate(rows, HEAD, "github", disable_numparse=True, colalign=align), flush=True)
    options.output.write_text(
        json.dumps(
            {
                "versions": {package: version(package) for package in sorted(packages)},
                "data_sheets": {name: known[name].source for name in options.accelerators},
                "programs": results,
            },
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
