"""The learning rules as transformations of a forward function: what all frameworks share.

A transformed function makes a `Call` each time it is called, and its framework shows that
call every layer that the forward function calls (`Framework.see`). What a rule needs lives
in the call and ends with it.
"""

import contextlib
import difflib
import functools
import inspect
import itertools
import math
import re
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend.core import get_opaque_trace_state

from grapes_optax._conventions import CONVENTIONS
from grapes_optax._feedback import BACKWARD_KERNELS, add_tangents
from grapes_optax._importance import (
    Axes,
    Control,
    DimensionNumbers,
    Normalization,
    Options,
    fan_in_axes,
    here,
    is_description,
    layer_factor,
)
from grapes_optax._mesh import check_whole
from grapes_optax._modulation import align, scale_tangent
from grapes_optax._names import cells_of
from grapes_optax._tree import Path, path_string, tree_leaves

Where = Callable[[str], bool] | None
Forward = Callable[..., Any]
Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]
# The axes of the kernel of a module, or a function of the module and the rank of its kernel.
Numbers = DimensionNumbers | Callable[[Any, int], DimensionNumbers]
Layers = Mapping[type, Numbers]

HE_UNIFORM: Initializer = jax.nn.initializers.he_uniform()


def _all_but(module: Any, ndim: int, output: int) -> DimensionNumbers:
    fan_in = tuple(axis for axis in range(ndim) if axis != output % ndim)
    return DimensionNumbers(fan_in, output)


def all_but(output: int) -> Callable[[Any, int], DimensionNumbers]:
    """Nodes on one axis, fan-in on all others."""
    return functools.partial(_all_but, output=output)


# The rules.


def _items(layers: Layers | None) -> tuple[tuple[type, Numbers], ...]:
    """Classes that the user declares bilinear, and the axes of their kernels."""
    if layers is None:
        return ()
    if not isinstance(layers, Mapping) or not all(
        isinstance(cls, type) and (callable(numbers) or is_description(numbers))
        for cls, numbers in layers.items()
    ):
        raise TypeError(
            "layers must map classes to DimensionNumbers, or to functions of a module and the rank"
            f" of its kernel; got {layers!r}."
        )
    return tuple(layers.items())  # with a hash, as the rule needs it


class Rule(NamedTuple):
    """One of the three rules, with what the user says of it."""

    kind: str
    where: Where
    layers: tuple[tuple[type, Numbers], ...]
    options: Options = Options()
    through_time: bool = False
    back: str = ""  # name of the kernel that carries errors back


def _selects(rule: Rule, path: str) -> bool:
    return rule.where is None or bool(rule.where(path))


# What is a layer.

# Another way than to register a class, where there is one.
INSTEAD = {"DenseParams": "use LSTMCell, which gives the values of OptimizedLSTMCell"}


def _leaves_alone(cls: type, base: type) -> bool:
    """Whether a subclass overrides nothing that a layer does, but what makes one."""

    def acts(name: str) -> bool:
        attribute = inspect.getattr_static(base, name, None)
        return inspect.isroutine(attribute) or isinstance(attribute, property)

    fields = getattr(base, "__dataclass_fields__", {})
    own = {name for c in cls.__mro__[: cls.__mro__.index(base)] for name in vars(c)}
    hidden = {name for name in own if name.startswith("__")} - {"__call__"}
    return not any(map(acts, own - hidden - set(fields)))


def _kernel_names(cls: type, leaves: Mapping[str, Any]) -> list[str]:
    """Which leaves of a module bear the name of a kernel, and may be one."""

    def is_kernel(name: str, leaf: Any) -> bool:
        ndim = getattr(leaf, "ndim", 0)
        rows = itertools.chain(*CONVENTIONS)
        rows = (row for row in rows if row.leaf == name and row.ndim in (None, ndim))
        row = next((row for row in rows if re.search(row.module, cls.__name__)), None)
        return ndim >= 2 and row is not None and row.output is not None

    return [name for name, leaf in leaves.items() if is_kernel(name, leaf)]


class Seen(NamedTuple):
    """A layer that is called: bilinear in its kernel and its input, plus a bias."""

    path: Path  # of the kernel
    numbers: DimensionNumbers
    kernel: jax.Array
    call: Callable[..., jax.Array]  # of the arguments of the layer
    replaced: Callable[..., jax.Array]  # of a kernel and these arguments; all else is constant
    cell: Mapping[Path, jax.Array] = {}  # kernels of the recurrent cell that holds it
    carry: int = 0  # last features of the input that are the carry of a cell
    trailing: int = 0  # axes of the pre-activation behind those of the nodes
    leading: bool | None = None  # whether its stack, if there is one, leads or precedes the nodes


