"""Feedback alignment and its kin as derivative rules of any bilinear operation.

All of them are made of one identity, `add_tangents`: where the forward pass computes
one thing, the derivative is taken of another. Under `jit` the value of that other thing
is never computed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import get_opaque_trace_state

from grapes_optax._tree import path_string, tree_leaves


@jax.custom_jvp
def add_tangents(x: jax.Array, *others: jax.Array) -> jax.Array:
    """`x` itself; its tangent is the sum of those of `x` and of the others.

    In reverse mode every one of them receives the cotangent of the result.
    """
    del others
    return x


@add_tangents.defjvp
def _(primals, tangents):
    total, *others = tangents
    for tangent in others:
        total = total + tangent
    return add_tangents(*primals), total


# The kernel that carries the error back, from the forward kernel, the feedback weights and
# a key for rules that draw anew in every batch.
BACKWARD_KERNELS: dict[str, Callable[[jax.Array, jax.Array, Any], jax.Array]] = {
    "fixed": lambda kernel, feedback, key: feedback,
    "kolen_pollack": lambda kernel, feedback, key: feedback,
    "uniform_sign": lambda kernel, feedback, key: (
        jnp.sign(kernel) * jnp.sqrt(jnp.mean(jnp.square(feedback)))
    ),
    "fixed_sign": lambda kernel, feedback, key: jnp.sign(kernel) * jnp.abs(feedback),
    # Uniform on [0, a] has the root mean square a / sqrt(3); a shuffle would sort every weight.
    "random_sign": lambda kernel, feedback, key: (
        jnp.sign(kernel)
        * jnp.sqrt(3 * jnp.mean(jnp.square(feedback)))
        * jax.random.uniform(key, kernel.shape, feedback.dtype)
    ),
}


def check_rule(rule: str, key: jax.Array | None) -> None:
    if rule not in BACKWARD_KERNELS:
        raise ValueError(f"Unknown rule {rule!r}: choose one of {list(BACKWARD_KERNELS)}.")
    if (key is not None) != (rule == "random_sign"):
        raise ValueError(
            "The rule 'random_sign' draws magnitudes in every batch: it alone takes a key,"
            " a new one for each step."
        )


def check_feedback(where: str, feedback: Any, shape: tuple[int, ...]) -> jax.Array:
    """The feedback weights of one layer, if they are there and of the right shape."""
    if feedback is None:
        raise ValueError(
            f"There are no feedback weights for {where}: make them with init_feedback under the"
            " same `where`, or exclude the layer."
        )
    if jnp.shape(feedback) != shape:
        raise ValueError(
            f"The feedback weights of {where} have shape {jnp.shape(feedback)}, not {shape}."
        )
    return feedback


def tie(params: dict[str, Any], feedback: jax.Array, rule: str) -> dict[str, Any]:
    """Under Kolen-Pollack the feedback weights receive the gradient of the kernel."""
    if rule != "kolen_pollack":
        return params
    return params | {"kernel": add_tangents(params["kernel"], feedback)}


def aligned(
    op: Callable[[dict[str, Any], jax.Array], jax.Array],
    params: dict[str, Any],
    x: jax.Array,
    feedback: jax.Array,
    rule: str,
    key: jax.Array | None = None,
) -> jax.Array:
    """`op(params, x)`, bilinear, whose error is carried to `x` by the rule's kernel."""
    kernel = params["kernel"]
    backward = BACKWARD_KERNELS[rule](kernel, feedback, key).astype(kernel.dtype)
    upstream = jax.lax.stop_gradient(params | {"kernel": backward})
    return add_tangents(op(params, jax.lax.stop_gradient(x)), op(upstream, x))


def check_logits(logits: Any) -> Any:
    if not hasattr(logits, "shape"):
        raise ValueError(
            "Direct feedback alignment taps the logits: the model must return one array, not"
            f" {type(logits).__name__}."
        )
    return logits


def check_reach(where: str, reached: bool) -> None:
    if not reached:
        raise ValueError(
            f"{where} lies inside a transform within the model (scan, RNN, remat, jit, ...), where"
            " direct feedback alignment cannot reach it: exclude it with `where`."
        )


