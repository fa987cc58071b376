"""Importance and factor of the nodes of one layer: arrays and axes in, array out."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Literal, NamedTuple, Protocol, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import PartitionSpec

from grapes_optax._mesh import (
    Parts,
    check_whole,
    in_line_with,
    part_of,
    parts_of,
    whole,
    whole_shape,
    whole_sum,
)

Normalization = Literal["max", "mean"]
Control = Literal["mean", "roll", "reverse", "norm"]


class DimensionNumbers(NamedTuple):
    """Which axes of a weight leaf are fan-in and which are nodes.

    Field names and meaning are those of ``optax.contrib.MuonDimensionNumbers``;
    any object with these two attributes is accepted in its place. Axes named by
    neither are a *stack*: independent layers that lie in one array (``nn.scan``,
    ``nn.vmap``, ensembles), each with a maximum of its own.

    Attributes:
      reduction_axis: the fan-in axes, which the importance sums over.
      output_axis: the node axes, one importance for each entry.
      group: leaves with the same label belong to one pre-activation and share
        one factor: a kernel and its bias, for instance. A member without fan-in
        axes (a bias) takes the factor and adds nothing to the importance. With
        ``None`` a leaf is a layer by itself.
      gates: number of gates that lie one after the other on the last node axis, each
        with a maximum of its own; all kernels of a group have the same. A bias as long
        as one gate belongs to the last.
      spec: how the leaf lies over the axes of a mesh, as ``in_specs`` of ``jax.shard_map``
        says; needed inside of it alone, where a leaf may be a part of an array, and
        ignored outside. ``PartitionSpec()`` stands for a whole leaf, ``None`` says
        nothing: a kernel that may be a part of one is then refused.
        :func:`sharded` says it of a whole tree.

    Examples:
      >>> from grapes_optax import DimensionNumbers
      >>> DimensionNumbers()  # a Flax Dense kernel, (inputs, nodes)
      DimensionNumbers(reduction_axis=0, output_axis=1, group=None, gates=1, spec=None)
      >>> conv = DimensionNumbers(reduction_axis=(0, 1, 2), output_axis=3)
      >>> lstm = DimensionNumbers(1, 0, group="cell", gates=4)  # four gates, nodes first
    """

    reduction_axis: int | Sequence[int] = 0
    output_axis: int | Sequence[int] = 1
    group: Hashable = None
    gates: int = 1
    spec: PartitionSpec | None = None


@dataclasses.dataclass(frozen=True)
class LeftAlone:
    """Says in a description that a leaf is not modulated, and why.

    ``None`` says the same without a reason. :func:`infer_dimension_numbers` gives it to
    the output layer, and :func:`summary` shows the reason as the role of the leaf.

    Attributes:
      reason: a word or two.

    Examples:
      >>> from grapes_optax import DimensionNumbers, LeftAlone
      >>> description = {"hidden": DimensionNumbers(), "output": LeftAlone("output")}
    """

    reason: str

    def __post_init__(self) -> None:
        if not isinstance(self.reason, str):
            raise TypeError(f"reason must be a word or two, got {self.reason!r}.")


class HasAxes(Protocol):
    """Any object that says which axes of a leaf are which."""

    @property
    def reduction_axis(self) -> int | Sequence[int]: ...

    @property
    def output_axis(self) -> int | Sequence[int]: ...


Description = HasAxes | LeftAlone | optax.Params | None  # of a leaf, or a tree of them
WeightDimNumOrFn = Description | Callable[[optax.Params], Description]


def is_description(x: object) -> TypeGuard[HasAxes]:
    return hasattr(x, "reduction_axis") and hasattr(x, "output_axis")


class Shaped(Protocol):
    """An array, or what stands for one."""

    @property
    def shape(self) -> tuple[int, ...]: ...


class Axes(NamedTuple):
    """Dimension numbers resolved for one array: sorted by kind, none negative."""

    reduction: tuple[int, ...]
    output: tuple[int, ...]
    stack: tuple[int, ...]
    gates: int = 1
    parts: Parts | None = None  # what divides each axis here, if that is known

    @classmethod
    def of(
        cls,
        ndim: int,
        output: int | Sequence[int],
        reduction: int | Sequence[int] | None = None,
        stack: int | Sequence[int] = (),
        gates: int = 1,
    ) -> "Axes":
        """Checks the axes of an array of `ndim`; what is not named is fan-in, or else a stack."""
        given = {"reduction_axis": reduction, "output_axis": output, "stack": stack}
        found = {
            name: _axes_of(name, value, ndim) for name, value in given.items() if value is not None
        }
        named = list(itertools.chain(*found.values()))
        if not found["output_axis"]:
            raise ValueError("output_axis is empty: name at least one axis of nodes.")
        if len(set(named)) < len(named):
            raise ValueError(
                f"reduction_axis={reduction} and output_axis={output} must name distinct axes: an"
                " axis is fan-in, or nodes, or (named by neither) a stack of independent layers."
            )
        if isinstance(gates, bool) or not isinstance(gates, int | np.integer) or gates < 1:
            raise ValueError(f"gates must be a positive int, got {gates!r}.")
        found["reduction_axis" if reduction is None else "stack"] = tuple(
            axis for axis in range(ndim) if axis not in named
        )
        return cls(found["reduction_axis"], found["output_axis"], found["stack"], int(gates))

    @property
    def kept(self) -> tuple[int, ...]:
        return self.stack + self.output

    def divided(self, axes: Sequence[int]) -> Parts:
        """What divides each of these axes here."""
        return tuple(self.parts[axis] if self.parts else () for axis in axes)

    def shape(self, array: Shaped) -> tuple[int, ...]:
        """Shape of the importance of the whole array: stack axes first, then node axes."""
        sizes = whole_shape(array.shape, self.parts)
        shape = tuple(sizes[axis] for axis in self.kept)
        if shape[-1] % self.gates:
            raise ValueError(
                f"{self.gates} gates do not divide the last node axis, of {shape[-1]} nodes."
            )
        return shape


def _axes_of(name: str, value: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    axes = value if isinstance(value, Sequence) else (value,)
    for axis in axes:
        if isinstance(axis, bool) or not isinstance(axis, int | np.integer):
            raise TypeError(f"{name} must be an int or a sequence of ints, got {value!r}.")
        if not -ndim <= axis < ndim:
            raise ValueError(f"{name}={value!r} names axis {axis}, out of range for {ndim} axes.")
    return tuple(int(axis) % ndim for axis in axes)


def resolve_axes(numbers: object, array: Shaped) -> Axes:
    """The axes of an array as a description says, in which the gates divide the nodes."""
    if not is_description(numbers):
        raise TypeError(
            f"weight_dimension_numbers must be DimensionNumbers (or another object with"
            f" reduction_axis and output_axis), got {numbers!r}."
        )
    ndim = len(array.shape)
    axes = Axes.of(
        ndim,
        output=numbers.output_axis,
        reduction=_axes_of("reduction_axis", numbers.reduction_axis, ndim),
        gates=getattr(numbers, "gates", 1),
    )
    spec = getattr(numbers, "spec", None)
    axes = axes._replace(parts=None if spec is None else parts_of(spec, ndim))
    axes.shape(array)
    return axes


def kernel_array(kernel: jax.typing.ArrayLike) -> jax.Array:
    try:
        array = jnp.asarray(kernel)
    except (TypeError, ValueError) as error:
        raise TypeError(f"The kernel must be an array of numbers, got {kernel!r}.") from error
    if array.dtype == bool:
        raise TypeError("The kernel must be an array of numbers, got an array of bool.")
    return array


def fan_in_axes(kernel: jax.Array, numbers: HasAxes | None) -> Axes:
    """The axes of a kernel; None is the convention of Flax, nodes last and all others fan-in."""
    if kernel.ndim < 2:
        raise ValueError(
            f"A kernel has two axes or more, fan-in and nodes: this one has shape {kernel.shape}."
        )
    axes = Axes.of(kernel.ndim, output=-1) if numbers is None else resolve_axes(numbers, kernel)
    if not axes.reduction:
        raise ValueError("reduction_axis leaves no fan-in: name at least one axis to sum over.")
    return axes


@functools.partial(jax.jit, static_argnames=("axes", "power"), inline=True)
def incoming_sum(kernel: jax.Array, axes: Axes, power: int = 1) -> jax.Array:
    """Sum of the absolute incoming weights, at least in float32, stack axes first.

    Of the whole kernel, also where this device holds a part of it; or of a power of them.
    """
    if not jnp.issubdtype(kernel.dtype, jnp.inexact):
        kernel = kernel.astype(jnp.float32)  # the magnitude of an int8 of -128 is no int8
    magnitude = jnp.abs(kernel)
    # A bfloat16 sum over a usual fan-in is off by about 1 %.
    dtype = magnitude.dtype if magnitude.dtype == jnp.float64 else jnp.float32
    if power > 1:
        magnitude = magnitude.astype(dtype) ** power
    total = jnp.sum(magnitude, axis=axes.reduction, dtype=dtype)
    order = sorted(axes.kept)
    total = jnp.transpose(total, [order.index(axis) for axis in axes.kept])
    summed = itertools.chain(*axes.divided(axes.reduction))
    return whole_sum(total, axes.divided(axes.kept), tuple(summed))


def expand(factor: jax.Array, axes: Axes) -> jax.Array:
    """Puts a factor of shape stack + nodes in line with the leaf that `axes` describe."""
    order = sorted(axes.kept)
    return jnp.expand_dims(
        jnp.transpose(here(factor, axes), [axes.kept.index(axis) for axis in order]),
        axes.reduction,
    )


@functools.partial(jax.jit, static_argnames=("axes",), inline=True)
def scale_nodes(x: jax.Array, factor: jax.Array, axes: Axes) -> jax.Array:
    """Product of a leaf that `axes` describe with a factor of shape stack + nodes."""
    return scale(x, expand(factor, axes))


def here(nodes: jax.Array, axes: Axes) -> jax.Array:
    """The entries for the nodes that this device holds, of an array of shape stack + nodes."""
    return part_of(nodes, axes.divided(axes.kept))


def scale(x: jax.Array, factor: jax.Array) -> jax.Array:
    """Product with a factor that broadcasts against `x`, of the type and sharding of `x`."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(f"The update of a node must be of floats, got {x.dtype}.")
    factor = in_line_with(factor, x)
    # The product is taken in the wider type: a bfloat16 factor would be off by 0.4 %.
    wide = max(x.dtype, factor.dtype, key=lambda dtype: dtype.itemsize)
    return (x.astype(wide) * factor.astype(wide)).astype(x.dtype)


