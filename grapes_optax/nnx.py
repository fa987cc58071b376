"""Flax nnx: a model whose layers exchange their class for one with another backward pass."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import jax
from flax import nnx

from grapes_optax._backward import (
    HE_UNIFORM,
    Feedback,
    Initializer,
    Modulation,
    call_layer,
    draw_feedback,
    modulation,
)
from grapes_optax._conventions import BIASES
from grapes_optax._feedback import Taps, check_feedback, check_logits, check_reach, check_rule
from grapes_optax._importance import (
    Axes,
    Control,
    DimensionNumbers,
    Normalization,
    Options,
    fan_in_axes,
)
from grapes_optax._names import cells_of
from grapes_optax._tree import Path, path_string

Where = Callable[[str], bool] | None
_Model = TypeVar("_Model", bound=nnx.Module)


class FeedbackWeights(nnx.Variable):
    """Feedback weights of a layer: a type of their own, that no optimizer of Param touches.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from grapes_optax.nnx import FeedbackWeights
      >>> issubclass(FeedbackWeights, nnx.Param)
      False
    """


# Modules that multiply one input by one kernel, and how that kernel is laid out.


def _linear_general(layer: Any, ndim: int) -> DimensionNumbers:
    batch, nodes = len(layer.batch_axis), len(layer.out_features)
    return DimensionNumbers(tuple(range(batch, ndim - nodes)), tuple(range(ndim - nodes, ndim)))


def _conv_transpose(layer: Any, ndim: int) -> DimensionNumbers:
    output = ndim - (2 if layer.transpose_kernel else 1)
    return DimensionNumbers(tuple(axis for axis in range(ndim) if axis != output), output)


LAYERS: dict[type, Callable[[Any, int], DimensionNumbers] | None] = {
    nnx.Linear: None,  # nodes last, all others fan-in
    nnx.LinearGeneral: _linear_general,
    nnx.Conv: None,
    nnx.ConvTranspose: _conv_transpose,
}


def _is_layer(module: Any) -> bool:
    return isinstance(module, tuple(LAYERS))


def _axes(layer: Any) -> Axes:
    numbers = next(LAYERS[cls] for cls in type(layer).__mro__ if cls in LAYERS)
    return fan_in_axes(layer.kernel, numbers and numbers(layer, layer.kernel.ndim))


# What a layer does, as a hashable part of its class: a new class only where rules change,
# so that a jitted step is traced once.


class _Rules(NamedTuple):
    path: Path
    options: Options | None = None
    pair: tuple[str, ...] = ()  # submodules of a cell summed into this pre-activation
    gates: int = 1
    own: bool = False
    aligned: str | None = None
    direct: bool = False


class _Seen(NamedTuple):
    shape: tuple[int, ...]
    reached: bool


_CELL: ContextVar[Any] = ContextVar("_CELL", default=None)
_TAPS: ContextVar[Taps | None] = ContextVar("_TAPS", default=None)
_RECORD: ContextVar[dict[Path, _Seen] | None] = ContextVar("_RECORD", default=None)
_IMPORTANCE: ContextVar[Any] = ContextVar("_IMPORTANCE", default=None)


@contextlib.contextmanager
def _set(variable: ContextVar, value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


@functools.cache
def _subclass(base: Any, call: Callable, rules: _Rules | None) -> type:
    body = {"__call__": call, "grapes_rules": rules, "grapes_base": base}
    return type(base)(base.__name__, (base,), body | {"__module__": base.__module__})


def _exchange(module: Any, call: Callable, rules: _Rules | None = None) -> None:
    base = getattr(type(module), "grapes_base", type(module))
    module.__class__ = _subclass(base, call, rules)


def _call_layer(self: Any, inputs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
    rules, base = self.grapes_rules, self.grapes_base
    params = {"kernel": self.kernel[...]}
    if self.bias is not None:
        params["bias"] = self.bias[...]

    def op(layer_params: Any, x: jax.Array) -> jax.Array:
        layer = self
        if layer_params is not params:
            layer = nnx.merge(*nnx.split(self))
            for name, leaf in layer_params.items():
                setattr(layer, name, nnx.Param(leaf))
        return base.__call__(layer, x, *args, **kwargs)

    record, taps = _RECORD.get(), _TAPS.get()
    if record is not None and taps is not None:
        record.setdefault(rules.path, _Seen(inputs.shape, taps.reach_here()))
    elif rules.direct and taps is not None:
        inputs = taps.cut(path_string(rules.path), inputs, _weights(self))
    return call_layer(op, params, inputs, _modulation(self, rules), _feedback(self, rules))


def _modulation(layer: Any, rules: _Rules) -> Modulation | None:
    if rules.options is None:
        return None
    source, cell = _IMPORTANCE.get(), _CELL.get()
    if source is not None:
        *outer, _ = rules.path
        paths = [(*outer[:-1], name) for name in rules.pair] or [outer]
        kernels = [functools.reduce(_item, (*path, "kernel"), source) for path in paths]
    else:
        layers = [getattr(cell, name) for name in rules.pair] or [layer]
        kernels = [one.kernel[...] for one in layers]
    axes = _axes(layer)._replace(gates=rules.gates)
    return modulation(kernels, axes, rules.own, rules.options)


def _item(tree: Any, name: str) -> Any:
    child = next(value for key, value in tree.items() if str(key) == name)
    return child[...] if isinstance(child, nnx.Variable) else child


def _weights(layer: Any) -> jax.Array | None:
    feedback = getattr(layer, "feedback", None)
    return None if feedback is None else feedback[...]


def _feedback(layer: Any, rules: _Rules) -> Feedback | None:
    if rules.aligned is None:
        return None
    weights = check_feedback(path_string(rules.path), _weights(layer), layer.kernel.shape)
    key = layer.feedback_rngs() if rules.aligned == "random_sign" else None
    return Feedback(weights, rules.aligned, key)


def _call_cell(self: Any, *args: Any, **kwargs: Any) -> Any:
    with _set(_CELL, self):
        return self.grapes_base.__call__(self, *args, **kwargs)


def _call_model(self: Any, *args: Any, **kwargs: Any) -> Any:
    taps = Taps()
    with _set(_TAPS, taps):
        logits = self.grapes_base.__call__(self, *args, **kwargs)
    return taps.tap(logits)


# The public rules.


def _kernels(model: nnx.Module) -> Iterator[tuple[Path, Any]]:
    """Path of every leaf that bears the name of a kernel, and the module that holds it."""
    for path, module in nnx.iter_modules(model):
        for name in BIASES:
            leaf = getattr(module, name, None)
            if isinstance(leaf, nnx.Param) and leaf.ndim >= 2:
                yield (*map(str, path), name), module


def _layers(model: nnx.Module) -> Iterator[tuple[Path, Any]]:
    return ((path, module) for path, module in _kernels(model) if _is_layer(module))


def _select(model: nnx.Module, where: Where) -> dict[Path, Any]:
    """Layers to change, by the path of their kernel."""
    selected = {p: module for p, module in _kernels(model) if not where or where(path_string(p))}
    by_hand = [path_string(path) for path, module in selected.items() if not _is_layer(module)]
    if by_hand:
        raise ValueError(
            f"{', '.join(by_hand)}: the module multiplies by hand, where it cannot be reached."
            " Exclude it with `where`, or use a layer of flax.nnx."
        )
    if not selected:
        raise ValueError(
            "No layer was reached: the model has no Linear, LinearGeneral, Conv or ConvTranspose"
            " that `where` selects."
        )
    for path, layer in selected.items():
        if isinstance(getattr(layer, "feedback", None), nnx.Param):
            raise ValueError(
                f"The feedback weights of {path_string(path)} are a Param, which the optimizer"
                " would train: make them FeedbackWeights."
            )
    return selected


def _change(layer: Any, path: Path, **changes: Any) -> None:
    rules = getattr(type(layer), "grapes_rules", _Rules(path))
    _exchange(layer, _call_layer, rules._replace(path=path, **changes))


def propagated(
    model: _Model,
    where: Where = None,
    *,
    through_time: bool = False,
    gain: float = 2.0,
    bounds: tuple[float, float] | None = (1.0, 2.0),
    normalization: Normalization = "max",
    control: Control | None = None,
) -> _Model:
    r"""Gives the layers of an nnx model propagated GRAPES in their backward pass.

    .. math::
      \delta_j \leftarrow f_j \, \delta_j

    at the pre-activation of every Linear, LinearGeneral, Conv and ConvTranspose, those
    inside attention and recurrent cells included: see :func:`grapes_optax.modulate_error`
    and, for recurrent cells, ``grapes_optax.linen.propagated``. Variables, values and
    checkpoints of the model do not change.

    Use it *instead of* :func:`grapes_optax.scale_by_grapes` for the same layers: with both
    the factor acts twice, which raises an error when ``nnx.Optimizer`` is made.

    Args:
      model: the model; it is changed in place.
      where: predicate on the path of a kernel, ``"layers/0/kernel"`` for instance; the
        output layer should be excluded. ``None`` selects all.
      through_time: whether factors travel through the carry of recurrent cells, and
        compound with every step: ``grapes_optax.linen.propagated`` has the numbers.
      gain: as in :func:`grapes_optax.importance_factor`, like the other options.
      bounds: as in :func:`grapes_optax.importance_factor`.
      normalization: as in :func:`grapes_optax.importance_factor`.
      control: as in :func:`grapes_optax.importance_factor`.

    Returns:
      The model.

    Raises:
      ValueError: for an unknown option, or if `where` selects no layer, or one that cannot
        be reached (Einsum).

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from grapes_optax.nnx import propagated
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=rngs), nnx.relu, nnx.Linear(8, 3, rngs=rngs))
      >>> model = propagated(model, where=lambda path: path != "layers/2/kernel")
      >>> grads = nnx.grad(lambda model: model(jnp.ones((5, 4))).sum())(model)

    References:
      Dellaferrera et al., `Introducing principles of synaptic integration in the
      optimization of deep neural networks
      <https://doi.org/10.1038/s41467-022-29491-2>`_, 2022
    """
    options = Options(gain, bounds, normalization, control).checked()
    cells = cells_of({path: layer.kernel.shape for path, layer in _layers(model)})
    holders = {
        tuple(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, nnx.RNNCellBase)
    }
    for path, layer in _select(model, where).items():
        cell, holder = cells.get(path), holders.get(path[:-2])
        gates = cell and holder and cell.gates(_axes(layer))
        summed = cell.paths if cell and gates else ()
        if summed:
            _exchange(holder, _call_cell)
        own = path in summed[1:] and not through_time
        pair = tuple(names[-2] for names in summed)
        _change(layer, path, options=options, pair=pair, gates=gates or 1, own=own)
        layer.kernel.set_metadata(grapes_propagated=True)
    return model


@contextlib.contextmanager
def importance_from(state: Any) -> Iterator[None]:
    """Context in which propagated GRAPES reads importance from other weights than the model's.

    The authors read it, for feedback alignment under Nesterov's momentum, at the weights,
    and take the gradient at the look-ahead weights.

    Args:
      state: parameters with the structure of ``nnx.state(model, nnx.Param)``.

    Yields:
      Nothing.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from grapes_optax.nnx import importance_from, propagated
      >>> model = propagated(nnx.Linear(4, 8, rngs=nnx.Rngs(0)))
      >>> with importance_from(nnx.state(model, nnx.Param)):
      ...     grads = nnx.grad(lambda model: model(jnp.ones((5, 4))).sum())(model)
    """
    with _set(_IMPORTANCE, state):
        yield


def feedback_alignment(
    model: _Model,
    rngs: nnx.Rngs,
    where: Where = None,
    *,
    rule: str = "fixed",
    initializer: Initializer = HE_UNIFORM,
) -> _Model:
    r"""Makes the layers of an nnx model carry errors back by feedback weights.

    The rules are those of ``grapes_optax.linen.feedback_alignment``. Every layer gets a
    variable ``feedback`` of type :class:`FeedbackWeights`. For GRAPES on top, call
    :func:`propagated` as well.

    Args:
      model: the model; it is changed in place.
      rngs: its stream ``feedback`` (or ``default``) draws the weights, and with the rule
        ``"random_sign"`` stays in the layers to draw anew in every batch.
      where: predicate on the path of a kernel; ``None`` selects all.
      rule: ``"fixed"``, ``"uniform_sign"``, ``"fixed_sign"``, ``"random_sign"`` or
        ``"kolen_pollack"``.
      initializer: of matrices (fan-in, nodes); ``jax.nn.initializers.variance_scaling`` sets
        the scale too.

    Returns:
      The model.

    Raises:
      ValueError: for an unknown rule, or as :func:`propagated`; when the model is called, if
        feedback weights are missing or of the wrong shape.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from grapes_optax.nnx import feedback_alignment
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=rngs), nnx.relu, nnx.Linear(8, 3, rngs=rngs))
      >>> model = feedback_alignment(model, nnx.Rngs(1))
      >>> grads = nnx.grad(lambda model: model(jnp.ones((5, 4))).sum())(model)
      >>> "feedback" in grads["layers"][2]  # not a Param: no gradient, no optimizer
      False

    References:
      Lillicrap et al., `Random synaptic feedback weights support error backpropagation for
      deep learning <https://doi.org/10.1038/ncomms13276>`_, 2016
    """
    key = rngs.feedback()
    check_rule(rule, key if rule == "random_sign" else None)
    for number, (path, layer) in enumerate(_select(model, where).items()):
        shape, keyed = layer.kernel.shape, jax.random.fold_in(key, number)
        weights = draw_feedback(initializer, keyed, shape, _axes(layer), layer.kernel.dtype)
        layer.feedback = FeedbackWeights(weights)
        if rule == "random_sign":
            layer.feedback_rngs = rngs.feedback.fork()
        _change(layer, path, aligned=rule)
    return model


def direct_feedback_alignment(
    model: _Model,
    rngs: nnx.Rngs,
    *inputs: Any,
    where: Where = None,
    initializer: Initializer = HE_UNIFORM,
) -> _Model:
    r"""Hands the error at the logits of an nnx model to every layer directly.

    As ``grapes_optax.linen.direct_feedback_alignment``. Every layer but the first gets a
    variable ``feedback`` of type :class:`FeedbackWeights`.

    Args:
      model: the model, which must return the logits; it is changed in place.
      rngs: its stream ``feedback`` (or ``default``) draws the weights.
      *inputs: inputs of the model; only their shapes are used.
      where: predicate on the path of a kernel; ``None`` selects all.
      initializer: of matrices (size of the layer's input, logits).

    Returns:
      The model.

    Raises:
      ValueError: as :func:`feedback_alignment`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from grapes_optax.nnx import direct_feedback_alignment
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=rngs), nnx.relu, nnx.Linear(8, 3, rngs=rngs))
      >>> model = direct_feedback_alignment(model, nnx.Rngs(1), jnp.ones((5, 4)))
      >>> hasattr(model.layers[0], "feedback"), model.layers[2].feedback.shape
      (False, (8, 3))

    References:
      Nøkland, `Direct feedback alignment provides learning in deep neural networks
      <https://arxiv.org/abs/1609.01596>`_, 2016
    """
    selected, seen = _select(model, where), {}
    for path, layer in _layers(model):
        _change(layer, path)
    graph, state = nnx.split(model)

    def record(state, *x):
        with _set(_RECORD, seen), _set(_TAPS, Taps()):
            return nnx.merge(graph, state)(*x)

    *batch, classes = check_logits(jax.eval_shape(record, state, *inputs)).shape
    _, *later = seen  # nothing before the first layer learns
    key = rngs.feedback()
    for number, path in enumerate(later):
        if path not in selected:
            continue
        check_reach(path_string(path), seen[path].reached)
        layer, keyed = selected[path], jax.random.fold_in(key, number)
        shape = (math.prod(seen[path].shape[len(batch) :]), classes)
        weights = draw_feedback(initializer, keyed, shape, Axes((0,), (1,), ()), layer.kernel.dtype)
        layer.feedback = FeedbackWeights(weights)
        _change(layer, path, direct=True)
    _exchange(model, _call_model)
    return model
