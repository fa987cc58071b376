"""How arrays lie over devices: parts of them inside ``jax.shard_map``, and explicit shardings.

Under ``jax.jit`` an array is whole, however it is sharded. Inside ``jax.shard_map`` it is the
part that one device holds, and a sum over an axis of it is a partial sum.
"""

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, get_abstract_mesh, reshard

# For each axis of an array the axes of the mesh that divide it here, the outermost first.
Parts = tuple[tuple[str, ...], ...]


def manual_axes() -> Mapping[str, int]:
    """Sizes of the axes of the mesh over which arrays are parts here."""
    mesh = get_abstract_mesh()
    return {name: mesh.shape[name] for name in mesh.manual_axes}


def parts_of(spec: object, ndim: int) -> Parts:
    """What divides an array here, of all that a spec says."""
    if not isinstance(spec, PartitionSpec):
        raise TypeError(f"spec must be a jax.sharding.PartitionSpec, got {spec!r}.")
    if len(spec) > ndim:
        raise ValueError(f"{spec} has more entries than the array has axes, {ndim}.")
    entries = [entry if isinstance(entry, tuple) else (entry,) if entry else () for entry in spec]
    manual, known = manual_axes(), get_abstract_mesh().axis_names
    for name in (name for entry in entries for name in entry):
        if manual and name not in known:
            raise ValueError(f"{spec} names {name!r}; the axes of the mesh are {known}.")
    entries += [()] * (ndim - len(entries))
    return tuple(tuple(name for name in entry if name in manual) for entry in entries)


def check_whole(kernel: jax.Array) -> None:
    """Refuses a kernel that may be a part of one, where nobody says which part."""
    manual = manual_axes()
    if not manual:
        return
    # Under check_vma=False, and in pmap, JAX does not follow over which axes an array varies: not
    # even the index of a device does.
    index = jax.lax.axis_index(tuple(manual))
    divided = _varying(kernel) if _varying(index) else set(manual)
    if divided:
        raise ValueError(
            f"A kernel of shape {kernel.shape} may be a part of one here, divided over the axes"
            f" {sorted(divided)} of the mesh. Inside shard_map say how it lies, where"
            " PartitionSpec() stands for a whole kernel: by sharded(weight_dimension_numbers,"
            " in_specs) of a tree, by DimensionNumbers(spec=...) of a kernel, by layers={Dense:"
            " DimensionNumbers(0, 1, spec=...)} of what a learning rule reaches. Or leave it to"
            " jax.jit alone, which needs no word of it."
        )


def _varying(x: jax.Array) -> set[str]:
    kind = jax.typeof(x)
    kind = getattr(kind, "mat", kind)
    return set(getattr(kind, "varying", getattr(kind, "vma", ())))


def _counts(parts: Parts) -> list[int]:
    manual = manual_axes()
    return [math.prod(manual[name] for name in names) for names in parts]


def whole_shape(shape: Sequence[int], parts: Parts | None) -> tuple[int, ...]:
    """Shape of the array that a part of this shape belongs to."""
    counts = [1] * len(shape) if parts is None else _counts(parts)
    return tuple(size * count for size, count in zip(shape, counts, strict=True))


def _starts(shape: Sequence[int], parts: Parts) -> list[jax.Array | int]:
    return [
        jax.lax.axis_index(names) * size if names else 0
        for size, names in zip(shape, parts, strict=True)
    ]


def whole_sum(x: jax.Array, parts: Parts, summed: Sequence[str]) -> jax.Array:
    """The whole of an array, from parts that are partial sums over the axes `summed`.

    One reduction: every device adds its part at its place.
    """
    names = (*summed, *(name for divided in parts for name in divided))
    if not names:
        return x
    whole = jnp.zeros(whole_shape(x.shape, parts), x.dtype)
    return jax.lax.psum(jax.lax.dynamic_update_slice(whole, x, _starts(x.shape, parts)), names)


def part_of(x: jax.Array, parts: Parts) -> jax.Array:
    """The part of a whole array that this device holds."""
    if not any(parts):
        return x
    sizes = [size // count for size, count in zip(x.shape, _counts(parts), strict=True)]
    return jax.lax.dynamic_slice(x, _starts(sizes, parts), sizes)


def whole(x: jax.Array) -> jax.Array:
    """A node vector on every device, where axes of the mesh are explicit and it is sharded."""
    sharding = jax.typeof(x).sharding
    if not any(sharding.spec):
        return x
    return reshard(x, NamedSharding(sharding.mesh, PartitionSpec(*[None] * x.ndim)))


def in_line_with(factor: jax.Array, x: jax.Array) -> jax.Array:
    """A factor that broadcasts against `x`, sharded as `x` is where axes are explicit."""
    sharding = jax.typeof(x).sharding
    # A factor from a sharded kernel lies as the update does: a bias may be sharded otherwise.
    spec = PartitionSpec(
        *(
            axis if n == m else None
            for axis, n, m in zip(sharding.spec, factor.shape, x.shape, strict=True)
        )
    )
    if jax.typeof(factor).sharding.spec == spec:
        return factor
    return reshard(factor, NamedSharding(sharding.mesh, spec))
