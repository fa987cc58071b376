"""The dynamics of spiking neural units, and rate-coded inputs for them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

__all__ = ["rate_code", "spike", "step"]

Carry = tuple[jax.Array, jax.Array]


@jax.custom_jvp
def spike(z: jax.Array) -> jax.Array:
    r"""Step function with the derivative of tanh.

    .. math::
      h(z) = [z > 0], \qquad h'(z) \leftarrow 1 - \tanh^2 z

    Args:
      z: array of any shape.

    Returns:
      Zeros and ones, of the type of z.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from grapes_optax.spiking import spike
      >>> spike(jnp.array([-1.0, 0.0, 2.0]))
      Array([0., 0., 1.], dtype=float32)
      >>> print(jax.grad(spike)(0.0))
      1.0

    References:
      Woźniak et al., `Deep learning incorporating biologically inspired neural dynamics and
      in-memory computing <https://doi.org/10.1038/s42256-020-0187-0>`_, 2020
    """
    return jnp.heaviside(z, 0.0)


@spike.defjvp
def _pseudo_derivative(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (z,), (dz,) = primals, tangents
    return spike(z), (1 - jnp.tanh(z) ** 2) * dz


def check_units(features: int, decay: float) -> None:
    """Refuses a layer without units, and a decay that is none."""
    if isinstance(features, bool) or not isinstance(features, int | np.integer) or features < 1:
        raise ValueError(f"SNU: features, the number of units, must be positive; got {features!r}.")
    if not isinstance(decay, Tracer) and not 0 <= decay <= 1:
        raise ValueError(
            f"SNU: decay, what is left of the potential, must be in [0, 1]; got {decay}."
        )


def step(
    carry: Carry,
    z: jax.Array,
    bias: jax.Array,
    decay: float,
    activation: Callable[[jax.Array], jax.Array],
    output: Callable[[jax.Array], jax.Array],
) -> tuple[Carry, jax.Array]:
    r"""One step of spiking neural units, of which ``SNU`` of linen and of nnx are made.

    .. math::
      s_t = g(z_t + d \, s_{t-1} (1 - y_{t-1})), \qquad y_t = h(s_t + b)

    Args:
      carry: potentials s and outputs y, of shape (..., units).
      z: pre-activations, weighted inputs and outputs of the step before.
      bias: b, of shape (units,).
      decay: d.
      activation: g.
      output: h.

    Returns:
      The carry and the output of the step.

    Raises:
      ValueError: for a bias that does not broadcast to the units.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from grapes_optax.spiking import spike, step
      >>> rest, z, bias = jnp.zeros(2), jnp.array([0.5, 1.5]), -jnp.ones(2)
      >>> (s, y), _ = step((rest, rest), z, bias, 0.8, jax.nn.relu, spike)
      >>> print(s, y)
      [0.5 1.5] [0. 1.]

    References:
      Woźniak et al., `Deep learning incorporating biologically inspired neural dynamics and
      in-memory computing <https://doi.org/10.1038/s42256-020-0187-0>`_, 2020
    """
    s, y = carry
    s = activation(z + decay * s * (1 - y))
    y = output(s + jnp.broadcast_to(bias.astype(s.dtype), s.shape))
    return (s, y), y


def rate_code(
    key: jax.Array, images: jax.typing.ArrayLike, steps: int = 20, rate: float = 6 / 20
) -> jax.Array:
    r"""Spike trains whose rates are the pixels of images.

    .. math::
      x_{t,p} \sim \mathrm{Bernoulli}(\mathrm{rate} \cdot \mathrm{pixel}_p), \quad t = 1 \dots T

    Draw them anew in every batch, with a key of its own.

    Args:
      key: a key of ``jax.random``.
      images: pixels in [0, 1], floats of shape (..., pixels).
      steps: T.
      rate: probability of a spike, in every step, where the pixel is 1.

    Returns:
      Zeros and ones of shape (..., steps, pixels), the type of the images: what ``nn.RNN``
      takes by default.

    Raises:
      TypeError: if the images are not floats.
      ValueError: if `steps` or `rate` is out of range, or if a pixel is outside [0, 1].
        What is traced, by ``jax.jit`` for instance, has no values to look at: there pixels
        below count as 0, and probabilities above 1 as 1.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from grapes_optax.spiking import rate_code
      >>> spikes = rate_code(jax.random.key(0), jnp.array([[0.0, 0.5, 1.0]]), steps=1000)
      >>> spikes.shape
      (1, 1000, 3)
      >>> (spikes.sum(axis=1) / 10).round()  # percent
      Array([[ 0., 15., 31.]], dtype=float32)

    References:
      Woźniak et al., `Deep learning incorporating biologically inspired neural dynamics and
      in-memory computing <https://doi.org/10.1038/s42256-020-0187-0>`_, 2020
    """
    if not isinstance(images, np.ndarray | jax.Array | list | tuple | float | np.number):
        raise TypeError(f"images must be an array, got {images!r}.")
    pixels = jnp.asarray(images)
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or steps < 1:
        raise ValueError(f"steps must be a positive int, got {steps!r}.")
    if not isinstance(rate, int | float | np.number | jax.Array) or np.ndim(rate):
        raise TypeError(f"rate must be a number, got {rate!r}.")
    if not isinstance(rate, Tracer) and not 0 <= rate <= 1:
        raise ValueError(f"rate must be a probability in [0, 1], got {rate}.")
    if not jnp.issubdtype(pixels.dtype, jnp.floating):
        raise TypeError(f"images must be floats, got {pixels.dtype}: divide them by their maximum.")
    if not pixels.ndim:
        raise ValueError("images must have an axis of pixels, the last.")
    if not isinstance(pixels, Tracer) and not ((pixels >= 0) & (pixels <= 1)).all():
        raise ValueError("Rate coding takes pixels in [0, 1]: divide the images by their maximum.")
    shape = (*pixels.shape[:-1], steps, pixels.shape[-1])
    # Drawn in a wide type: the uniform numbers of bfloat16 are multiples of 1/128.
    wide = jnp.promote_types(pixels.dtype, jnp.float32)
    probabilities = jnp.asarray(rate, wide) * pixels[..., None, :].astype(wide)
    return jax.random.bernoulli(key, probabilities, shape).astype(pixels.dtype)