class Taps:
    """Direct feedback alignment: inputs of layers, tapped to the error at the logits."""

    def __init__(self) -> None:
        self.trace = get_opaque_trace_state()
        self.inputs: list[tuple[str, jax.Array, Any]] = []

    def reach_here(self) -> bool:
        """Whether a layer that is called now could return to the tap: not from an inner trace."""
        return get_opaque_trace_state() == self.trace

    def cut(self, where: str, x: jax.Array, feedback: Any) -> jax.Array:
        """Cuts the gradient at the input of a layer, which the tap will make up for."""
        check_reach(where, self.reach_here())
        self.inputs.append((where, x, feedback))
        return jax.lax.stop_gradient(x)

    def tap(self, logits: jax.Array) -> jax.Array:
        """The logits; their cotangent reaches every input through its feedback weights."""
        batch = check_logits(logits).shape[:-1]
        outs = []
        for where, x, feedback in self.inputs:
            if x.shape[: len(batch)] != batch:
                raise ValueError(
                    f"Direct feedback alignment: the input of {where}, of shape {x.shape}, does"
                    f" not begin with the batch axes {batch} of the logits."
                )
            flat = x.reshape(*batch, -1)
            feedback = check_feedback(where, feedback, (flat.shape[-1], logits.shape[-1]))
            feedback = jax.lax.stop_gradient(feedback).astype(logits.dtype)
            outs.append(flat.astype(logits.dtype) @ feedback)
        return add_tangents(logits, *outs)


class Alignment(NamedTuple):
    """How two arrays lie to each other.

    Attributes:
      angle: between them as vectors, in degrees: 0 is aligned, 90 orthogonal.
      ratio: norm of the first over norm of the second.

    Examples:
      >>> import jax.numpy as jnp
      >>> from grapes_optax import Alignment
      >>> Alignment(angle=jnp.float32(90.0), ratio=jnp.float32(1.0))
      Alignment(angle=Array(90., dtype=float32), ratio=Array(1., dtype=float32))
    """

    angle: jax.Array
    ratio: jax.Array


def alignment(first: optax.Params, second: optax.Params) -> dict[str, Alignment]:
    r"""Angle and norm ratio of every leaf of one tree to the leaf of that path in another.

    .. math::
      \angle = \arccos \frac{\langle a, b \rangle}{\|a\| \|b\|}, \qquad
      \mathrm{ratio} = \frac{\|a\|}{\|b\|}

    Of feedback weights to forward weights, or of an update to the true gradient. One
    pass over the leaves: cheap enough for every epoch, and works under ``jit``.

    Args:
      first: a tree of arrays, feedback weights for instance.
      second: a tree that has a leaf of the same shape at each path of `first`.

    Returns:
      For each path of `first`, its names joined by ``/``, an :class:`Alignment`; not a
      number where an array is all zero.

    Raises:
      ValueError: if `second` has no such leaf.

    Examples:
      >>> import jax.numpy as jnp
      >>> from grapes_optax import alignment
      >>> result = alignment({"w": jnp.array([[2.0, 0.0]])}, {"w": jnp.array([[1.0, 1.0]])})
      >>> print("{:.1f} degrees, {:.3f}".format(*result["w"]))
      45.0 degrees, 1.414
    """
    others = {leaf.path: leaf.array for leaf in tree_leaves(second)}
    result = {}
    for path, a, _ in tree_leaves(first):
        if path not in others or jnp.shape(others[path]) != jnp.shape(a):
            raise ValueError(
                f"alignment: the second tree has no leaf {path_string(path)} of shape"
                f" {jnp.shape(a)}."
            )
        b = others[path]
        wide = jnp.promote_types(jnp.promote_types(a.dtype, b.dtype), jnp.float32)
        a, b = jnp.ravel(a).astype(wide), jnp.ravel(b).astype(wide)
        lengths = jnp.linalg.norm(a), jnp.linalg.norm(b)
        u, v = a / lengths[0], b / lengths[1]
        # Exact for small angles too, where the arc cosine is not.
        angle = 2 * jnp.arctan2(jnp.linalg.norm(u - v), jnp.linalg.norm(u + v))
        result[path_string(path)] = Alignment(jnp.degrees(angle), lengths[0] / lengths[1])
    return result