def _mean_of_layer(factor: jax.Array, nodes: tuple[int, ...]) -> jax.Array:
    return jnp.broadcast_to(jnp.mean(factor, axis=nodes, keepdims=True), factor.shape)


def _neighbour(factor: jax.Array, nodes: tuple[int, ...]) -> jax.Array:
    shape = factor.shape[nodes[0] :]
    before = np.roll(np.arange(math.prod(shape)), 1).reshape(shape)
    index = (..., *np.unravel_index(before, shape))
    # A roll, but one that explicit sharding lets through.
    return factor.at[index].get(out_sharding=jax.typeof(factor).sharding)


def _reversed(factor: jax.Array, nodes: tuple[int, ...]) -> jax.Array:
    """The factor of the strongest node for the weakest, and so on; equal ones in their order."""
    flat = whole(factor).reshape(*factor.shape[: nodes[0]], -1)
    rank = jnp.argsort(jnp.argsort(flat, axis=-1), axis=-1)
    others = jnp.flip(jnp.sort(flat, axis=-1), axis=-1)
    return jnp.take_along_axis(others, rank, axis=-1).reshape(factor.shape)


# Of importances relative to the strongest node, since the mean of large floats overflows.
NORMALIZERS: dict[str, Callable[..., jax.Array]] = {
    "max": lambda relative, nodes: relative,
    "mean": lambda relative, nodes: relative / jnp.mean(relative, axis=nodes, keepdims=True),
}
CONTROLS: dict[str | None, Callable[..., jax.Array]] = {
    None: lambda factor, nodes: factor,
    "mean": _mean_of_layer,
    "roll": _neighbour,
    "reverse": _reversed,
    "norm": lambda factor, nodes: factor,  # which the updates are needed for, see `equal_steps`
}
OF_UPDATES = ("norm",)


