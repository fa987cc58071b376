"""Feedback alignment and its kin as derivative rules of any bilinear operation.

All of them are made of one identity, `add_tangents`: where the forward pass computes
one thing, the derivative is taken of another. Under `jit` the value of that other thing
is never computed.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from grapes_optax._mesh import check_whole
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


# The kernel that carries the error back, from the forward kernel and the feedback weights.
BACKWARD_KERNELS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "fixed": lambda kernel, feedback: feedback,
    "kolen_pollack": lambda kernel, feedback: feedback,
    "uniform_sign": lambda kernel, feedback: (
        jnp.sign(kernel) * jnp.sqrt(jnp.mean(jnp.square(feedback)))
    ),
    "fixed_sign": lambda kernel, feedback: jnp.sign(kernel) * jnp.abs(feedback),
}


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


def _direction(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A vector of length 1, and the length as a number times a power of two.

    Squares of very small and very large entries would be beyond the type.
    """
    _, exponent = jnp.frexp(jnp.max(jnp.abs(x), initial=0.0))
    x = jnp.ldexp(x, -exponent)
    length = jnp.linalg.norm(x)
    return x / length, length, exponent


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

    References:
      Lillicrap et al., `Random synaptic feedback weights support error backpropagation for
      deep learning <https://doi.org/10.1038/ncomms13276>`_, 2016
    """
    others = {path_string(leaf.path): leaf.array for leaf in tree_leaves(second)}
    result = {}
    for leaf in tree_leaves(first):
        path, a = path_string(leaf.path), leaf.array
        if path not in others or jnp.shape(others[path]) != jnp.shape(a):
            raise ValueError(
                f"alignment: the second tree has no leaf {path} of shape {jnp.shape(a)}."
            )
        a, b = jnp.asarray(a), jnp.asarray(others[path])
        check_whole(a)
        wide = jnp.promote_types(jnp.promote_types(a.dtype, b.dtype), jnp.float32)
        (u, length, exponent), (v, other, of_other) = (
            _direction(jnp.ravel(x).astype(wide)) for x in (a, b)
        )
        ratio = jnp.ldexp(length / other, exponent - of_other)
        # Exact for small angles too, where the arc cosine is not.
        angle = 2 * jnp.arctan2(jnp.linalg.norm(u - v), jnp.linalg.norm(u + v))
        result[path] = Alignment(jnp.degrees(angle), ratio)
    return result
