"""What a value of the program is: data, the weights of a leaf, or a pre-activation."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from grapes_optax._program.equations import Unfollowed

Axis = tuple[int, int]  # number of a leaf, and of one of its axes


class Factor(NamedTuple):
    """An axis of a leaf, or a part of one, within an axis of a value.

    Its entry i is the entry start + i of the leaf's, counted in units of `stride`.
    """

    axis: Axis | None  # None: data
    size: int
    start: int | None = 0  # None: known only while the program runs
    stride: int = 1


Dim = tuple[Factor, ...]  # of one axis of a value, from major to minor
Lost = frozenset[tuple[int, str]]  # leaves, and what made their axes unrecognisable


@dataclass(frozen=True)
class Data:
    """A value that is none of the others."""

    uniform: bool = False  # all entries are equal
    gate: bool = False  # bounded: it may multiply a pre-activation as a gate or a mask
    lost: Lost = frozenset()


@dataclass(frozen=True, kw_only=True)
class View:
    """A value whose axes are followed."""

    dims: tuple[Dim, ...]
    indexed: tuple[tuple[Axis, int | None], ...] = ()  # axes of which it holds one entry

    def factors(self, dims: Iterable[int] | None = None) -> Iterator[Factor]:
        return itertools.chain(*(self.dims if dims is None else (self.dims[k] for k in dims)))

    def axes(self, dims: Iterable[int] | None = None) -> frozenset[Axis]:
        return frozenset(f.axis for f in self.factors(dims) if f.axis)

    def covers(self, dims: Iterable[int] | None = None) -> bool:
        """Whether nothing is broadcast along these axes."""
        return all(f.axis or f.size == 1 for f in self.factors(dims))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(factor.size for factor in dim) for dim in self.dims)

    def with_dim(self, k: int, *dim: Factor) -> Any:
        return replace(self, dims=(*self.dims[:k], dim, *self.dims[k + 1 :]))


@dataclass(frozen=True, kw_only=True)
class Weight(View):
    """The weights of one leaf, whatever was done to their values."""

    leaf: int
    looked_up: bool = False  # the input says which entry of an axis it holds
    product: bool = False  # multiplied by data: a masked kernel, or the scale of a norm
    linear: bool = False  # and by nothing but that
    lost: Lost = frozenset()  # other leaves that went in


@dataclass(frozen=True, kw_only=True)
class Pre(View):
    """A pre-activation: a sum over the fan-in of one kernel or more."""

    kernels: frozenset[int]
    state: str = "sum"  # or "gated", or "squashed" by a bounded nonlinearity
    shared: bool = False  # something else consumes it too, as in a residual stream


@dataclass(frozen=True, kw_only=True)
class OneHot(View):
    """Zero but for one entry along the axes that are followed: a product with it looks up."""

    scaled: bool = False  # by data: the entry says more than which one it is

    @property
    def data(self) -> Data:
        return Data(gate=not self.scaled)


Value = Data | Weight | Pre | OneHot


def broadcast(size: int) -> Dim:
    return () if size == 1 else (Factor(None, size),)


def _divided(factor: Factor, size: int) -> tuple[Factor, Factor] | None:
    """A major factor of some size, and the minor one; None if they do not exist."""
    minor, start = factor.size // size, factor.start
    if factor.size % size or (start or 0) % minor:
        return None
    start = None if start is None else start // minor
    major = factor._replace(size=size, start=start, stride=factor.stride * minor)
    return major, factor._replace(size=minor, start=0)


def regrouped(factors: Iterable[Factor], shape: Sequence[int]) -> tuple[Dim, ...]:
    """The factors dealt out to the axes of a new shape."""
    queue: list[Factor] = []
    for factor in factors:
        if factor.axis is None and queue and queue[-1].axis is None:
            factor = Factor(None, queue.pop().size * factor.size)
        queue.append(factor)
    dims: list[Dim] = []
    for size in shape:
        dims.append(())
        while queue and (size > 1 or (not dims[-1] and queue[0].size == 1)):
            if size % queue[0].size:
                parts = _divided(queue[0], size)
                if parts is None:
                    raise Unfollowed
                queue[:1] = parts
            dims[-1] += (queue[0],)
            size //= queue.pop(0).size
    if dims:
        dims[-1] += tuple(queue)
    return tuple(dims)


def aligned(a: View, b: View) -> list[tuple[Factor, Factor]]:
    """Pairs of factors that lie on each other in two values of one shape."""
    pairs = []
    for dims in zip(a.dims, b.dims, strict=True):
        left, right = ([factor for factor in dim if factor.size > 1] for dim in dims)
        while left and right:
            size = min(left[0].size, right[0].size)
            parts = _divided(left[0], size), _divided(right[0], size)
            if None not in parts:
                left[:1], right[:1] = ([f for f in part or () if f.size > 1] for part in parts)
            pairs.append((left.pop(0), right.pop(0)))
    return pairs
