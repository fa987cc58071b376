"""Equinox: the learning rules for functions of modules.

Layers in the arguments, at any place of a pytree, are replaced for one call by layers of a
class of their own with the same leaves.
"""

import dataclasses
import functools
import types
from typing import Any, NamedTuple

import equinox as eqx
import jax

from grapes_optax._backward import Call, Forward, Framework, Seen, all_but
from grapes_optax._backward import init_feedback as init_feedback
from grapes_optax._tree import Path, path_names

__all__ = ["direct_feedback_alignment", "feedback_alignment", "init_feedback", "propagated"]

_LAYERS = {eqx.nn.Linear: all_but(0), eqx.nn.Conv: all_but(0), eqx.nn.ConvTranspose: all_but(0)}


class _Hook(NamedTuple):
    """What a layer knows of the call in which it is called."""

    call: Call
    path: Path


def _leaves(module: Any) -> dict[str, Any]:
    fields = (field.name for field in dataclasses.fields(module) if field.name != "grapes_hook")
    return {name: getattr(module, name) for name in fields if hasattr(module, name)}


def _made(cls: Any, leaves: dict[str, Any]) -> Any:
    module = object.__new__(cls)
    for name, leaf in leaves.items():
        object.__setattr__(module, name, leaf)
    return module


@functools.cache
def _subclass(base: Any) -> Any:
    class Layer(base):
        grapes_hook: Any = eqx.field(static=True, default=None)

        def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
            call, path = self.grapes_hook
            layer = _made(base, _leaves(self))
            name, numbers = call.kernel(layer, base, path, _leaves(layer))

            def replaced(kernel: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
                arrays, rest = eqx.partition(layer, eqx.is_array)
                alone = eqx.combine(jax.lax.stop_gradient(arrays), rest)
                object.__setattr__(alone, name, kernel)
                return alone(*args, **kwargs)

            trailing = layer.num_spatial_dims if hasattr(layer, "num_spatial_dims") else 0
            kernel = getattr(layer, name)
            seen = Seen((*path, name), numbers, kernel, layer, replaced, trailing=trailing)
            return call.layer(seen, args, kwargs)

        def __reduce__(self) -> Any:
            return object.__new__, (base,), _leaves(self)

    for name in "__name__", "__qualname__", "__module__", "__doc__":
        setattr(Layer, name, getattr(base, name))
    return Layer


def _hooked(call: Call, x: Any, path: Path) -> Any:
    """A tree at a path with layers that know of the call."""
    if isinstance(x, types.MethodType) and isinstance(x.__self__, eqx.Module):
        return types.MethodType(x.__func__, _hooked(call, x.__self__, path))
    if isinstance(x, eqx.Module):
        base = type(x).__mro__[1] if hasattr(x, "grapes_hook") else type(x)
        if call.base(base):
            return _made(_subclass(base), _leaves(x) | {"grapes_hook": _Hook(call, path)})
        call.kernel(x, base, path, _leaves(x))
    flat, structure = jax.tree_util.tree_flatten_with_path(x, is_leaf=lambda leaf: leaf is not x)
    if flat and not flat[0][0]:  # a leaf
        return x
    names = ((*path, *(n for n in path_names(keys) if n != "__self__")) for keys, _ in flat)
    children = [_hooked(call, child, name) for name, (_, child) in zip(names, flat, strict=True)]
    return jax.tree.unflatten(structure, children)


def _plain(x: Any) -> Any:
    is_hooked = lambda leaf: hasattr(leaf, "grapes_hook")  # noqa: E731
    return jax.tree.map(
        lambda leaf: _made(type(leaf).__mro__[1], _leaves(leaf)) if is_hooked(leaf) else leaf,
        x,
        is_leaf=is_hooked,
    )


def _see(call: Call, forward: Forward, args: Any, kwargs: Any) -> Any:
    forward = _hooked(call, forward, ())
    args = [_hooked(call, arg, ()) for arg in args]
    if args and hasattr(args[0], "grapes_hook") and forward is type(args[0]).__mro__[1].__call__:
        forward = type(args[0]).__call__  # a layer by itself
    kwargs = {name: _hooked(call, arg, ()) for name, arg in kwargs.items()}
    return _plain(forward(*args, **kwargs))


_FRAMEWORK = Framework(_see, _LAYERS)
propagated = _FRAMEWORK.propagated
feedback_alignment = _FRAMEWORK.feedback_alignment
direct_feedback_alignment = _FRAMEWORK.direct_feedback_alignment
