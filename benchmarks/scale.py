"""Cost model of a sharded step: bytes in device memory and between devices, by arithmetic.

``python -m benchmarks.scale`` prints the tables of docs/scale.md, and compares them with the
compiled programs that ``python -m benchmarks.compiled`` left in benchmarks/results.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

from tabulate import tabulate

RESULTS = Path(__file__).parent / "results/compiled.json"
FLOAT = 4  # bytes of parameters and of node vectors
# Axes of the mesh that divide fan-in and nodes: of kernels whose nodes go to other devices, and of
# those that bring them back.
DIVIDED = {"column": ("data", "model"), "row": ("model", "data")}
TABLES = {"embedding": ("model", "data"), "output": ("data", "model")}
LAYOUTS = ("FSDP", "tensor parallel", "both")


class Kernel(NamedTuple):
    """Kernels of all blocks in one array: stack, fan-in, nodes."""

    stack: int
    fan_in: int
    nodes: int
    kind: str


class Transformer(NamedTuple):
    """A decoder with a gated MLP and without biases, its blocks stacked."""

    blocks: int
    width: int
    hidden: int
    keys: int  # nodes of the keys, and of the values
    vocabulary: int = 32_000

    def kernels(self) -> dict[str, Kernel]:
        n, width, hidden = self.blocks, self.width, self.hidden
        return {
            "query": Kernel(n, width, width, "column"),
            "key": Kernel(n, width, self.keys, "column"),
            "value": Kernel(n, width, self.keys, "column"),
            "attention_out": Kernel(n, width, width, "row"),
            "gate": Kernel(n, width, hidden, "column"),
            "up": Kernel(n, width, hidden, "column"),
            "down": Kernel(n, hidden, width, "row"),
        }

    def others(self) -> dict[str, tuple[int, ...]]:
        """What is not modulated: embedding and output layer, and the scales of the norms."""
        table = {
            "embedding": (self.vocabulary, self.width),
            "output": (self.width, self.vocabulary),
        }
        norms = {name: (self.blocks, self.width) for name in ("norm_attention", "norm_mlp")}
        return table | norms | {"norm_output": (self.width,)}

    @property
    def size(self) -> int:
        kernels = sum(math.prod(kernel[:3]) for kernel in self.kernels().values())
        return kernels + sum(math.prod(shape) for shape in self.others().values())


TRANSFORMERS = {
    "7B": Transformer(blocks=32, width=4096, hidden=11_008, keys=4096),
    "70B": Transformer(blocks=80, width=8192, hidden=28_672, keys=1024),
}
SMALL = Transformer(blocks=2, width=512, hidden=1024, keys=512, vocabulary=1024)


def mesh_shape(layout: str, chips: int) -> dict[str, int]:
    square = 2 ** math.ceil(math.log2(chips) / 2)
    data = {"whole": 1, "FSDP": chips, "tensor parallel": 1, "both": square}
    return {"data": data[layout], "model": chips // data[layout]}


def spec_of(other: str) -> tuple[str, ...]:
    """The axes of the mesh that divide what is not modulated."""
    return TABLES.get(other, ())


class Cost(NamedTuple):
    """What one device does in one step."""

    parameters: int  # bytes that it holds
    sgd: int  # bytes that a step of SGD moves in device memory
    grapes: int
    sums: int  # bytes that it gives to the reduction of sums
    maxima: int  # bytes that it gives to the reduction of maxima


def cost(transformer: Transformer, layout: str, chips: int) -> Cost | None:
    """Of one device; None where the axes of the mesh do not divide those of the arrays.

    A step reads parameters and gradients and writes parameters. GRAPES reads the kernels once more.
    Sums go over the devices that share a fan-in, maxima over those that share nodes.
    """
    mesh = mesh_shape(layout, chips)
    kernels = sums = maxima = 0
    for kernel in transformer.kernels().values():
        by_fan_in, by_nodes = (mesh[axis] for axis in DIVIDED[kernel.kind])
        if kernel.fan_in % by_fan_in or kernel.nodes % by_nodes:
            return None
        nodes = kernel.nodes // by_nodes
        kernels += kernel.stack * kernel.fan_in // by_fan_in * nodes * FLOAT
        sums += kernel.stack * nodes * FLOAT if by_fan_in > 1 else 0
        maxima += kernel.stack * FLOAT if by_nodes > 1 else 0
    others = 0
    for name, shape in transformer.others().items():
        divided = [mesh[axis] for axis in spec_of(name)]
        if any(size % count for size, count in zip(shape, divided, strict=False)):
            return None
        others += math.prod(shape) * FLOAT // math.prod(divided)
    held = kernels + others
    return Cost(held, 3 * held, 3 * held + kernels, sums, maxima)