# One call of a transformed function. Its cells of state are those of this call alone: JAX's
# context says which call is in flight, for a transformed function that is called by another,
# and keeps what functions that are jitted within the forward function trace under the rule
# from those who call them without.
_IN_FLIGHT = jax.make_user_context(default_value=None)


class _Same:
    """An array as a key: equal to itself alone, and to nothing once it is gone."""

    def __init__(self, array: jax.Array) -> None:
        self.array, self.number = weakref.ref(array), id(array)

    def __hash__(self) -> int:
        return self.number

    def __eq__(self, other: object) -> bool:
        array = self.array()
        return isinstance(other, _Same) and array is not None and array is other.array()


class Call:
    """What one call of a transformed function needs, and what it has reached."""

    def __init__(self, rules: tuple[Rule, ...], layers: Layers, feedback: Any, draws: bool) -> None:
        self.rules = rules
        self.outer: Call | None = _IN_FLIGHT.value
        outer = self.outer.layers if self.outer else {}
        self.layers = {**layers, **outer, **{c: n for rule in rules for c, n in rule.layers}}
        given = list(tree_leaves(feedback))
        self.feedback = {path_string(leaf.path): leaf.array for leaf in given}
        if len(self.feedback) < len(given):
            paths = [path_string(leaf.path) for leaf in given]
            twice = sorted({path for path in paths if paths.count(path) > 1})
            raise ValueError(f"The feedback weights hold two arrays for {', '.join(twice)}.")
        # Shape, axes and type of what is to be drawn, or None for a layer without.
        self.drawn: dict[str, tuple[Any, Axes, Any] | None] | None = {} if draws else None
        self.trace = get_opaque_trace_state()
        self.reached: list[str] = []
        self.holders: list[Any] = []  # recurrent cells that are being called
        self.taps: list[tuple[str, jax.Array, Any]] = []
        # What is traced once and for all within the call holds its feedback weights: it may be
        # used again with the same arrays alone.
        # Without a trace around, a key of each call's own would compile every operation anew.
        self.key: Any = object()
        arrays = tuple(self.feedback.values())
        mutable = not all(isinstance(array, jax.Array) for array in arrays)
        if not mutable and not any(isinstance(a, Tracer) for a in (jnp.zeros(()), *arrays)):
            with contextlib.suppress(TypeError):
                same = tuple((path, _Same(array)) for path, array in self.feedback.items())
                key = rules, same, self.outer and self.outer.key
                self.key = hash(key) and key

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Call) and self.key == other.key

    def __deepcopy__(self, memo: Any) -> "Call":
        return self

    def in_flight(self) -> bool:
        return _IN_FLIGHT.value is self

    @staticmethod
    def aside() -> Any:
        """Context in which no call is in flight."""
        return _IN_FLIGHT(None)

    def _chain(self) -> Iterator["Call"]:
        call: Call | None = self
        while call is not None:
            yield call
            call = call.outer

    def _rule(self, kind: str, path: str) -> tuple[Any, "Call"]:
        """The rule of this kind that was applied last, and its call."""
        for call in reversed(list(self._chain())):
            for rule in call.rules:
                if rule.kind == kind and _selects(rule, path):
                    return rule, call
        return None, self

    # For the frameworks.

    def base(self, cls: type) -> type | None:
        """The class of layers to which a class belongs."""
        base = next((base for base in cls.__mro__ if base in self.layers), None)
        return base if base and _leaves_alone(cls, base) else None

    def kernel(
        self, module: Any, cls: type, path: Path, leaves: Mapping[str, Any]
    ) -> tuple[str, Any] | None:
        """Name and axes of the kernel of a layer: of a module of this class with these leaves.

        None for a module that is no layer; raises if it holds a kernel that a rule selects.
        """
        names, base = _kernel_names(cls, leaves), self.base(cls)
        if base is not None and len(names) == 1:
            numbers: Any = self.layers[base]
            ndim = leaves[names[0]].ndim
            return names[0], numbers(module, ndim) if callable(numbers) else numbers
        # Wrappers of a module, nn.WeightNorm for instance, call it without its variables first.
        rules = [rule for call in self._chain() for rule in call.rules]
        declared = any(c is base for rule in rules for c, _ in rule.layers)
        for name in names or ["kernel"] * (base is not None and bool(leaves)):
            full = path_string((*path, name))
            for rule in rules:
                if _selects(rule, full) and declared and not names:
                    raise ValueError(
                        f"{'/'.join(path) or cls.__name__}: {cls.__name__} is declared a layer and"
                        f" holds {', '.join(leaves)}: none has the name of a kernel, kernel, w or"
                        " weight. Rename it, or exclude the layer with `where`."
                    )
                if _selects(rule, full):
                    raise ValueError(_by_hand(full, cls, rule))
        return None

    def layer(self, seen: Seen, args: tuple[Any, ...], kwargs: dict[str, Any]) -> jax.Array:
        """The value of a layer, with the derivative that the rules give it."""
        path = path_string(seen.path)
        axes = fan_in_axes(seen.kernel, seen.numbers)
        x, natural, replaced = _of_input(seen, args, kwargs)

        def call(x: jax.Array) -> jax.Array:
            number = len(self.reached)
            out = natural(x)
            if len(self.reached) > number:
                inner = ", ".join(dict.fromkeys(self.reached[number:]))
                raise ValueError(
                    f"{path} belongs to a layer that holds other layers: {inner}. Declare the"
                    " inner one, or the outer one without layers in it, as layers=; or exclude one"
                    " of them with `where`."
                )
            return out

        for chained in self._chain():
            chained.reached.append(path)
        aligned, owner = self._rule("aligned", path)
        direct, tapped = self._rule("direct", path)
        if aligned and direct:
            raise ValueError(
                f"{path} is selected for feedback alignment and for direct feedback alignment:"
                " choose one of them with `where`."
            )
        back: Any = seen.kernel
        feedback: Any = None
        if aligned and owner.drawn is not None:
            owner._draw(path, seen.kernel.shape, axes, seen.kernel.dtype)
        elif aligned:
            feedback = owner.weights(path, seen.kernel.shape)
            if aligned.back == "uniform_sign":
                _check_undivided(path, seen.kernel, axes)
            back = BACKWARD_KERNELS[aligned.back](seen.kernel, feedback).astype(seen.kernel.dtype)
        if direct:
            x = tapped.cut(path, x, seen.kernel.dtype)
        features = x.shape[-1] if x.ndim else 1
        modulate, carry = self._modulation(seen, axes, path, features)
        if feedback is None and not carry:
            return modulate(call(x))
        stop, back = jax.lax.stop_gradient, jax.lax.stop_gradient(back)
        terms = [modulate(call(stop(x)))]
        if carry < features:
            terms.append(modulate(replaced(back, _halves(x, carry, stop_carry=True))))
        if carry:
            terms.append(replaced(back, _halves(x, carry, stop_carry=False)))
        if feedback is not None and aligned.back == "kolen_pollack":
            terms.append(modulate(replaced(feedback.astype(seen.kernel.dtype), stop(x))))
        return add_tangents(*terms)

    def _modulation(
        self, seen: Seen, axes: Axes, path: str, features: int
    ) -> tuple[Callable[[jax.Array], jax.Array], int]:
        """What multiplies errors at the pre-activation, and how many inputs see them as before."""
        rule, _ = self._rule("propagated", path)
        if rule is None:
            return lambda z: z, 0
        cell = cells_of({p: kernel.shape for p, kernel in seen.cell.items()}).get(seen.path)
        gates, kernels, carry = cell and cell.gates(axes), [seen.kernel], seen.carry
        if cell and gates:
            axes, kernels = axes._replace(gates=gates), [seen.cell[p] for p in cell.paths]
            carry = features * (seen.path == cell.paths[1])
        factor = here(layer_factor(kernels, [axes] * len(kernels), rule.options), axes)

        def modulate(z: jax.Array) -> jax.Array:
            positions = z.shape[z.ndim - seen.trailing :] if seen.trailing else ()
            line = factor.reshape(*factor.shape, *(1 for _ in positions))
            line = jnp.broadcast_to(line, (*factor.shape, *positions))
            return scale_tangent(z, align(line, len(axes.output) + seen.trailing, z, seen.leading))

        return modulate, 0 if rule.through_time else carry

    # Feedback weights.

    def weights(self, path: str, shape: tuple[int, ...]) -> Any:
        """The feedback weights of one layer, if they are there and of the right shape."""
        weights = self.feedback.get(path)
        if weights is None:
            raise ValueError(
                f"There are no feedback weights for {path}{_near(path, self.feedback)}: draw them"
                " with init_feedback for this very function, or exclude the layer with `where`."
            )
        if jnp.shape(weights) != shape:
            raise ValueError(
                f"The feedback weights of {path} have shape {jnp.shape(weights)}, not {shape}."
            )
        return weights

    def _draw(self, path: str, shape: tuple[int, ...], axes: Axes, dtype: Any) -> None:
        """Notes what init_feedback is to draw; layers of one path share their weights."""
        assert self.drawn is not None
        before = self.drawn.get(path)
        if before is not None and before[0] != shape:
            raise ValueError(
                f"Two layers have the path {path} and need feedback weights of different shapes,"
                f" {before[0]} and {shape}. Layers of two models are told apart where the models"
                " are handed over in one argument, a dict of them for instance; or exclude them"
                " with `where`."
            )
        self.drawn[path] = shape, axes, dtype

    def cut(self, path: str, x: jax.Array, dtype: Any) -> jax.Array:
        """Cuts the gradient at the input of a layer, which the tap will make up for."""
        # Also of the first layer: a scan, which is traced once, may call it many times.
        if get_opaque_trace_state() != self.trace:
            raise ValueError(
                f"{path} lies inside a transform within the forward function (scan, RNN, remat,"
                " vmap, jit, ...), where direct feedback alignment cannot reach it: exclude it with"
                " `where`, or apply direct feedback alignment inside that transform."
            )
        if len(self.reached) == 1:  # nothing before the first layer learns
            if self.drawn is not None:
                self.drawn[path] = None
            return x
        if self.drawn is not None:
            self.drawn.setdefault(path, None)  # its number; the logits say the rest
        self.taps.append((path, x, dtype))
        return jax.lax.stop_gradient(x)

    def finish(self, out: Any) -> Any:
        """Taps the logits, and checks that every rule and all feedback weights were used."""
        for rule in self.rules:
            if not any(_selects(rule, path) for path in self.reached):
                raise ValueError(
                    "No layer was reached that `where` selects: the forward function called"
                    f" {', '.join(dict.fromkeys(self.reached)) or 'none'}. It sees the layers of"
                    " its framework that run within the call: put jax.jit around the transformed"
                    " function, not inside, and hand models over as arguments."
                )
        for path in self.feedback:
            if path not in self.reached:
                raise ValueError(
                    f"There are feedback weights for {path}, where no layer was called"
                    f"{_near(path, self.reached)}. The tree holds one array for the kernel of every"
                    " layer, by its path, as init_feedback makes it for this very function."
                )
        return self._tap(out) if self.taps else out

    def _tap(self, out: Any) -> Any:
        """The cotangent of the logits reaches every input through its feedback weights."""
        logits: Any = _first(out)
        if not getattr(logits, "ndim", 0):
            raise ValueError(
                "Direct feedback alignment taps the logits: the forward function must return one"
                f" array with the classes on its last axis, or first of all, not {logits!r}."
            )
        batch = logits.shape[:-1]
        terms = [logits]
        for path, x, dtype in self.taps:
            if x.shape[: len(batch)] != batch:
                raise ValueError(
                    f"Direct feedback alignment: the input of {path}, of shape {x.shape}, does"
                    f" not begin with the batch axes {batch} of the logits."
                )
            size = math.prod(x.shape[len(batch) :])
            flat = x.reshape(*batch, size).astype(logits.dtype)
            shape = (flat.shape[-1], logits.shape[-1])
            if self.drawn is not None:
                self._draw(path, shape, Axes((0,), (1,), ()), dtype)
            else:
                weights = jax.lax.stop_gradient(self.weights(path, shape))
                terms.append(flat @ weights.astype(logits.dtype))
        _, *others = jax.tree.leaves(out)
        return jax.tree.unflatten(jax.tree.structure(out), [add_tangents(*terms), *others])

    def close(self) -> None:
        """Lets go of all arrays: caches of JAX may keep the call as a part of their keys."""
        vars(self).update(feedback={}, taps=[], holders=[], outer=None)


