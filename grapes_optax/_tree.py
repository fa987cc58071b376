"""Leaves of a parameter tree: their paths, and the classes of their modules."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

Path = tuple[str, ...]


class Leaf(NamedTuple):
    """One leaf of the parameters."""

    path: Path
    array: Any
    module: str  # class of the node that holds it: Equinox keeps its modules in the tree

    @property
    def shape(self) -> tuple[int, ...]:
        return np.shape(self.array)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def is_float(self) -> bool:
        """Whether it has a gradient: integers and what is no array have none."""
        return hasattr(self.array, "dtype") and jnp.issubdtype(self.array.dtype, jnp.inexact)

    @property
    def may_be_kernel(self) -> bool:
        return self.ndim >= 2 and self.is_float


def path_names(keys: jax.tree_util.KeyPath) -> Path:
    """Names along a key path, without the wrapper of a Flax variable."""
    if keys and keys[-1] == jax.tree_util.GetAttrKey("value"):
        keys = keys[:-1]
    fields = ("key", "name", "idx")
    return tuple(str(next(getattr(k, f) for f in fields if hasattr(k, f))) for k in keys)


def without_collection(path: Path) -> Path:
    return path[1:] if path[:1] == ("params",) else path


def path_string(path: Path) -> str:
    """A path as users write and read it: without the collection `params` of linen."""
    return "/".join(without_collection(path)) or "(root)"


class KernelPath(str):
    """Label of a layer: the path of one of its kernels in the tree that was described.

    So a description may become a branch of another one, and its layers stay apart from those of
    the other branches, which a label of the user's, the same everywhere, brings together.
    """

    __slots__ = ()


def tree_leaves(tree: Any) -> Iterator[Leaf]:
    """Leaves of a tree with their paths and the classes of their modules."""

    def walk(node, keys, module):
        for (*key,), child in jax.tree_util.tree_leaves_with_path(
            node, is_leaf=lambda x: x is not node
        ):
            if not key:
                yield Leaf(path_names(keys), node, module)
            else:
                wrapper = path_names((*keys, *key)) == path_names(keys)
                yield from walk(child, (*keys, *key), module if wrapper else type(node).__name__)

    yield from walk(tree, (), "")


def tree_shapes(tree: optax.Params) -> dict[Path, tuple[int, ...]]:
    """Shapes of the leaves by their paths."""
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {path_names(keys): np.shape(leaf) for keys, leaf in flat}


def holes(tree: optax.Params) -> set[Path]:
    """Paths where a transformation or a framework has taken the leaves away."""

    def is_hole(node):
        return node is None or isinstance(node, optax.MaskedNode)

    flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_hole)
    return {path_names(keys) for keys, node in flat if is_hole(node)}
