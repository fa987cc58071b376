"""Spiking neural units as recurrent cells of Flax linen, and rate-coded inputs for them."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


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


class SNU(nn.RNNCellBase):
    r"""Spiking neural unit: a leaky integrator that is reset by its own spike.

    .. math::
      s_t = g(x_t W + y_{t-1} H + d \, s_{t-1} (1 - y_{t-1})), \qquad y_t = h(s_t + b)

    s is the membrane potential, y the output, and -b the threshold. To be driven by
    ``nn.RNN``; the submodules ``i`` and ``h`` hold W and H, whose sum is one pre-activation
    of GRAPES. b is added behind g, not to the pre-activation: it is no bias of that layer,
    and both forms of GRAPES leave it alone. Gradients pass through the reset.

    Args:
      features: number of units.
      recurrent: whether there is H.
      decay: d, what is left of the potential after a step.
      activation: g; the authors also use a leaky ReLU.
      output: h.
      kernel_init: of W.
      recurrent_kernel_init: of H.
      bias_init: of b.
      dtype: type of the computation; ``None`` infers it from inputs and parameters.
      param_dtype: type of the parameters.

    Returns:
      A cell: ``((s, y), x) -> ((s, y), y)`` with x of shape (..., inputs) and s and y of
      shape (..., features).

    Examples:
      >>> import flax.linen as nn
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from grapes_optax.spiking import SNU
      >>> layer, x = nn.RNN(SNU(8)), jnp.ones((2, 20, 4))
      >>> params = layer.init(jax.random.key(0), x)
      >>> jax.tree.map(jnp.shape, params["params"]["cell"])
      {'bias': (8,), 'h': {'kernel': (8, 8)}, 'i': {'kernel': (4, 8)}}
      >>> layer.apply(params, x).mean(axis=1).shape  # rates, over 20 steps
      (2, 8)

    References:
      Woźniak et al., `Deep learning incorporating biologically inspired neural dynamics and
      in-memory computing <https://doi.org/10.1038/s42256-020-0187-0>`_, 2020
    """

    features: int
    recurrent: bool = True
    decay: float = 0.8
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    output: Callable[[jax.Array], jax.Array] = spike
    kernel_init: nn.initializers.Initializer = nn.initializers.glorot_uniform()
    recurrent_kernel_init: nn.initializers.Initializer = nn.initializers.glorot_uniform()
    bias_init: nn.initializers.Initializer = nn.initializers.constant(-1.0)
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, carry: tuple[jax.Array, jax.Array], inputs: jax.Array) -> Any:
        """One step of time."""
        s, y = carry
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = functools.partial(nn.Dense, self.features, use_bias=False, **types)
        z = dense(kernel_init=self.kernel_init, name="i")(inputs)
        if self.recurrent:
            z = z + dense(kernel_init=self.recurrent_kernel_init, name="h")(y)
        s = self.activation(z + self.decay * s * (1 - y))
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        y = self.output(s + jnp.broadcast_to(bias.astype(s.dtype), s.shape))
        return (s, y), y

    @nn.nowrap
    def initialize_carry(
        self, rng: jax.Array, input_shape: tuple[int, ...]
    ) -> tuple[jax.Array, jax.Array]:
        """At rest: no potential, and no spike before."""
        del rng
        rest = jnp.zeros((*input_shape[:-1], self.features), self.dtype or self.param_dtype)
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
      features: number of units; the other fields are those of :class:`SNU`.

    Returns:
      A cell, as :class:`SNU`.

    Examples:
      >>> import flax.linen as nn
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from grapes_optax.spiking import SoftSNU
      >>> layer, x = nn.RNN(SoftSNU(8, recurrent=False)), jnp.ones((2, 20, 4))
      >>> params = layer.init(jax.random.key(0), x)
      >>> layer.apply(params, x).shape
      (2, 20, 8)

    References:
      Woźniak et al., `Deep learning incorporating biologically inspired neural dynamics and
      in-memory computing <https://doi.org/10.1038/s42256-020-0187-0>`_, 2020
    """

    output: Callable[[jax.Array], jax.Array] = nn.sigmoid


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