def _check_undivided(path: str, kernel: jax.Array, axes: Axes) -> None:
    """Refuses a mean over weights that are, or may be, divided over devices."""
    if axes.parts is None:
        check_whole(kernel)
    elif any(axes.parts):
        raise ValueError(
            f"{path} is divided over devices, and rule='uniform_sign' needs the root mean square of"
            " the whole: use rule='fixed_sign'."
        )


def _first(out: Any) -> Any:
    return _first(out[0]) if isinstance(out, tuple | list) and out else out


def _halves(x: jax.Array, carry: int, *, stop_carry: bool) -> jax.Array:
    """An input whose carry, or all but its carry, is constant."""
    if carry in (0, *x.shape[-1:]):
        return x
    stop, rest = jax.lax.stop_gradient, x.shape[-1] - carry
    inputs, state = jnp.split(x, [rest], axis=-1)
    return jnp.concatenate([inputs, stop(state)] if stop_carry else [stop(inputs), state], -1)


def _of_input(seen: Seen, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The input of a layer, its first floating-point array, and the layer as its function."""
    slots = dict(enumerate(args)) | kwargs
    arrays = {slot: arg for slot, arg in slots.items() if hasattr(arg, "dtype")}
    floats = [slot for slot, arg in arrays.items() if jnp.issubdtype(arg.dtype, jnp.inexact)]
    if not arrays:
        raise ValueError(f"{path_string(seen.path)}: the layer was called without an array.")
    (slot, *_) = (*floats, *arrays)

    def arguments(x, constant=False):
        stopped = {s: jax.lax.stop_gradient(arg) for s, arg in arrays.items() if constant}
        full = slots | stopped | {slot: x}
        return [full[i] for i in range(len(args))], {name: full[name] for name in kwargs}

    def call(x):
        positional, named = arguments(x)
        return seen.call(*positional, **named)

    def replaced(kernel, x):
        positional, named = arguments(x, constant=True)
        return seen.replaced(kernel, *positional, **named)

    return slots[slot], call, replaced


def _near(path: str, others: Any) -> str:
    nested = [o for o in others if f"/{path}".endswith(f"/{o}") or f"/{o}".endswith(f"/{path}")]
    close = nested or difflib.get_close_matches(path, list(others), 1, 0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def _by_hand(path: str, cls: type, rule: Rule) -> str:
    ways = ["exclude it with `where`"]
    if cls.__name__ in INSTEAD:
        ways.append(INSTEAD[cls.__name__])
    else:
        ways.append(
            "register the class, if it is bilinear in this kernel and its input, as"
            f" layers={{{cls.__name__}: DimensionNumbers(...)}}"
        )
        if rule.kind == "propagated":
            ways.append("call grapes_optax.modulate_error in it")
    if rule.kind == "propagated":
        ways.append("use the local form, grapes_optax.scale_by_grapes")
    return (
        f"{path}: {cls.__name__} is no layer that the rule knows, and may multiply by hand or do"
        f" more than that with its kernel. Ways out: {'; '.join(ways)}."
    )


# The transformations.


class Framework(NamedTuple):
    """How a framework shows its layers to a call."""

    see: Callable[[Call, Forward, tuple[Any, ...], dict[str, Any]], Any]
    layers: Layers
    eval_shape: Callable[..., Any] = jax.eval_shape
    whole: tuple[type, ...] = ()  # what `eval_shape` takes in one piece

    def propagated(
        self,
        forward: Forward,
        where: Where = None,
        *,
        through_time: bool = False,
        layers: Layers | None = None,
        gain: jax.typing.ArrayLike = 2.0,
        bounds: tuple[float, float] | None = (1.0, 2.0),
        normalization: Normalization = "max",
        control: Control | None = None,
    ) -> "Transformed":
        r"""The same function with propagated GRAPES in its derivative.

        .. math::
          \delta_j \leftarrow f_j \, \delta_j

        at the pre-activation of every layer of the framework, those inside attention and
        recurrent cells included: see :func:`grapes_optax.modulate_error`. Arguments and
        values do not change, and nothing else does: neither the model nor other calls of it.

        A layer is a class of the framework that multiplies one input by one kernel, or a
        subclass that leaves its methods alone. The kernels of a recurrent cell that are
        summed into one pre-activation share their importance; the kernel that reads the
        carry gets its factor on its own gradient only, so that factors do not compound
        through time.

        The transformations compose, in any order. Where two of a kind select one layer, the
        one that was applied last holds, the outermost. Choose one form for a layer: with
        :func:`grapes_optax.scale_by_grapes` as well, its factor acts twice.

        Args:
          forward: any function that calls models: ``model.apply`` of linen or Haiku, or a
            function of nnx or Equinox models, ``MLP.__call__`` for instance.
          where: predicate on the path of a kernel, ``"Dense_0/kernel"`` for instance, in the
            model or argument that holds it; the output layer should be excluded. ``None``
            selects all.
          through_time: whether factors travel through the carry of recurrent cells, and
            compound with every step: at initialisation the gradient of a vanilla cell is
            then 3.3 times the plain one after 5 steps, 50 times after 20 and 83,000 times
            after 50, against 1.76 throughout without, and a recurrent spiking network on
            digits ends at 84 % instead of 95. Gates and sigmoids damp it
            (``docs/spiking.md`` has all numbers).
          layers: further classes that are bilinear in their kernel and their first
            floating-point argument, with the axes of the kernel: :class:`DimensionNumbers`,
            or a function of the module and the rank of the kernel.
          gain: as in :func:`grapes_optax.importance_factor`, like the other options.
          bounds: as in :func:`grapes_optax.importance_factor`.
          normalization: as in :func:`grapes_optax.importance_factor`.
          control: as in :func:`grapes_optax.importance_factor`.

        Returns:
          A function with the arguments and values of `forward`.

        Raises:
          ValueError: for an unknown option; when the function is called, if it reaches no
            layer that `where` selects, or a module that holds a kernel and is no layer.

        Examples:
          >>> import flax.linen as nn
          >>> import jax
          >>> import jax.numpy as jnp
          >>> import optax
          >>> from grapes_optax.linen import propagated
          >>> model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(3)])
          >>> params = model.init(jax.random.key(0), jnp.ones((1, 4)))
          >>> forward = propagated(model.apply, where=lambda path: "layers_2" not in path)
          >>> grad = lambda f: jax.grad(lambda params: f(params, jnp.ones((5, 4))).sum())(params)
          >>> bool(optax.tree.norm(grad(forward)) > optax.tree.norm(grad(model.apply)))
          True

          >>> from flax import nnx
          >>> from grapes_optax import nnx as grapes
          >>> model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
          >>> forward = grapes.propagated(nnx.Linear.__call__)
          >>> grads = nnx.grad(lambda model: forward(model, jnp.ones((5, 4))).sum())(model)

        References:
          Dellaferrera et al., `Introducing principles of synaptic integration in the
          optimization of deep neural networks
          <https://doi.org/10.1038/s41467-022-29491-2>`_, 2022
        """
        options = Options(gain, bounds, normalization, control).checked()
        rule = Rule("propagated", where, _items(layers), options, through_time)
        return _transformed(self, forward, rule)

    def feedback_alignment(
        self,
        forward: Forward,
        where: Where = None,
        *,
        rule: str = "fixed",
        layers: Layers | None = None,
    ) -> "Transformed":
        r"""The same function, whose derivative carries errors back by feedback weights.

        .. math::
          \delta_{l} = (B_{l+1} \, \delta_{l+1}) \odot \phi'(z_l)

        with a fixed random B (feedback alignment) or one made of it and the forward weights:

        ===================  =====================================================
        ``"fixed"``          B
        ``"uniform_sign"``   sign(W) times the root mean square of B
        ``"fixed_sign"``     sign(W) times the magnitudes of B
        ``"kolen_pollack"``  B, which receives the gradient of W
        ===================  =====================================================

        The function has one more argument, ``feedback=``: a tree from :func:`init_feedback`,
        or any other that has an array in the shape of the kernel at the path of each layer.
        One's own matrix takes the place of a drawn one,
        ``feedback | {"Dense_1/kernel": matrix}``. Random signs are ``"fixed_sign"`` with
        weights drawn anew for every batch. Under Kolen-Pollack differentiate with respect to
        the feedback weights too, and update both with the same optimizer and weight decay:
        they then align. The forward kernel is not kept for the backward pass, except for its
        signs.

        The slices of a stack of layers that the forward function scans or maps over share
        the feedback weights of one layer (which under Kolen-Pollack can align with none of
        them), and so do two models of one call whose layers have the same path.

        Args:
          forward: as in :func:`propagated`.
          where: predicate on the path of a kernel; ``None`` selects all.
          rule: one of the table.
          layers: as in :func:`propagated`.

        Returns:
          A function with the arguments of `forward` and ``feedback``, and its values.

        Raises:
          ValueError: for an unknown rule; when the function is called, if feedback weights
            are missing, of the wrong shape or at a path that is no layer, or as
            :func:`propagated`.

        Examples:
          >>> import flax.linen as nn
          >>> import jax
          >>> import jax.numpy as jnp
          >>> from grapes_optax.linen import feedback_alignment, init_feedback
          >>> model, x = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(3)]), jnp.ones((5, 4))
          >>> params = model.init(jax.random.key(0), x)
          >>> forward = feedback_alignment(model.apply)
          >>> feedback = init_feedback(jax.random.key(1), forward, params, x)
          >>> grads = jax.grad(lambda p: forward(p, x, feedback=feedback).sum())(params)

        References:
          Lillicrap et al., `Random synaptic feedback weights support error backpropagation
          for deep learning <https://doi.org/10.1038/ncomms13276>`_, 2016

          Liao et al., `How important is weight symmetry in backpropagation?
          <https://arxiv.org/abs/1510.05067>`_, 2016

          Akrout et al., `Deep learning without weight transport
          <https://arxiv.org/abs/1904.05391>`_, 2019
        """
        if rule == "random_sign":
            raise ValueError(
                "Random signs are rule='fixed_sign' with feedback weights drawn anew for every"
                " batch: feedback=init_feedback(key, forward, ...)."
            )
        if rule not in BACKWARD_KERNELS:
            raise ValueError(f"Unknown rule {rule!r}: choose one of {list(BACKWARD_KERNELS)}.")
        return _transformed(self, forward, Rule("aligned", where, _items(layers), back=rule))

    def direct_feedback_alignment(
        self, forward: Forward, where: Where = None, *, layers: Layers | None = None
    ) -> "Transformed":
        r"""The same function, whose derivative hands errors at the logits to every layer.

        .. math::
          \partial L / \partial x_l = B_l \, e, \qquad e = \partial L / \partial \mathrm{logits}

        for the input x of every layer but that called first; the gradient between layers is
        stopped. Inputs begin with the batch axes of the logits.
        Activations, pooling and dropout between a layer and the next are differentiated as
        usual. The logits are what the function returns, or the first of what it returns, with
        the classes on the last axis. With this rule local and propagated GRAPES are the same:
        use :func:`grapes_optax.scale_by_grapes`.

        The function has one more argument, ``feedback=``: a tree from :func:`init_feedback`,
        or any other that has a matrix (size of the layer's input, logits) at the path of
        each layer's kernel.

        Args:
          forward: as in :func:`propagated`.
          where: predicate on the path of a kernel; ``None`` selects all.
          layers: as in :func:`propagated`.

        Returns:
          A function with the arguments of `forward` and ``feedback``, and its values.

        Raises:
          ValueError: when the function is called, as :func:`feedback_alignment`, or if a layer
            lies inside a scan, a remat or a vmap within `forward`, where no tap can reach.

        Examples:
          >>> import flax.linen as nn
          >>> import jax
          >>> import jax.numpy as jnp
          >>> from grapes_optax.linen import direct_feedback_alignment, init_feedback
          >>> model, x = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(3)]), jnp.ones((5, 4))
          >>> params = model.init(jax.random.key(0), x)
          >>> forward = direct_feedback_alignment(model.apply)
          >>> feedback = init_feedback(jax.random.key(1), forward, params, x)
          >>> grads = jax.grad(lambda p: forward(p, x, feedback=feedback).sum())(params)

        References:
          Nøkland, `Direct feedback alignment provides learning in deep neural networks
          <https://arxiv.org/abs/1609.01596>`_, 2016
        """
        return _transformed(self, forward, Rule("direct", where, _items(layers)))


def _with_feedback(signature: inspect.Signature) -> inspect.Signature:
    parameter = inspect.Parameter("feedback", inspect.Parameter.KEYWORD_ONLY)
    before = list(signature.parameters.values())
    rest = [before.pop()] if before and before[-1].kind == parameter.VAR_KEYWORD else []
    return signature.replace(parameters=[*before, parameter, *rest])


class Transformed:
    """A forward function with other derivatives."""

    def __init__(self, framework: Framework, forward: Forward, rules: tuple[Rule, ...]) -> None:
        functools.update_wrapper(self, forward, updated=())
        self.framework, self.forward, self.rules = framework, forward, rules
        if self.reads_feedback:  # jax.jit may donate it by its name
            with contextlib.suppress(TypeError, ValueError):
                self.__signature__ = _with_feedback(inspect.signature(forward))

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle, without what is copied from the forward function."""
        return Transformed, (self.framework, self.forward, self.rules)

    @property
    def reads_feedback(self) -> bool:
        return any(rule.kind != "propagated" for rule in self.rules)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The value of the forward function."""
        return self.run(args, kwargs, kwargs.pop("feedback", {}) if self.reads_feedback else {})

    def run(self, args: Any, kwargs: Any, feedback: Any, drawn: Any = None) -> Any:
        call = Call(self.rules, self.framework.layers, feedback, drawn is not None)
        with _IN_FLIGHT(call):
            try:
                out = call.finish(self.framework.see(call, self.forward, args, kwargs))
            finally:
                call.close()
        if drawn is not None:
            drawn.update(call.drawn)
        return out


def _transformed(framework: Framework, forward: Forward, rule: Rule) -> Transformed:
    if not callable(forward) or isinstance(forward, jax.stages.Wrapped):
        raise TypeError(
            f"A learning rule transforms a forward function, not {forward!r}: model.apply, or"
            " MLP.__call__. Apply jax.jit to the transformed function, not before."
        )
    if rule.where is not None and not callable(rule.where):
        raise TypeError(f"`where` must be a function of a path, or None; got {rule.where!r}.")
    rules = (rule,)
    if isinstance(forward, Transformed) and forward.framework.see is framework.see:
        forward, rules = forward.forward, rules + forward.rules
    return Transformed(framework, forward, rules)


def init_feedback(
    key: jax.Array,
    forward: Transformed,
    *args: Any,
    initializer: Initializer = HE_UNIFORM,
    **kwargs: Any,
) -> dict[str, jax.Array]:
    """Draws feedback weights for a function made by one of the feedback rules.

    Args:
      key: a key of ``jax.random``.
      forward: the function, from ``feedback_alignment`` or ``direct_feedback_alignment``.
      *args: its arguments; of arrays only their shapes are used.
      initializer: of matrices (fan-in of the layer, nodes or logits);
        ``jax.nn.initializers.variance_scaling`` sets the scale too.
      **kwargs: its keyword arguments.

    Returns:
      A dict with one array for each layer that the rules select, by the path of its kernel
      as `where` sees it.

    Raises:
      TypeError: if `forward` has no feedback rule.
      ValueError: as the function when it is called.

    Examples:
      >>> import flax.linen as nn
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from grapes_optax.linen import direct_feedback_alignment, feedback_alignment
      >>> from grapes_optax.linen import init_feedback
      >>> model, x = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(3)]), jnp.ones((5, 4))
      >>> params = model.init(jax.random.key(0), x)
      >>> for rule in feedback_alignment, direct_feedback_alignment:
      ...     feedback = init_feedback(jax.random.key(1), rule(model.apply), params, x)
      ...     print(jax.tree.map(jnp.shape, feedback))
      {'layers_0/kernel': (4, 8), 'layers_2/kernel': (8, 3)}
      {'layers_2/kernel': (8, 3)}

    References:
      Lillicrap et al., `Random synaptic feedback weights support error backpropagation for
      deep learning <https://doi.org/10.1038/ncomms13276>`_, 2016
    """
    if not isinstance(forward, Transformed) or not forward.reads_feedback:
        raise TypeError(
            "init_feedback(key, forward, *args) draws for a function made by feedback_alignment or"
            f" direct_feedback_alignment, not {forward!r}."
        )
    framework, drawn = forward.framework, {}
    leaves, structure = jax.tree.flatten(
        (args, kwargs), is_leaf=lambda leaf: isinstance(leaf, framework.whole)
    )

    def is_array(leaf):  # flags and functions are handed on as they are
        return hasattr(leaf, "dtype") or isinstance(leaf, framework.whole)

    def run(traced):
        rest = iter(traced)
        full = [next(rest) if is_array(leaf) else leaf for leaf in leaves]
        full_args, full_kwargs = jax.tree.unflatten(structure, full)
        forward.run(full_args, full_kwargs, {}, drawn)
        return 0

    framework.eval_shape(run, [leaf for leaf in leaves if is_array(leaf)])
    feedback = {}
    for number, (path, one) in enumerate(drawn.items()):
        if one is None:
            continue
        shape, axes, dtype = one
        order = axes.reduction + axes.kept
        sizes = [shape[axis] for axis in order]
        fan_in = math.prod(shape[axis] for axis in axes.reduction)
        keyed = jax.random.fold_in(key, number)
        matrix = initializer(keyed, (fan_in, math.prod(sizes) // fan_in), dtype)
        places = [order.index(axis) for axis in range(len(order))]
        feedback[path] = jnp.transpose(matrix.reshape(sizes), places)
    return feedback
