"""Flax nnx: the learning rules for functions of models.

A model is called through copies of its modules, made for one call, that share its variables
and whose layers have a class of their own. What the call assigns to a copy goes to the module
itself; the model that others see is never touched in between.
"""

import copy
import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from grapes_optax._backward import Call, Forward, Framework, Seen, all_but
from grapes_optax._backward import init_feedback as init_feedback
from grapes_optax._importance import DimensionNumbers
from grapes_optax._tree import Path, path_names

__all__ = ["direct_feedback_alignment", "feedback_alignment", "init_feedback", "propagated"]


def _linear_general(layer: Any, ndim: int) -> DimensionNumbers:
    batch, nodes = len(layer.batch_axis), len(layer.out_features)
    return DimensionNumbers(tuple(range(batch, ndim - nodes)), tuple(range(ndim - nodes, ndim)))


_LAYERS = {
    nnx.Linear: all_but(-1),
    nnx.LinearGeneral: _linear_general,
    nnx.Conv: all_but(-1),
    nnx.ConvTranspose: lambda layer, ndim: all_but(-2 if layer.transpose_kernel else -1)(
        layer, ndim
    ),
}


class _Hook(NamedTuple):
    """What a copy of a module knows of the call it is made for."""

    call: Call
    path: Path


def _variables(module: Any) -> dict[str, Any]:
    return {name: leaf for name, leaf in vars(module).items() if isinstance(leaf, nnx.Variable)}


def _base(module: Any) -> Any:
    return type(module).__mro__[1]


def _call_layer(self: Any, *args: Any, **kwargs: Any) -> jax.Array:
    call, path = self.grapes_hook
    variables = _variables(self)
    name, numbers = call.kernel(self, _base(self), path, variables)

    def replaced(kernel: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        graph, state = nnx.split(self)
        alone = nnx.merge(graph, jax.lax.stop_gradient(state))
        setattr(alone, name, nnx.Param(kernel))
        return _base(self).__call__(alone, *args, **kwargs)

    cell = {}
    for holder in call.holders[-1:]:
        for part, layer in vars(holder).items():
            if isinstance(layer, tuple(call.layers)) and "kernel" in vars(layer):
                cell[(*holder.grapes_hook.path, part, "kernel")] = layer.kernel[...]
    natural = functools.partial(_base(self).__call__, self)
    seen = Seen((*path, name), numbers, variables[name][...], natural, replaced, cell)
    return call.layer(seen, args, kwargs)


def _call_cell(self: Any, *args: Any, **kwargs: Any) -> Any:
    holders = self.grapes_hook.call.holders
    holders.append(self)
    try:
        return _base(self).__call__(self, *args, **kwargs)
    finally:
        holders.pop()


def _own(module: Any) -> dict[str, Any]:
    return {name: leaf for name, leaf in vars(module).items() if name != "grapes_hook"}


def _order(item: tuple[str, Any]) -> tuple[int, str]:
    """The order of nnx, in which the first path is that of a shared module."""
    name, _ = item
    return (int(name), "") if name.isdigit() else (-1, name)


def _copy(module: Any) -> Any:
    other = object.__new__(type(module))
    vars(other).update(vars(module))
    return other


@functools.cache
def _subclass(base: Any, call: Callable[..., Any]) -> Any:
    body = {"__call__": call, "__module__": base.__module__, "__qualname__": base.__qualname__}
    body["__copy__"] = _copy
    # Pickled within a call, a copy is the module that it is a copy of.
    body["__reduce__"] = lambda self: (object.__new__, (base,), _own(self))
    return type(base)(base.__name__, (base,), body)


def _is_node(x: Any) -> bool:
    return isinstance(getattr(x, "__self__", x), nnx.Pytree)  # a module, or a method of one


class _Copies:
    """Copies of the modules in a tree, and what has to be known to undo them."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.modules: dict[int, tuple[Any, Any, dict[str, Any]]] = {}
        self.originals: dict[int, Any] = {}

    def of(self, x: Any, path: Path) -> Any:
        """A tree at a path, with copies in the place of its modules."""
        if isinstance(x, types.MethodType) and _is_node(x):
            return types.MethodType(x.__func__, self.of(x.__self__, path))
        if not _is_node(x):
            flat, structure = jax.tree_util.tree_flatten_with_path(x, is_leaf=_is_node)
            if not any(_is_node(leaf) for _, leaf in flat):
                return x
            leaves = [self.of(leaf, (*path, *path_names(keys))) for keys, leaf in flat]
            return jax.tree.unflatten(structure, leaves)
        if id(x) not in self.modules:
            self.modules[id(x)] = self._copied(x, path)
            original, other, before = self.modules[id(x)]
            self.originals[id(other)] = original
            for name, value in sorted(_own(x).items(), key=_order):
                before[name] = vars(other)[name] = self.of(value, (*path, name))
        return self.modules[id(x)][1]

    def _copied(self, x: Any, path: Path) -> tuple[Any, Any, dict[str, Any]]:
        other, hook = copy.copy(x), _Hook(self.call, path)
        if hasattr(x, "grapes_hook"):  # a copy for another rule's call, around this one
            vars(other)["grapes_hook"] = hook
        elif self.call.kernel(x, type(x), path, _variables(x)):
            other.__class__ = _subclass(type(x), _call_layer)
            vars(other)["grapes_hook"] = hook
        elif isinstance(x, nnx.RNNCellBase):
            other.__class__ = _subclass(type(x), _call_cell)
            vars(other)["grapes_hook"] = hook
        return x, other, dict(vars(other))

    def restored(self, x: Any) -> Any:
        """A tree with the modules themselves in the place of their copies."""
        flat, structure = jax.tree.flatten(x, is_leaf=_is_node)
        if not any(id(leaf) in self.originals for leaf in flat):
            return x
        return jax.tree.unflatten(structure, [self.originals.get(id(x), x) for x in flat])

    def write_back(self) -> None:
        """Gives the modules what was assigned to their copies."""
        for original, other, before in self.modules.values():
            after = vars(other)
            for name in before.keys() - after.keys():
                vars(original).pop(name)
            for name, value in after.items():
                if name not in before or value is not before[name]:
                    vars(original)[name] = self.restored(value)


def _see(call: Call, forward: Forward, args: Any, kwargs: Any) -> Any:
    copies = _Copies(call)
    called = copies.of(forward, ())
    args = [copies.of(arg, ()) for arg in args]
    kwargs = {name: copies.of(arg, ()) for name, arg in kwargs.items()}
    try:
        return copies.restored(called(*args, **kwargs))
    finally:
        copies.write_back()


_FRAMEWORK = Framework(_see, _LAYERS, nnx.eval_shape, whole=(nnx.Pytree, nnx.Variable))
propagated = _FRAMEWORK.propagated
feedback_alignment = _FRAMEWORK.feedback_alignment
direct_feedback_alignment = _FRAMEWORK.direct_feedback_alignment