class Options(NamedTuple):
    """How an importance becomes a factor; checked once, where the user passes it."""

    gain: jax.typing.ArrayLike = 2.0
    bounds: tuple[float, float] | None = (1.0, 2.0)
    normalization: str = "max"
    control: str | None = None

    def checked(self, *, updates: bool = False) -> "Options":
        """What is out of range, or needs updates where there are none, is refused."""
        for name, value, table in (
            ("normalization", self.normalization, NORMALIZERS),
            ("control", self.control, CONTROLS),
        ):
            if value not in list(table):
                raise ValueError(f"Unknown {name} {value!r}: choose one of {list(table)}.")
        if self.control in OF_UPDATES and not updates:
            raise ValueError(
                f"control={self.control!r} makes the update of a layer as long as that of GRAPES,"
                " and here is no update: use it in scale_by_grapes, grapes_sgd or grapes_rmsprop,"
                ' or choose another control, "mean" for instance.'
            )
        _check_gain(self.gain)
        return self._replace(bounds=_checked_bounds(self.bounds))


_LARGEST = float(np.finfo(np.float32).max)


def _is_real(x: jax.typing.ArrayLike) -> bool:
    dtype = jnp.result_type(x)
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


def _check_gain(gain: object) -> None:
    if isinstance(gain, bool) or not isinstance(
        gain, int | float | np.number | np.ndarray | jax.Array
    ):
        raise TypeError(
            f"gain must be a number, got {gain!r}. A schedule goes through"
            " optax.inject_hyperparams(scale_by_grapes)(gain=schedule)."
        )
    if np.shape(gain) or not _is_real(gain):
        raise ValueError(f"gain must be one real number, got {gain!r}.")
    if not isinstance(gain, Tracer) and not 0 <= float(gain) <= _LARGEST:
        raise ValueError(f"gain must be finite and not negative, got {gain} (in float32).")


