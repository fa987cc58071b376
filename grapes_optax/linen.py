"""Flax linen: an unchanged model, with another backward pass under a context manager."""

import contextlib
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from flax import traverse_util

from grapes_optax._backward import (
    HE_UNIFORM,
    Feedback,
    Initializer,
    Modulation,
    call_layer,
    draw_feedback,
    modulation,
)
from grapes_optax._feedback import Taps, check_feedback, check_logits, check_reach, check_rule
from grapes_optax._importance import (
    Axes,
    Control,
    DimensionNumbers,
    Normalization,
    Options,
    fan_in_axes,
)
from grapes_optax._modulation import propagated_paths
from grapes_optax._names import cells_of, kernel_paths
from grapes_optax._tree import Path, path_string

Where = Callable[[str], bool] | None


# Modules that multiply one input by one kernel, and how that kernel is laid out.


def _dense_general(module: Any, ndim: int) -> DimensionNumbers:
    batch = len(module.batch_dims)
    nodes = 1 if isinstance(module.features, int) else len(module.features)
    return DimensionNumbers(tuple(range(batch, ndim - nodes)), tuple(range(ndim - nodes, ndim)))


def _all_but(output: int) -> Callable[[Any, int], DimensionNumbers]:
    def numbers(module, ndim):
        del module
        rest = tuple(axis for axis in range(ndim) if axis != ndim + output)
        return DimensionNumbers(rest, output)

    return numbers


LAYERS: dict[type[nn.Module], Callable[[Any, int], DimensionNumbers]] = {
    nn.Dense: _all_but(-1),
    nn.DenseGeneral: _dense_general,
    nn.Conv: _all_but(-1),
    nn.ConvLocal: lambda module, ndim: DimensionNumbers(-2, -1),
    nn.ConvTranspose: lambda module, ndim: _all_but(-2 if module.transpose_kernel else -1)(
        module, ndim
    ),
}


# The rules that are active, and what has been seen of the model that is being called.


class _Propagated(NamedTuple):
    where: Where
    through_time: bool
    importance: Any
    options: Options


class _Aligned(NamedTuple):
    where: Where
    feedback: Any
    rule: str
    key: Any


class _Direct(NamedTuple):
    where: Where
    feedback: Any


class _Seen(NamedTuple):
    kernel: Any
    axes: Axes
    input: Any
    is_first: bool


class _Recorder(NamedTuple):
    where: Where
    direct: bool
    layers: dict[Path, _Seen]


_RULES: ContextVar[tuple[Any, ...]] = ContextVar("_RULES", default=())
_CALL: ContextVar["_Call | None"] = ContextVar("_CALL", default=None)
# Part of the key of every cache of `jax.jit`: nothing traced under other rules is used.
_JIT_KEY = jax.make_user_context(default_value=())


class _Call:
    """One call of a whole model."""

    def __init__(self) -> None:
        self.called: set[Path] = set()
        self.reached: list[Path] = []
        self.taps = Taps()


def _selects(rule: Any, path: Path) -> bool:
    return rule.where is None or bool(rule.where(path_string(path)))


def _rule_for(kind: type, path: Path) -> Any:
    """The innermost rule of this kind whose `where` holds for the kernel at `path`."""
    rules = reversed(_RULES.get())
    return next((rule for rule in rules if isinstance(rule, kind) and _selects(rule, path)), None)


@contextlib.contextmanager
def _active(rule: Any, *jit_key: Any) -> Iterator[None]:
    try:
        hash(jit_key)
    except TypeError:
        jit_key = (object(),)
    with contextlib.ExitStack() as stack:
        if not _RULES.get():
            stack.enter_context(nn.intercept_methods(_intercept))
        stack.enter_context(_JIT_KEY((*_JIT_KEY.value, type(rule), jit_key)))
        stack.callback(_RULES.reset, _RULES.set((*_RULES.get(), rule)))
        yield


def _params(module: Any) -> dict[str, Any]:
    return nn.meta.unbox(dict(module.variables.get("params", {})))


# Between the model and its layers.


