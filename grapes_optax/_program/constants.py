"""What is known of the entries of a value without running the program: counts, constants, zeros.

Answers come from the operations that made the value, and are no where one is not known.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from grapes_optax._program.flat import Program

SAME_ENTRIES = frozenset({"convert_element_type", "copy", "copy_p", "stop_gradient"})
BY_ENTRY = """
    abs add and clamp div eq floor ge gt le lt max min mul ne neg not or rem round select_n sign sub
"""  # entries of the result depend on those at the same place alone


def _entries(program: Program, number: int) -> np.ndarray | None:
    """The entries of a constant, if they are numbers, and known outside of the program."""
    value = program.constants.get(number)
    is_key = jnp.issubdtype(getattr(value, "dtype", float), jax.dtypes.extended)
    try:
        return None if value is None or is_key else np.asarray(value)
    except jax.errors.JAXTypeError:  # an array of another program around this one
        return None


def _origins(program: Program, number: int, k: int) -> Iterator[tuple[int, int | None]]:
    """The operands of the operation that made a value, and which of their axes is its axis k."""
    op = program.producers[number]
    shape = program.shapes[number]
    for operand in op.inputs:
        place: int | None = None
        before = program.shapes[operand]
        if op.name == "broadcast_in_dim":
            axes = list(op.params["broadcast_dimensions"])
            place = axes.index(k) if k in axes else None
            if place is not None and before[place] != shape[k]:
                place = None
        elif op.name == "reshape":
            # Axes of size 1 may come and go.
            kept = [[i for i, size in enumerate(s) if size > 1] for s in (before, shape)]
            sizes = [[s[i] for i in row] for s, row in zip((before, shape), kept, strict=True)]
            if sizes[0] != sizes[1] or k not in kept[1]:
                raise LookupError
            place = kept[0][kept[1].index(k)]
        elif op.name == "squeeze":
            left = [i for i in range(len(before)) if i not in op.params["dimensions"]]
            place = left[k]
        elif op.name == "transpose":
            place = op.params["permutation"][k]
        elif op.name in SAME_ENTRIES or op.name in BY_ENTRY.split():
            place = k if len(before) == len(shape) and before[k] == shape[k] else None
        else:
            raise LookupError
        yield operand, place


def is_flat(program: Program, number: int, k: int) -> bool:
    """Whether all entries along an axis are known to be equal."""
    shape = program.shapes[number]
    if not shape or shape[k] == 1:
        return True
    value = _entries(program, number)
    if value is not None:
        return bool((value == value.take([0], k)).all())
    op = program.producers.get(number)
    if op is None:
        return False
    if op.name == "iota":
        return op.params["dimension"] != k
    try:
        return all(
            place is None or is_flat(program, operand, place)
            for operand, place in _origins(program, number, k)
        )
    except LookupError:
        return False


def is_distinct(program: Program, number: int, k: int) -> bool:
    """Whether the entries along an axis are known to be different, as those of a count are."""
    if not program.shapes[number]:
        return False
    value = _entries(program, number)
    if value is not None:
        return bool(np.all(np.diff(np.sort(value, k), axis=k) != 0))
    op = program.producers.get(number)
    if op is None:
        return False
    if op.name == "iota":
        return op.params["dimension"] == k
    try:
        origins = list(_origins(program, number, k))
    except LookupError:
        return False
    counted = [
        place is not None and is_distinct(program, operand, place) for operand, place in origins
    ]
    if len(origins) == 1:
        return counted[0] and (op.name == "neg" or op.name not in BY_ENTRY.split())
    flat = [place is None or is_flat(program, operand, place) for operand, place in origins]
    # What is added to all alike changes no difference.
    return op.name in ("add", "sub") and sorted(zip(counted, flat, strict=True)) == [
        (False, True),
        (True, False),
    ]


def is_zero(program: Program, number: int) -> bool:
    """Whether all entries are known to be 0."""
    value = _entries(program, number)
    if value is not None:
        return not np.any(value)
    op = program.producers.get(number)
    moved = ("broadcast_in_dim", "reshape", *SAME_ENTRIES)
    return op is not None and op.name in moved and is_zero(program, op.inputs[0])


def hot_axes(program: Program, left: int, right: int) -> list[int]:
    """The axes along which at most one entry of two values can be equal."""
    shapes = [program.shapes[number] for number in (left, right)]

    def is_hot(k, counted, other):
        several = any(shape[k] > 1 for shape in shapes if shape)
        return several and is_distinct(program, counted, k) and is_flat(program, other, k)

    axes = range(max(map(len, shapes)))
    return [k for k in axes if is_hot(k, left, right) or is_hot(k, right, left)]
