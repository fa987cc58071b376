"""Flax nnx: the learning rules for functions of models.

A model is called through copies of its modules, made for one call, that share its variables
and whose layers have a class of their own. What the call assigns to a copy goes to the module
itself; the model that others see is never touched in between.
"""

import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from grapes_optax._backward import Call, Forward, Framework, Seen, all_but
from grapes_optax._backward import init_feedback as init_feedback
from grapes_optax._importance import DimensionNumbers
from grapes_optax._spiking import Carry, check_units, spike, step
from grapes_optax._tree import Path, path_names

__all__ = [
    "SNU",
    "SoftSNU",
    "direct_feedback_alignment",
    "feedback_alignment",
    "init_feedback",
    "propagated",
]


def _linear_general(layer: Any, ndim: int) -> DimensionNumbers:
    batch, nodes = len(layer.batch_axis), len(layer.out_features)
    return DimensionNumbers(tuple(range(batch, ndim - nodes)), tuple(range(ndim - nodes, ndim)))


def _conv_transpose(layer: Any, ndim: int) -> DimensionNumbers:
    return all_but(-2 if layer.transpose_kernel else -1)(layer, ndim)


_LAYERS = {
    nnx.Linear: all_but(-1),
    nnx.LinearGeneral: _linear_general,
    nnx.Conv: all_but(-1),
    nnx.ConvTranspose: _conv_transpose,
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
    kernel, mask = variables[name][...], getattr(self, "mask", None)
    kernel = kernel if mask is None else kernel * mask
    seen = Seen((*path, name), numbers, kernel, natural, replaced, cell, leading=True)
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
        cls, hook = type(x), {"grapes_hook": _Hook(self.call, path)}
        if hasattr(x, "grapes_hook"):
            pass  # a copy for another rule's call, around this one
        elif self.call.kernel(x, cls, path, _variables(x)):
            cls = _subclass(cls, _call_layer)
        elif isinstance(x, nnx.RNNCellBase):
            cls = _subclass(cls, _call_cell)
        else:
            hook = {}
        other = object.__new__(cls)
        vars(other).update(vars(x) | hook)
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
                vars(original).pop(name, None)
            for name, value in after.items():
                if name not in before or value is not before[name]:
                    vars(original)[name] = self.restored(value)


def _see(call: Call, forward: Forward, args: Any, kwargs: Any) -> Any:
    copies = _Copies(call)
    called: Any = copies.of(forward, ())
    args = [copies.of(arg, ()) for arg in args]
    if args and hasattr(args[0], "grapes_hook") and called is _base(args[0]).__call__:
        called = type(args[0]).__call__  # a layer by itself
    kwargs = {name: copies.of(arg, ()) for name, arg in kwargs.items()}
    try:
        return copies.restored(called(*args, **kwargs))
    finally:
        copies.write_back()


_FRAMEWORK = Framework(_see, _LAYERS, nnx.eval_shape, whole=(nnx.Pytree, nnx.Variable))
propagated = _FRAMEWORK.propagated
feedback_alignment = _FRAMEWORK.feedback_alignment
direct_feedback_alignment = _FRAMEWORK.direct_feedback_alignment


# Spiking neural units.

_GLOROT = nnx.initializers.glorot_uniform()
_THRESHOLD = nnx.initializers.constant(-1.0)


class SNU(nnx.RNNCellBase):
    r"""Spiking neural unit: a leaky integrator that is reset by its own spike.

    .. math::
      s_t = g(x_t W + y_{t-1} H + d \, s_{t-1} (1 - y_{t-1})), \qquad y_t = h(s_t + b)

    To be driven by ``nnx.RNN``; otherwise as ``grapes_optax.linen.SNU``, with the same
    parameters at the same paths.

    Args:
      in_features: number of inputs.
      hidden_features: number of units.
      rngs: draws the parameters.
      recurrent: whether there is H.
      decay: d, what is left of the potential after a step.
      activation: g; the authors also use a leaky ReLU.
      output: h; ``None`` is the step :func:`grapes_optax.spiking.spike`.
      kernel_init: of W.
      recurrent_kernel_init: of H.
      bias_init: of b.
      dtype: type of the computation; ``None`` infers it from inputs and parameters.
      param_dtype: type of the parameters.

    Returns:
      A cell: ``((s, y), x) -> ((s, y), y)`` with x of shape (..., inputs) and s and y of
      shape (..., units).

    Raises:
      ValueError: if there are no units.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from grapes_optax.nnx import SNU
      >>> layer = nnx.RNN(SNU(4, 8, rngs=nnx.Rngs(0)))
      >>> layer(jnp.ones((2, 20, 4))).mean(axis=1).shape  # rates, over 20 steps
      (2, 8)

    References:
      Woźniak et al., `Deep learning incorporating biologically inspired neural dynamics and
      in-memory computing <https://doi.org/10.1038/s42256-020-0187-0>`_, 2020
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        rngs: nnx.Rngs,
        recurrent: bool = True,
        decay: float = 0.8,
        activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
        output: Callable[[jax.Array], jax.Array] | None = None,
        kernel_init: nnx.Initializer = _GLOROT,
        recurrent_kernel_init: nnx.Initializer = _GLOROT,
        bias_init: nnx.Initializer = _THRESHOLD,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
    ) -> None:
        check_units(hidden_features, decay)
        types = {"use_bias": False, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        units = hidden_features
        self.i = nnx.Linear(in_features, units, kernel_init=kernel_init, **types)
        carry = functools.partial(nnx.Linear, units, kernel_init=recurrent_kernel_init, **types)
        self.h = carry(units) if recurrent else None
        self.bias = nnx.Param(bias_init(rngs.params(), (units,), param_dtype))
        self.decay, self.activation, self.output = decay, activation, output or self.default_output
        self.hidden_features, self.carry_dtype = hidden_features, dtype or param_dtype

    @staticmethod
    def default_output(z: jax.Array) -> jax.Array:
        """The step."""
        return spike(z)

    def __call__(self, carry: Carry, inputs: jax.Array) -> tuple[Carry, jax.Array]:
        """One step of time."""
        z = self.i(inputs) if self.h is None else self.i(inputs) + self.h(carry[1])
        return step(carry, z, self.bias[...], self.decay, self.activation, self.output)

    def initialize_carry(
        self, input_shape: tuple[int, ...], rngs: Any = None, carry_init: Any = None
    ) -> Carry:
        """At rest: no potential, and no spike before."""
        del rngs, carry_init
        rest = jnp.zeros((*input_shape[:-1], self.hidden_features), self.carry_dtype)
        return rest, rest

    @property
    def num_feature_axes(self) -> int:
        """Of the inputs of one step."""
        return 1


class SoftSNU(SNU):
    r"""Soft spiking neural unit: an :class:`SNU` whose output is a sigmoid, and its reset partial.

    .. math::
      s_t = g(x_t W + y_{t-1} H + d \, s_{t-1} (1 - y_{t-1})), \qquad y_t = \sigma(s_t + b)

    Args:
      in_features: number of inputs.
      hidden_features: number of units; the other arguments are those of :class:`SNU`.

    Returns:
      A cell, as :class:`SNU`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from grapes_optax.nnx import SoftSNU
      >>> layer = nnx.RNN(SoftSNU(4, 8, recurrent=False, rngs=nnx.Rngs(0)))
      >>> layer(jnp.ones((2, 20, 4))).shape
      (2, 20, 8)

    References:
      Woźniak et al., `Deep learning incorporating biologically inspired neural dynamics and
      in-memory computing <https://doi.org/10.1038/s42256-020-0187-0>`_, 2020
    """

    @staticmethod
    def default_output(z: jax.Array) -> jax.Array:
        """The sigmoid."""
        return jax.nn.sigmoid(z)