def _intercept(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    module: Any = context.module
    call = _CALL.get()
    if module.is_initializing() or not _RULES.get():
        return next_fun(*args, **kwargs)
    if call is None:
        call = _Call()
        token = _CALL.set(call)
        try:
            out = _intercept(next_fun, args, kwargs, context)
        finally:
            _CALL.reset(token)
        # The setup of a module passes here too; that of `nn.jit` shows it no parameters.
        setup = context.method_name == "setup" or not _params(module)
        return out if setup else _finish(call, module, out)
    call.called.add(module.path)
    numbers = next((LAYERS[cls] for cls in type(module).__mro__ if cls in LAYERS), None)
    if numbers is None or context.method_name != "__call__":
        return next_fun(*args, **kwargs)
    (x, *rest), params = args or tuple(kwargs.values()), _params(module)

    def op(layer_params: Any, inputs: Any) -> Any:
        if layer_params is params:
            return next_fun(inputs, *rest)
        # The module with other weights, for no interceptor to see.
        token = _RULES.set(())
        try:
            return module.clone(parent=None, name=None).apply({"params": layer_params}, inputs)
        finally:
            _RULES.reset(token)

    kernel = params["kernel"]
    axes = fan_in_axes(kernel, numbers(module, kernel.ndim))
    path = (*module.path, "kernel")
    call.reached.append(path)
    direct, recorder = _rule_for(_Direct, path), _rule_for(_Recorder, path)
    if recorder is not None:
        check_reach(path_string(path), not recorder.direct or call.taps.reach_here())
        recorder.layers[path] = _Seen(kernel, axes, x, path == call.reached[0])
    if direct is not None and path != call.reached[0]:  # nothing before the first layer learns
        x = call.taps.cut(path_string(path), x, _at(direct.feedback, path))
    modulated = _modulation(module, path, kernel, axes)
    return call_layer(op, params, x, modulated, _feedback(call, path, kernel))


def _at(tree: Any, path: Path) -> Any:
    for name in path:
        tree = tree.get(name) if hasattr(tree, "get") else None
    return nn.meta.unbox(tree)


def _modulation(module: Any, path: Path, kernel: jax.Array, axes: Axes) -> Modulation | None:
    rule = _rule_for(_Propagated, path)
    if rule is None:
        return None
    own, outer = path[-2:], path[:-2]
    parent = _params(module.parent) if isinstance(module.parent, nn.RNNCellBase) else {}
    shapes = {inner: _at(parent, inner).shape for inner in kernel_paths(parent)}
    cell = cells_of(shapes).get(own)
    gates = cell and cell.gates(axes)
    summed = cell.paths if cell and gates else (own,)
    kernels = [kernel]
    if rule.importance is not None:
        source = rule.importance.get("params", rule.importance)
        kernels = [_at(source, (*outer, *inner)) for inner in summed]
        if any(other is None for other in kernels):
            raise ValueError(f"`importance` lacks {path_string(path)} or what is summed with it.")
    elif len(summed) > 1:
        kernels = [_at(parent, inner) for inner in summed]
    carry = own in summed[1:]
    axes = axes._replace(gates=gates or 1)
    return modulation(kernels, axes, carry and not rule.through_time, rule.options)


def _feedback(call: _Call, path: Path, kernel: jax.Array) -> Feedback | None:
    rule = _rule_for(_Aligned, path)
    if rule is None:
        return None
    weights = check_feedback(path_string(path), _at(rule.feedback, path), kernel.shape)
    key = rule.key
    if key is not None:
        key = jax.random.fold_in(key, call.reached.index(path))
    return Feedback(weights, rule.rule, key)


def _finish(call: _Call, module: Any, out: Any) -> Any:
    """Checks that every rule has reached its layers, and taps the logits."""
    params = _params(module)
    kernels = [(*module.path, *path) for path in kernel_paths(params)]
    if any(isinstance(rule, _Aligned | _Direct) for rule in _RULES.get()) and "feedback" in params:
        raise ValueError(
            "There are feedback weights among the parameters, where the optimizer would train"
            " them: keep them in a collection of their own beside 'params'."
        )
    for rule in _RULES.get():
        selected = [path for path in kernels if _selects(rule, path)]
        missed = [p for p in selected if p[:-1] in call.called and p not in call.reached]
        if missed:
            raise ValueError(
                f"{', '.join(map(path_string, missed))}: the module multiplies by hand, where it"
                " cannot be reached. Exclude it with `where`, or use a layer of flax.linen (for"
                " OptimizedLSTMCell, LSTMCell)."
            )
        if not any(path in call.reached for path in selected):
            raise ValueError(
                "No layer was reached: the model calls no Dense, DenseGeneral, Conv, ConvLocal or"
                " ConvTranspose that `where` selects."
            )
    return call.taps.tap(out) if call.taps.inputs else out


# The public rules.


def propagated(
    where: Where = None,
    *,
    through_time: bool = False,
    importance: Any = None,
    gain: jax.typing.ArrayLike = 2.0,
    bounds: tuple[float, float] | None = (1.0, 2.0),
    normalization: Normalization = "max",
    control: Control | None = None,
) -> contextlib.AbstractContextManager[None]:
    r"""Context in which linen models have propagated GRAPES in their backward pass.

    .. math::
      \delta_j \leftarrow f_j \, \delta_j

    at the pre-activation of every Dense, DenseGeneral, Conv, ConvLocal and ConvTranspose,
    those inside attention and recurrent cells included: see
    :func:`grapes_optax.modulate_error`. The values of the model do not change. The
    kernels of a recurrent cell that are summed into one pre-activation share their
    importance; the kernel that reads the carry gets its factor on its own gradient only,
    so that factors do not compound through time.

    Enter it inside the training step, or around it: what was traced under other rules is
    traced anew. Use it *instead of* :func:`grapes_optax.scale_by_grapes` for the same
    layers: with both the factor acts twice, which raises an error within the context.

    Args:
      where: predicate on the path of a kernel, ``"Dense_0/kernel"`` for instance; the
        output layer should be excluded. ``None`` selects all.
      through_time: whether factors travel through the carry of recurrent cells, and
        compound with every step: at initialisation the gradient of a vanilla cell is then
        3.3 times the plain one after 5 steps, 50 times after 20 and 83,000 times after 50,
        against 1.76 throughout without, and a recurrent spiking network on digits ends at
        84 % instead of 95. Gates and sigmoids damp it (``docs/spiking.md`` has all numbers).
      importance: parameters from which the importance is read, if not those of the model
        (the authors read it, for feedback alignment under Nesterov's momentum, at the
        weights, and take the gradient at the look-ahead weights).
      gain: as in :func:`grapes_optax.importance_factor`, like the other options.
      bounds: as in :func:`grapes_optax.importance_factor`.
      normalization: as in :func:`grapes_optax.importance_factor`.
      control: as in :func:`grapes_optax.importance_factor`.

    Returns:
      A context manager.

    Raises:
      ValueError: for an unknown option; when a model is called, if `where` selects none of
        its layers, or one that cannot be reached (OptimizedLSTMCell multiplies by hand).

    Examples:
      >>> import flax.linen as nn
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from grapes_optax.linen import propagated
      >>> model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(3)])
      >>> params = model.init(jax.random.key(0), jnp.ones((1, 4)))
      >>> loss = lambda params: model.apply(params, jnp.ones((5, 4))).sum()
      >>> with propagated(where=lambda path: "layers_2" not in path):  # not the output
      ...     modulated = jax.grad(loss)(params)
      >>> bool(optax.tree.norm(modulated) > optax.tree.norm(jax.grad(loss)(params)))
      True

    References:
      Dellaferrera et al., `Introducing principles of synaptic integration in the
      optimization of deep neural networks
      <https://doi.org/10.1038/s41467-022-29491-2>`_, 2022
    """
    options = Options(gain, bounds, normalization, control).checked()
    rule = _Propagated(where, through_time, importance, options)

    @contextlib.contextmanager
    def context():
        key = (where, through_time, options, object() if importance is not None else None)
        with _active(rule, *key), propagated_paths(lambda path: _selects(rule, (path,))):
            yield

    return context()


def feedback_alignment(
    feedback: Any, where: Where = None, *, rule: str = "fixed", key: jax.Array | None = None
) -> contextlib.AbstractContextManager[None]:
    r"""Context in which linen models carry errors back by feedback weights.

    .. math::
      \delta_{l} = (B_{l+1} \, \delta_{l+1}) \odot \phi'(z_l)

    with a fixed random B (feedback alignment) or one made of it and the forward weights:

    ===================  =====================================================
    ``"fixed"``          B
    ``"uniform_sign"``   sign(W) times the root mean square of B
    ``"fixed_sign"``     sign(W) times the magnitudes of B
    ``"random_sign"``    sign(W) times magnitudes drawn uniformly in every batch, with
                         the root mean square of B
    ``"kolen_pollack"``  B, which receives the gradient of W
    ===================  =====================================================

    Under Kolen-Pollack differentiate with respect to the feedback weights too, and
    update both with the same optimizer and weight decay: they then align. The forward
    kernel is not kept for the backward pass, except for its signs.

    Works on Dense, DenseGeneral, Conv, ConvLocal and ConvTranspose, also inside attention,
    recurrent cells and ``nn.RNN``. The slices of a scanned stack of layers share their
    feedback weights (which under Kolen-Pollack can align with none of them). For GRAPES on
    top, enter :func:`propagated` as well.

    Args:
      feedback: feedback weights, from :func:`init_feedback`. Keep them in a collection of
        their own, never in ``params``: no optimizer and no weight decay is to touch them.
      where: predicate on the path of a kernel; ``None`` selects all.
      rule: one of the table.
      key: for ``"random_sign"`` a new key in every step.

    Returns:
      A context manager.

    Raises:
      ValueError: for an unknown rule; when a model is called, if feedback weights are
        missing, of the wrong shape or among the parameters, or as :func:`propagated`.

    Examples:
      >>> import flax.linen as nn
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from grapes_optax.linen import feedback_alignment, init_feedback
      >>> model, x = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(3)]), jnp.ones((5, 4))
      >>> variables = model.init(jax.random.key(0), x)
      >>> feedback = init_feedback(jax.random.key(1), model, variables, x)
      >>> with feedback_alignment(feedback):
      ...     grads = jax.grad(lambda v: model.apply(v, x).sum())(variables)

    References:
      Lillicrap et al., `Random synaptic feedback weights support error backpropagation for
      deep learning <https://doi.org/10.1038/ncomms13276>`_, 2016

      Liao et al., `How important is weight symmetry in backpropagation?
      <https://arxiv.org/abs/1510.05067>`_, 2016

      Akrout et al., `Deep learning without weight transport
      <https://arxiv.org/abs/1904.05391>`_, 2019
    """
    check_rule(rule, key)
    return _active(_Aligned(where, feedback, rule, key), object())


def direct_feedback_alignment(
    feedback: Any, where: Where = None
) -> contextlib.AbstractContextManager[None]:
    r"""Context in which linen models hand the error at the logits to every layer directly.

    .. math::
      \partial L / \partial x_l = B_l \, e, \qquad e = \partial L / \partial \mathrm{logits}

    for the input x of every layer but the first; the gradient between layers is stopped.
    Activations, pooling and dropout between a layer and the next are differentiated as
    usual. The model must return the logits, one array with the classes on its last axis.
    With this rule local and propagated GRAPES are the same: use
    :func:`grapes_optax.scale_by_grapes`.

    Args:
      feedback: feedback weights, from :func:`init_feedback` with ``direct=True``.
      where: predicate on the path of a kernel; ``None`` selects all.

    Returns:
      A context manager.

    Raises:
      ValueError: when a model is called, as :func:`feedback_alignment`, or if a layer lies
        inside ``nn.scan``, ``nn.RNN`` or ``nn.remat``, whose inside no tap can reach.

    Examples:
      >>> import flax.linen as nn
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from grapes_optax.linen import direct_feedback_alignment, init_feedback
      >>> model, x = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(3)]), jnp.ones((5, 4))
      >>> variables = model.init(jax.random.key(0), x)
      >>> feedback = init_feedback(jax.random.key(1), model, variables, x, direct=True)
      >>> with direct_feedback_alignment(feedback):
      ...     grads = jax.grad(lambda v: model.apply(v, x).sum())(variables)

    References:
      Nøkland, `Direct feedback alignment provides learning in deep neural networks
      <https://arxiv.org/abs/1609.01596>`_, 2016
    """
    return _active(_Direct(where, feedback), object())


def init_feedback(
    key: jax.Array,
    model: nn.Module,
    variables: Any,
    *inputs: Any,
    where: Where = None,
    direct: bool = False,
    initializer: Initializer = HE_UNIFORM,
    **kwargs: Any,
) -> dict[str, Any]:
    """Draws the feedback weights of a linen model.

    Args:
      key: a key of ``jax.random``.
      model: the model.
      variables: its variables.
      *inputs: inputs of the model; only their shapes are used.
      where: predicate on the path of a kernel; ``None`` selects all layers.
      direct: whether for :func:`direct_feedback_alignment`: from the logits to the input of
        every layer but the first, instead of in the shape of every kernel.
      initializer: of matrices (fan-in of the layer, nodes or logits);
        ``jax.nn.initializers.variance_scaling`` sets the scale too.
      **kwargs: keyword arguments of ``model.apply``.

    Returns:
      A nested dict with the paths of the kernels.

    Raises:
      ValueError: as :func:`propagated` when a model is called.

    Examples:
      >>> import flax.linen as nn
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from grapes_optax.linen import init_feedback
      >>> model, x = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(3)]), jnp.ones((5, 4))
      >>> variables = model.init(jax.random.key(0), x)
      >>> shapes = lambda tree: jax.tree.map(jnp.shape, tree)
      >>> shapes(init_feedback(jax.random.key(1), model, variables, x))
      {'layers_0': {'kernel': (4, 8)}, 'layers_2': {'kernel': (8, 3)}}
      >>> shapes(init_feedback(jax.random.key(1), model, variables, x, direct=True))
      {'layers_2': {'kernel': (8, 3)}}
    """
    layers: dict[Path, _Seen] = {}
    with _active(_Recorder(where, direct, layers), object()):
        logits = jax.eval_shape(lambda v, *x: model.apply(v, *x, **kwargs), variables, *inputs)
    feedback = {}
    for number, (path, seen) in enumerate(layers.items()):
        if direct and seen.is_first:
            continue
        shape, axes = seen.kernel.shape, seen.axes
        if direct:
            *batch, classes = check_logits(logits).shape
            shape = (math.prod(seen.input.shape[len(batch) :]), classes)
            axes = Axes((0,), (1,), ())
        keyed = jax.random.fold_in(key, number)
        feedback[path] = draw_feedback(initializer, keyed, shape, axes, seen.kernel.dtype)
    return traverse_util.unflatten_dict(feedback)
