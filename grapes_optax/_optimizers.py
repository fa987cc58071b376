"""Aliases: an optimizer of Optax with GRAPES before or after it."""

from typing import Any, Literal

import jax
import optax

from grapes_optax._importance import Control, Normalization, WeightDimNumOrFn
from grapes_optax._transform import scale_by_grapes

Modulate = Literal["gradients", "updates"]


def _modulated(
    optimizer: optax.GradientTransformation, modulate: str, **options: Any
) -> optax.GradientTransformationExtraArgs:
    orders = {
        "gradients": (scale_by_grapes(**options), optimizer),
        "updates": (optimizer, scale_by_grapes(**options)),
    }
    if modulate not in list(orders):
        raise ValueError(f"Unknown modulate {modulate!r}: choose one of {list(orders)}.")
    return optax.chain(*orders[modulate])


def grapes_sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: jax.typing.ArrayLike | None = None,
    nesterov: bool = False,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
    *,
    weight_dimension_numbers: WeightDimNumOrFn = None,
    gain: jax.typing.ArrayLike = 2.0,
    bounds: tuple[float, float] | None = (1.0, 2.0),
    normalization: Normalization = "max",
    control: Control | None = None,
    modulate: Modulate = "gradients",
) -> optax.GradientTransformationExtraArgs:
    r"""Stochastic gradient descent with GRAPES: ``optax.sgd`` on modulated gradients.

    .. math::
      m_t = f_t \odot g_t + \mu m_{t-1}, \qquad w_{t+1} = w_t - \alpha_t m_t

    with the factor f of :func:`scale_by_grapes`, and Nesterov's form as in Optax.

    Args:
      learning_rate: as in ``optax.sgd``.
      momentum: as in ``optax.sgd``.
      nesterov: as in ``optax.sgd``.
      accumulator_dtype: as in ``optax.sgd``.
      weight_dimension_numbers: as in :func:`scale_by_grapes`. Under
        ``optax.inject_hyperparams`` a function must be named in ``static_args``.
      gain: as in :func:`scale_by_grapes`.
      bounds: as in :func:`scale_by_grapes`.
      normalization: as in :func:`scale_by_grapes`.
      control: as in :func:`scale_by_grapes`.
      modulate: ``"gradients"`` puts the factor before the optimizer, as the paper
        does, ``"updates"`` after it.

    Returns:
      The corresponding :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: as in :func:`scale_by_grapes`, and for an unknown ``modulate``.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from grapes_optax import grapes_sgd
      >>> loss = lambda params: jnp.sum((params["kernel"] - 1.0) ** 2)
      >>> params = {"kernel": jnp.array([[0.0, 3.0], [0.0, 3.0]])}
      >>> tx = grapes_sgd(0.1)
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     print(f"{loss(params):.3f}")
      4.160
      1.856
      0.898

    References:
      Dellaferrera et al., `Introducing principles of synaptic integration in the
      optimization of deep neural networks
      <https://doi.org/10.1038/s41467-022-29491-2>`_, 2022
    """
    return _modulated(
        optax.sgd(learning_rate, momentum, nesterov, accumulator_dtype),
        modulate,
        weight_dimension_numbers=weight_dimension_numbers,
        gain=gain,
        bounds=bounds,
        normalization=normalization,
        control=control,
    )


def grapes_rmsprop(
    learning_rate: optax.ScalarOrSchedule,
    decay: jax.typing.ArrayLike = 0.9,
    eps: jax.typing.ArrayLike = 1e-8,
    initial_scale: jax.typing.ArrayLike = 0.0,
    eps_in_sqrt: bool = True,
    centered: bool = False,
    momentum: jax.typing.ArrayLike | None = None,
    nesterov: bool = False,
    bias_correction: bool = False,
    *,
    weight_dimension_numbers: WeightDimNumOrFn = None,
    gain: jax.typing.ArrayLike = 2.0,
    bounds: tuple[float, float] | None = (1.0, 2.0),
    normalization: Normalization = "max",
    control: Control | None = None,
    modulate: Modulate = "gradients",
) -> optax.GradientTransformationExtraArgs:
    r"""RMSprop with GRAPES: ``optax.rmsprop`` on modulated gradients.

    .. math::
      v_t = \rho v_{t-1} + (1 - \rho) (f_t \odot g_t)^2, \qquad
      w_{t+1} = w_t - \alpha_t \, f_t \odot g_t / \sqrt{v_t + \epsilon}

    with the factor f of :func:`scale_by_grapes`. RMSprop divides by a running size of
    the gradient, so that a factor that changes slowly almost cancels;
    ``modulate="updates"`` applies it after the division, where it acts fully.

    Args:
      learning_rate: as in ``optax.rmsprop``.
      decay: as in ``optax.rmsprop``.
      eps: as in ``optax.rmsprop``.
      initial_scale: as in ``optax.rmsprop``.
      eps_in_sqrt: as in ``optax.rmsprop``.
      centered: as in ``optax.rmsprop``.
      momentum: as in ``optax.rmsprop``.
      nesterov: as in ``optax.rmsprop``.
      bias_correction: as in ``optax.rmsprop``.
      weight_dimension_numbers: as in :func:`scale_by_grapes`. Under
        ``optax.inject_hyperparams`` a function must be named in ``static_args``.
      gain: as in :func:`scale_by_grapes`.
      bounds: as in :func:`scale_by_grapes`.
      normalization: as in :func:`scale_by_grapes`.
      control: as in :func:`scale_by_grapes`.
      modulate: ``"gradients"`` puts the factor before the optimizer, as the paper
        does, ``"updates"`` after it.

    Returns:
      The corresponding :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: as in :func:`scale_by_grapes`, and for an unknown ``modulate``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from grapes_optax import grapes_rmsprop
      >>> params = {"kernel": jnp.array([[1.0, -2.0], [0.5, 2.0]])}
      >>> grads = {"kernel": jnp.ones((2, 2))}
      >>> for modulate in "gradients", "updates":
      ...     tx = grapes_rmsprop(0.1, decay=0.5, modulate=modulate)
      ...     updates, _ = tx.update(grads, tx.init(params), params)
      ...     print("{:.3f} {:.3f}".format(*updates["kernel"][0]))
      -0.141 -0.141
      -0.141 -0.283

    References:
      Dellaferrera et al., `Introducing principles of synaptic integration in the
      optimization of deep neural networks
      <https://doi.org/10.1038/s41467-022-29491-2>`_, 2022
    """
    return _modulated(
        optax.rmsprop(
            learning_rate,
            decay,
            eps,
            initial_scale,
            eps_in_sqrt,
            centered,
            momentum,
            nesterov,
            bias_correction,
        ),
        modulate,
        weight_dimension_numbers=weight_dimension_numbers,
        gain=gain,
        bounds=bounds,
        normalization=normalization,
        control=control,
    )
