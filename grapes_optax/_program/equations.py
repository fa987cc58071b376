"""What is read off the equations of a program: the one place that knows how JAX writes them.

Releases of JAX rename the parameters of an equation, and add others. What can be seen from the
shapes is taken from there; a parameter is only read where the table below names it, and one that
the table does not know must not be set. An equation that fails is :class:`Unfollowed`: what goes
through it is left alone, with the reason.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

# Parameters that a rule needs, and those that change no axis.
STRUCTURE: dict[str, tuple[str, str]] = {
    "broadcast_in_dim": ("broadcast_dimensions", "shape sharding"),
    "concatenate": ("dimension", ""),
    "conv_general_dilated": (
        "dimension_numbers feature_group_count batch_group_count",
        "window_strides padding lhs_dilation rhs_dilation precision preferred_element_type"
        " out_sharding",
    ),
    "dot_general": ("dimension_numbers", "precision preferred_element_type out_sharding"),
    "dynamic_slice": ("slice_sizes", ""),
    "gather": (
        "dimension_numbers slice_sizes",
        "fill_value indices_are_sorted mode unique_indices",
    ),
    "iota": ("dimension", "dtype shape sharding"),
    "reduce_sum": ("axes", "out_sharding"),
    "reshape": ("dimensions", "new_sizes sharding"),
    "rev": ("dimensions", ""),
    "slice": ("start_indices limit_indices strides", ""),
    "split": ("sizes axis", ""),
    "squeeze": ("dimensions", ""),
    "stack": ("axis", ""),
    "transpose": ("permutation", ""),
    "unstack": ("axis", ""),
}


class Unfollowed(Exception):  # noqa: N818 - no error: the reason why a leaf is left alone
    """A value cannot be followed through an operation."""


class Strange(Unfollowed):
    """An equation that is not written as it is known."""

    def __init__(self, name: str, what: str):
        super().__init__(f"goes through {name}, which JAX writes in an unknown way: {what}")


def shape(atom: Any) -> tuple[int, ...]:
    return tuple(getattr(atom.aval, "shape", ()))


def is_float(atom: Any) -> bool:
    return jnp.issubdtype(getattr(atom.aval, "dtype", bool), jnp.inexact)


def shapes(atoms: Sequence[Any]) -> list[tuple[int, ...]]:
    return [shape(atom) for atom in atoms]


def is_reference(atom: Any) -> bool:
    """Whether an equation may write to it in place."""
    return hasattr(atom.aval, "inner_aval")


def parameters(eqn: Any) -> Mapping[str, Any]:
    """The parameters that the rules of an operation read."""
    name = eqn.primitive.name
    if name not in STRUCTURE:
        return {}
    needed, harmless = (names.split() for names in STRUCTURE[name])
    missing = [key for key in needed if key not in eqn.params]
    unset = (None, False, ())  # compared by identity: a parameter may be an array
    added = [
        key
        for key in eqn.params.keys() - {*needed, *harmless}
        if not any(eqn.params[key] is value for value in unset)
    ]
    if missing or added:
        raise Strange(name, ", ".join([f"no {key}" for key in missing] + sorted(added)))
    return {key: eqn.params[key] for key in needed}


# Bodies.


def bodies(eqn: Any) -> list[Any]:
    """All jaxprs among the parameters of an equation, open or closed."""
    values = (v if isinstance(v, list | tuple) else (v,) for v in eqn.params.values())
    return [v for row in values for v in row if hasattr(getattr(v, "jaxpr", v), "eqns")]


def opened(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


def _agree(eqn: Any, *pairs: tuple[Sequence[Any], Sequence[Any]]) -> None:
    if any(shapes(ours) != shapes(theirs) for ours, theirs in pairs):
        raise Strange(eqn.primitive.name, "shapes that do not agree with its body")


def _only_body(eqn: Any) -> Any:
    found = bodies(eqn)
    if len(found) != 1:
        raise Strange(eqn.primitive.name, f"{len(found)} bodies")
    return found[0]


def call(eqn: Any) -> Any:
    """The jaxpr that an equation calls."""
    body = _only_body(eqn)
    _agree(eqn, (eqn.invars, opened(body).invars), (eqn.outvars, opened(body).outvars))
    return body


class Loop(NamedTuple):
    """A body, and how many of its inputs are constants and carried values; the rest is scanned."""

    body: Any
    constants: int
    carried: int


def scan(eqn: Any) -> Loop:
    """What is scanned has an axis more outside of the body than in it."""
    body = _only_body(eqn)
    inner, name = opened(body), eqn.primitive.name
    counts = []
    for ours, theirs in (eqn.invars, inner.invars), (eqn.outvars, inner.outvars):
        ranks = [len(a) - len(b) for a, b in zip(shapes(ours), shapes(theirs), strict=False)]
        if len(ours) != len(theirs) or set(ranks) - {0, 1} or ranks != sorted(ranks):
            raise Strange(name, "values that are not constant, carried, or scanned")
        counts.append(ranks.count(0))
    steady, carried = counts
    constants = steady - carried
    said = eqn.params.get("num_consts", constants), eqn.params.get("num_carry", carried)
    if constants < 0 or said != (constants, carried):
        raise Strange(name, "counts that do not add up")
    lengths = {s[0] for s in shapes([*eqn.invars[steady:], *eqn.outvars[carried:]])}
    if len(lengths) > 1:
        raise Strange(name, "axes of different lengths")
    carry = inner.invars[constants:steady]
    _agree(
        eqn,
        (eqn.invars[:steady], inner.invars[:steady]),
        (eqn.outvars[:carried], carry),
        (inner.outvars[:carried], carry),
    )
    return Loop(body, constants, carried)


def while_loop(eqn: Any) -> tuple[Any, int, Loop]:
    """The condition and how many of its inputs are constants, and the loop."""
    name, carried = eqn.primitive.name, len(eqn.outvars)
    try:
        condition, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
    except KeyError as missing:
        raise Strange(name, f"no {missing.args[0]}") from None
    first, constants = (len(opened(jaxpr).invars) - carried for jaxpr in (condition, body))
    if min(first, constants) < 0 or first + constants + carried != len(eqn.invars):
        raise Strange(name, "counts that do not add up")
    carry = eqn.invars[first + constants :]
    _agree(
        eqn,
        (eqn.invars[:first] + carry, opened(condition).invars),
        (eqn.invars[first:], opened(body).invars),
        (carry, opened(body).outvars),
        (carry, eqn.outvars),
    )
    return condition, first, Loop(body, constants, carried)


def branches(eqn: Any) -> list[Any]:
    """The branches of a choice, whose first input says which is taken."""
    found = bodies(eqn)
    if not found:
        raise Strange(eqn.primitive.name, "no branches")
    for branch in found:
        inner = opened(branch)
        _agree(eqn, (eqn.invars[1:], inner.invars), (eqn.outvars, inner.outvars))
    return found