def _checked_bounds(bounds: tuple[float, float] | None) -> tuple[float, float] | None:
    if bounds is None:
        return None
    try:
        low, high = map(float, () if isinstance(bounds, str) else bounds)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"bounds must be a pair of numbers (low, high), or None not to clip; got {bounds!r}."
        ) from error
    if not 0 <= low <= high or low > _LARGEST:
        raise ValueError(
            f"bounds must satisfy 0 <= low <= high, got {bounds}; None does not clip. Low is finite"
            " in float32."
        )
    return low, high


@functools.partial(
    jax.jit,
    static_argnames=("node_ndim", "gates", "bounds", "normalization", "control"),
    inline=True,
)
def factor_of(
    importance: jax.Array,
    node_ndim: int,
    gates: int,
    gain: jax.typing.ArrayLike,
    bounds: tuple[float, float] | None,
    normalization: str,
    control: str | None,
) -> jax.Array:
    """Factor of every node from its importance; the last `node_ndim` axes are nodes.

    The last axis holds the nodes of all gates, one gate after the other.
    """
    # A constant of the step: no gradient flows through the importance.
    importance = jax.lax.stop_gradient(importance)
    shape = importance.shape
    if gates > 1:
        importance = importance.reshape(*shape[:-1], gates, shape[-1] // gates)
        importance = jnp.moveaxis(importance, -2, -1 - node_ndim)
    nodes = tuple(range(importance.ndim - node_ndim, importance.ndim))
    # A division may be a product with a reciprocal, which would be zero for the largest floats.
    importance = importance / 4
    # Weights of magnitude 0 bound the maximum of a layer without nodes.
    strongest = jnp.max(importance, axis=nodes, keepdims=True, initial=0.0)
    silent, top = strongest == 0, importance == strongest
    # The strongest node gets exactly the gain; so do several of infinite importance, which count as
    # equally strong. The divisor of each node is its own: of one for all XLA would take the
    # reciprocal, in a kernel of its own for every layer.
    relative = jnp.where(top, 1, importance / jnp.where(top, 1, strongest))
    factor = jnp.asarray(gain, importance.dtype) * NORMALIZERS[normalization](relative, nodes)
    if bounds is not None:
        factor = jnp.clip(factor, *bounds)
    factor = CONTROLS[control](jnp.where(silent, 1, factor), nodes)
    return jnp.moveaxis(factor, -1 - node_ndim, -2).reshape(shape) if gates > 1 else factor


def layer_factor(kernels: Sequence[jax.Array], axes: Sequence[Axes], options: Options) -> jax.Array:
    """Factor of the nodes of a layer whose kernels are summed into one pre-activation."""
    shape, gates = axes[0].shape(kernels[0]), axes[0].gates
    for kernel, known in zip(kernels, axes, strict=True):
        if known.parts is None:
            check_whole(kernel)
    sums = [incoming_sum(k, axes=a) for k, a in zip(kernels, axes, strict=True)]
    if len(sums) > 1 or gates > 1:  # sums that may lie otherwise, or axes that get another shape
        sums = [whole(s).reshape(shape) for s in sums]
    wide = max((s.dtype for s in sums), key=lambda dtype: dtype.itemsize)
    importance = functools.reduce(jnp.add, (s.astype(wide) for s in sums))
    return factor_of(importance, len(axes[0].output), gates, *options)


def equal_steps(
    layer: Sequence[tuple[jax.Array, Axes, jax.Array]],
) -> list[jax.Array]:
    """One factor for all nodes of a layer, of its updates, their axes and the factors of GRAPES.

    The layer's update becomes as long as that of GRAPES, and stays zero where it is; each slice of
    a stack has a factor of its own.
    """
    sums = [whole(incoming_sum(update, axes=axes)) for update, axes, _ in layer]
    nodes = [
        tuple(range(len(axes.stack), s.ndim)) for s, (_, axes, _) in zip(sums, layer, strict=True)
    ]
    bounds = [jnp.max(s, axis=n, initial=0.0) for s, n in zip(sums, nodes, strict=True)]
    bound = functools.reduce(jnp.maximum, bounds)
    usual = (bound >= jnp.finfo(bound.dtype).tiny) & (bound < jnp.inf)

    def of_nodes(x: jax.Array, like: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x.reshape(*x.shape, *[1] * (like.ndim - x.ndim)), like.shape)

    plain = grapes = jnp.zeros_like(bound)
    for (update, axes, factor), n in zip(layer, nodes, strict=True):
        # Relative to an upper bound of the entries, whose squares neither over- nor underflow.
        dtype = max(update.dtype, bound.dtype, key=lambda dtype: dtype.itemsize)
        relative = scale_nodes(
            update.astype(dtype), of_nodes(1 / jnp.where(usual, bound, 1), factor), axes=axes
        )
        squares = whole(incoming_sum(relative, axes=axes, power=2))
        plain += squares.sum(n)
        grapes += (whole(factor).astype(squares.dtype) ** 2 * squares).sum(n)
    mean = whole(layer[0][2]).mean(nodes[0]).astype(bound.dtype)
    ratio = jnp.where(usual, jnp.sqrt(grapes / jnp.where(usual, plain, 1)), mean)
    return [of_nodes(ratio, factor).astype(factor.dtype) for *_, factor in layer]


def node_importance(
    kernel: jax.typing.ArrayLike, weight_dimension_numbers: HasAxes | None = None
) -> jax.Array:
    r"""Importance of every node of a layer: the sum of its absolute incoming weights.

    .. math::
      s_j = \sum_i |W_{ij}|

    Args:
      kernel: weights of one layer, or of a stack of layers.
      weight_dimension_numbers: a :class:`DimensionNumbers`, or any object with the same
        ``reduction_axis`` and ``output_axis``. ``None`` is the convention of Flax:
        the last axis holds the nodes and all others are fan-in.

    Returns:
      An array of shape (stack axes..., node axes...) in the units of the weights,
      accumulated in at least float32; infinite where it is beyond the largest float.

    Raises:
      ValueError: if the axes overlap, repeat, lie out of range or leave no fan-in.

    Examples:
      >>> import jax.numpy as jnp
      >>> from grapes_optax import node_importance
      >>> kernel = jnp.array([[1.0, -2.0, 0.0], [1.0, 2.0, 1.0]])  # 2 inputs, 3 nodes
      >>> print(node_importance(kernel))
      [2. 4. 1.]

    References:
      Dellaferrera et al., `Introducing principles of synaptic integration in the
      optimization of deep neural networks
      <https://doi.org/10.1038/s41467-022-29491-2>`_, 2022
    """
    kernel = kernel_array(kernel)
    axes = fan_in_axes(kernel, weight_dimension_numbers)
    if axes.parts is None:
        check_whole(kernel)
    return here(incoming_sum(kernel, axes=axes), axes)


def importance_factor(
    kernel: jax.typing.ArrayLike,
    weight_dimension_numbers: HasAxes | None = None,
    *,
    gain: jax.typing.ArrayLike = 2.0,
    bounds: tuple[float, float] | None = (1.0, 2.0),
    normalization: Normalization = "max",
    control: Control | None = None,
) -> jax.Array:
    r"""Factor by which GRAPES multiplies the error of every node of a layer.

    .. math::
      f_j = \mathrm{clip}(g \, s_j / \mathrm{normalizer}(s), \, \mathrm{low}, \, \mathrm{high})

    with the importance :math:`s` of :func:`node_importance`. The factor is a
    constant of the step: no gradient flows from it into the kernel.

    Args:
      kernel: weights of one layer, or of a stack of layers.
      weight_dimension_numbers: as in :func:`node_importance`.
      gain: g, the factor of a node as strong as the normalizer, before clipping.
      bounds: ``(low, high)``, or ``None`` not to clip.
      normalization: ``"max"`` divides by the strongest node of the layer,
        ``"mean"`` by the average one. ``gain=1.0, bounds=None,
        normalization="mean"`` gives factors that average 1, so that the layer's
        learning rate stays as it is.
      control: ``"mean"`` gives every node its layer's mean factor, ``"roll"`` its
        neighbour's (same distribution, wrong nodes), ``"reverse"`` the strongest node that
        of the weakest and so on: the controls that tell whether it matters which node
        gets which factor.

    Returns:
      An array of shape (stack axes..., node axes...), without unit; 1 in a layer
      whose weights are all zero, or add up to less than 1e-37. Nodes of infinite
      importance count as equally strong, and the others of their layer as 0. A NaN makes
      all factors of its layer NaN.

    Raises:
      ValueError: if the axes overlap, repeat, lie out of range or leave no fan-in, if
        the gates do not divide the nodes, or an option is not one of those above.

    Examples:
      >>> import jax.numpy as jnp
      >>> from grapes_optax import importance_factor
      >>> kernel = jnp.array([[1.0, -2.0, 0.0], [2.0, 2.0, 1.0]])  # 2 inputs, 3 nodes
      >>> print(importance_factor(kernel))
      [1.5 2.  1. ]
      >>> print(importance_factor(kernel, bounds=None))
      [1.5 2.  0.5]
      >>> print(importance_factor(kernel, control="roll"))
      [1.  1.5 2. ]

    References:
      Dellaferrera et al., `Introducing principles of synaptic integration in the
      optimization of deep neural networks
      <https://doi.org/10.1038/s41467-022-29491-2>`_, 2022
    """
    options = Options(gain, bounds, normalization, control).checked()
    kernel = kernel_array(kernel)
    axes = fan_in_axes(kernel, weight_dimension_numbers)
    return here(layer_factor([kernel], [axes], options), axes)
