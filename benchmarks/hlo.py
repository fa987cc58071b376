"""What one device does in a compiled program, read from the text of XLA's scheduled HLO.

The instructions of the entry computation run one after the other: fusions, copies, collectives,
loops. Each reads its operands and writes its results. Those that lie in device memory are the
traffic; what a TPU lays out in its fast memory (memory space 1) is none, though ``cost_analysis``
counts it.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

ARRAY = re.compile(r"(?P<dtype>pred|[a-z]+\d+\w*)\[(?P<sizes>[\d,]*)\](?:\{(?P<layout>[^}]*)\})?")
COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%(?P<name>[\w.-]+) \(.*\{$")
INSTRUCTION = re.compile(
    r"\s+(?P<root>ROOT )?%(?P<name>[\w.-]+) = (?P<shape>.+?) (?P<op>[a-z][\w-]*)"
    r"\((?P<operands>.*?)\)(?P<attributes>(?:, .*)?)$"
)
# What only names, groups or waits for what others made.
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "add-dependency", "iota"),
}
COLLECTIVES = {
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
}
# The memory spaces of a layout that are device memory: of a GPU also that of collectives.
DEVICE_MEMORY = {"tpu": {0}, "cuda": {0, 1}, "cpu": {0}}


class Array(NamedTuple):
    nbytes: int
    space: int


class Instruction(NamedTuple):
    name: str
    results: list[Array]
    op: str
    operands: list[str]
    attributes: str
    root: bool
    number: int  # of a parameter, else 0

    def calls(self, attribute: str) -> str:
        match = re.search(rf"\b{attribute}=%([\w.-]+)", self.attributes)
        if match is None:
            raise ValueError(f"The instruction {self.name} has no {attribute}.")
        return match[1]


class Collective(NamedTuple):
    """What one device gives to a collective; `reduction` is "add" or "maximum", or empty."""

    name: str
    reduction: str
    nbytes: int


class Program(NamedTuple):
    """What one device does in one run of a program."""

    nbytes: int  # read from and written to device memory
    kernels: int  # instructions that run: on a GPU the kernels that are launched
    collectives: Counter[Collective]


Computations = dict[str, dict[str, Instruction]]


def arrays(shape: str) -> list[Array]:
    found = []
    for match in ARRAY.finditer(shape):
        # HLO names types by their bits (f32, bf16, f8e4m3fn), but for pred.
        bits = 8 if match["dtype"] == "pred" else int(re.findall(r"\d+", match["dtype"])[0])
        sizes = [int(size) for size in match["sizes"].split(",") if size]
        space = re.search(r"S\((\d+)\)", match["layout"] or "")
        found.append(Array(math.prod(sizes) * bits // 8, int(space[1]) if space else 0))
    return found


def computations(hlo: str) -> tuple[str, Computations]:
    """The name of the entry computation, and the instructions of all, by their names."""
    entry, found = "", {}
    current: dict[str, Instruction] = {}
    for line in hlo.splitlines():
        if head := COMPUTATION.match(line):
            current = found.setdefault(head["name"], {})
            entry = head["name"] if head["entry"] else entry
        elif match := INSTRUCTION.match(line):
            current[match["name"]] = Instruction(
                match["name"],
                arrays(match["shape"]),
                match["op"],
                re.findall(r"%([\w.-]+)", match["operands"]),
                match["attributes"],
                match["root"] is not None,
                int(match["operands"]) if match["op"] == "parameter" else 0,
            )
    if not entry:
        raise ValueError("The text has no entry computation.")
    return entry, found


def _read_by_fusion(
    fused: dict[str, Instruction], operands: list[str], known: dict[str, Instruction]
) -> list[Array]:
    """What a fusion reads: of an operand that it only takes slices of, no more than these."""
    parameters = sorted((i for i in fused.values() if i.op == "parameter"), key=lambda i: i.number)
    read = []
    for parameter, operand in zip(parameters, operands, strict=True):
        users = [i for i in fused.values() if parameter.name in i.operands]
        sliced = [array for i in users if i.op in ("slice", "dynamic-slice") for array in i.results]
        arrays = known[operand].results
        if len(sliced) == len(users):
            nbytes = min(arrays[0].nbytes, sum(array.nbytes for array in sliced))
            arrays = [arrays[0]._replace(nbytes=nbytes)]
        read += arrays
    return read


def _runs(
    found: Computations, computation: str, times: int = 1
) -> Iterator[tuple[Instruction, list[Array], int]]:
    """Every instruction that a computation runs, what it is given, and how many times."""
    known = found[computation]
    for instruction in known.values():
        op = instruction.op
        if op == "while":
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.attributes)
            if trips is None:
                raise ValueError(f"The loop {instruction.name} does not tell its trips.")
            for part in ("condition", "body"):
                yield from _runs(found, instruction.calls(part), times * int(trips[1]))
        elif op == "call":
            yield from _runs(found, instruction.calls("to_apply"), times)
        elif op == "async-start":
            yield from _runs(found, instruction.calls("calls"), times)
        elif op == "conditional":
            raise ValueError(f"Which branch {instruction.name} takes the text does not tell.")
        elif op not in FREE and not op.endswith(("-done", "-update")):
            if op == "fusion":
                fused = found[instruction.calls("calls")]
                given = _read_by_fusion(fused, instruction.operands, known)
            else:
                given = [array for name in instruction.operands for array in known[name].results]
            yield instruction, given, times


def _moved(instruction: Instruction, given: list[Array], name: str) -> list[Array]:
    """The arrays that an instruction reads and writes."""
    if name == "copy" and instruction.op == "copy-start":  # (copy, operand, context)
        return [*given, instruction.results[0]]
    if name == "slice" and instruction.op == "slice-start":  # (operands, slice, context)
        copy = instruction.results[len(given)]
        return [copy, *(copy._replace(space=array.space) for array in given)]
    if name == "slice":  # reads what it writes
        return [copy for result in instruction.results for copy in (result, result)]
    if name == "all-reduce" and instruction.op == "all-reduce-start":  # results, or operands too
        return [*given, *instruction.results[-len(given) :]]
    if name in COLLECTIVES and instruction.op != name:  # (operands, results)
        return instruction.results
    return [*given, *instruction.results]


def _collectives(
    found: Computations, instruction: Instruction, given: list[Array]
) -> Iterator[Collective]:
    """The collective that an instruction is, or those that it was fused with."""
    inner = found[instruction.calls("calls")] if instruction.op == "fusion" else {}
    within = [
        (i, [array for name in i.operands for array in inner[name].results]) for i in inner.values()
    ]
    for each, operands in [(instruction, given), *within]:
        name = each.op.removesuffix("-start")
        if name in COLLECTIVES:
            apply = found[each.calls("to_apply")] if "to_apply=" in each.attributes else {}
            reduction = "".join(i.op for i in apply.values() if i.root)
            yield Collective(name, reduction, sum(array.nbytes for array in operands))


def read(hlo: str, platform: str) -> Program:
    """Counts what the text of a compiled program says."""
    entry, found = computations(hlo)
    nbytes = kernels = 0
    collectives: Counter[Collective] = Counter()
    for instruction, given, times in _runs(found, entry):
        if "ConcatBitcast" in instruction.attributes:
            continue  # pieces that lie beside each other already
        name = instruction.op.removesuffix("-start")
        kernels += times
        nbytes += times * sum(
            array.nbytes
            for array in _moved(instruction, given, name)
            if array.space in DEVICE_MEMORY[platform]
        )
        for collective in _collectives(found, instruction, given):
            collectives[collective] += times
    return Program(nbytes, kernels, collectives)
