"""Cost model of a sharded step: bytes in device memory and between devices, by arithmetic.

``python -m benchmarks.scale`` prints the tables of docs/scale.md, and compares them with the
compiled programs that ``python -m benchmarks.compiled`` left in benchmarks/results.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

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
        norms = dict.fromkeys(("norm_attention", "norm_mlp"), (self.blocks, self.width))
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

    A step reads parameters and gradients and writes parameters. GRAPES reads the kernels once more,
    and handles node vectors: each is written, read for its maximum, read for the factor, written
    as that, and read for the update, which makes 5 passes; a vector that is summed over devices is
    laid beside the others, reduced, and taken out again (read and written each time), which makes
    11. Sums go over the devices that share a fan-in, maxima over those that share nodes.
    """
    mesh = mesh_shape(layout, chips)
    kernels = vectors = sums = maxima = 0
    for kernel in transformer.kernels().values():
        by_fan_in, by_nodes = (mesh[axis] for axis in DIVIDED[kernel.kind])
        if kernel.fan_in % by_fan_in or kernel.nodes % by_nodes:
            return None
        nodes = kernel.nodes // by_nodes
        kernels += kernel.stack * kernel.fan_in // by_fan_in * nodes * FLOAT
        vector = kernel.stack * nodes * FLOAT
        vectors += vector * (11 if by_fan_in > 1 else 5)
        sums += vector if by_fan_in > 1 else 0
        maxima += kernel.stack * FLOAT if by_nodes > 1 else 0
    others = 0
    for name, shape in transformer.others().items():
        divided = [mesh[axis] for axis in spec_of(name)]
        if any(size % count for size, count in zip(shape, divided, strict=False)):
            return None
        others += math.prod(shape) * FLOAT // math.prod(divided)
    held = kernels + others
    return Cost(held, 3 * held, 3 * held + kernels + vectors, sums, maxima)


def markdown(head: list[str], rows: list[list[str]], texts: int) -> str:
    align = ["left"] * texts + ["right"] * (len(head) - texts)
    return tabulate(rows, head, "github", disable_numparse=True, colalign=align)


def mega(nbytes: float) -> str:
    return f"{nbytes / 1e6:,.3f}" if nbytes < 1e5 else f"{nbytes / 1e6:,.1f}"


def model_table() -> str:
    """The cost of one device in a step, by the model."""
    rows = []
    for name, transformer in TRANSFORMERS.items():
        for layout in LAYOUTS:
            for chips in (1, 8, 64, 512, 4096):
                each = cost(transformer, layout, chips)
                if each and (chips > 1 or layout == LAYOUTS[0]):
                    rows.append(
                        [
                            name,
                            layout if chips > 1 else "",
                            f"{chips:,}",
                            *map(mega, each[:-1]),
                            f"{each.maxima:,}",
                        ]
                    )
    head = [
        *("model", "layout", "devices", "parameters (MB)", "SGD (MB)", "GRAPES + SGD (MB)"),
        *("sums (MB)", "maxima (bytes)"),
    ]
    return markdown(head, rows, 2)


def given(program: dict[str, Any], reduction: str) -> int:
    return sum(
        each["times"] * each["nbytes"]
        for each in program["collectives"]
        if each["reduction"] == reduction
    )


def check_table(programs: list[dict[str, Any]]) -> str:
    """What the compiled programs do, as a share of what the model says."""
    rows = []
    pairs: dict[tuple[str, int, str], dict[str, dict[str, Any]]] = {}
    for program in programs:
        if program["tree"] in TRANSFORMERS:
            key = program["layout"], program["chips"], program["accelerator"]
            pairs.setdefault(key, {})[program["optimizer"]] = program
    for (layout, chips, accelerator), pair in sorted(pairs.items()):
        sgd, grapes = pair["sgd"], pair["grapes + sgd"]
        each = cost(TRANSFORMERS[grapes["tree"]], layout, chips)
        if each is None or sgd["parameters"] != each.parameters:
            raise ValueError(f"The model does not know {grapes}.")
        wrong = {c["name"] for c in grapes["collectives"]} - {"all-reduce"}
        rows.append(
            [
                layout,
                accelerator,
                str(chips),
                f"{sgd['bytes'] / each.sgd:.3f}",
                f"{grapes['bytes'] / each.grapes:.3f}",
                *(
                    f"{given(grapes, reduction) / expected:.3f}" if expected else ""
                    for reduction, expected in (("add", each.sums), ("maximum", each.maxima))
                ),
                str(sum(c["times"] for c in grapes["collectives"])),
                ", ".join(wrong) or "none",
            ]
        )
    head = [
        "layout",
        "for",
        "chips",
        "SGD",
        "GRAPES + SGD",
        "sums",
        "maxima",
        "all-reduces",
        "others",
    ]
    return markdown(head, rows, 2)


def one_chip_table(programs: list[dict[str, Any]]) -> str:
    """Bytes over parameters on every accelerator, and the kernels that a GPU launches."""
    rows: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for program in programs:
        if program["chips"] == 1:
            key = program["tree"], program["dtype"], program["optimizer"]
            rows.setdefault(key, {})[program["accelerator"]] = program
    head = ["parameters", "type", "optimizer", "H100", "v5e", "v6e", "state", "kernels (H100)"]
    cells = []
    for key, by in rows.items():
        moved = [f"{by[name]['bytes'] / by[name]['parameters']:.2f}" for name in head[3:6]]
        gpu = by["H100"]
        cells.append([*key, *moved, f"{gpu['state'] / gpu['parameters']:.2f}", f"{gpu['kernels']}"])
    return markdown(head, cells, 3)


def main() -> None:
    print("### What one device holds, moves in its memory, and gives to reductions in one step\n")
    print(model_table())
    results = json.loads(RESULTS.read_text())
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    print("\n### Bytes that a step moves on one chip, over those of the parameters\n")
    print(one_chip_table(results["programs"]))
    print(f"\n### Compiled programs over the model ({versions})\n")
    print(check_table(results["programs"]))


if __name__ == "__main__":
    main()
