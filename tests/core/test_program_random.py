"""Every axis that is read from a random program is right, or the leaf is left alone by name."""

import re
import warnings

import jax
import pytest
from random_programs import build

from grapes_optax import DimensionNumbers, LeftAlone, infer_dimension_numbers

pytestmark = pytest.mark.usefixtures("promotion_of_frameworks")


def faults(seed: int) -> list[str]:
    """What is wrong of what is read from a program."""
    program = build(seed)
    found = {}
    for keep in (True, False):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found[keep] = infer_dimension_numbers(
                program.apply, program.params, *program.inputs, modulate_output=keep
            )
    text = " ".join(str(warning.message) for warning in said)
    groups: dict[object, set[object]] = {}
    wrong = []
    for name, known in program.known.items():
        value, default = found[True][name], found[False][name]
        if isinstance(value, DimensionNumbers):
            fan_in = None if known.fan_in is None else set(known.fan_in)
            nodes = None if known.nodes is None else set(known.nodes)
            if (set(value.reduction_axis), set(value.output_axis)) != (fan_in, nodes):
                wrong.append(f"{name}: {value}, right {known}")
            elif not known.is_bias and value.gates != known.gates:
                wrong.append(f"{name}: {value.gates} gates, right {known}")
            groups.setdefault(known.layer, set()).add(value.group)
        elif known.fan_in is not None:
            # A bias may be left alone for the sake of its kernel.
            names = [other for other, row in program.known.items() if row.layer == known.layer]
            names = names if known.is_bias else [name]
            named = re.search(rf"\b({'|'.join(names)}) \(", text) or "; ..." in text
            if known.promised or not named:
                wrong.append(f"{name}: left alone, {'' if named else 'not '}named, {known}")
        is_output = known.layer == program.output and known.layer is not None
        right = LeftAlone("output") if is_output and value is not None else value
        if default != right:
            wrong.append(f"{name}: {default} by default, right {right}")
    labels = [label for row in groups.values() for label in row]
    if any(len(row) > 1 for row in groups.values()) or len(set(labels)) < len(labels):
        wrong.append(f"groups {groups}")
    return [*wrong, text, *program.story] if wrong else []


@pytest.mark.parametrize("seed", range(0, 300, 10))
def test_random_programs(seed):
    for one in range(seed, seed + 10):
        assert faults(one) == [], one
    jax.clear_caches()  # they fill the memory
