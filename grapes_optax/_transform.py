"""The local form: every layer's factor times the updates of its leaves."""

from typing import Any

import jax
import numpy as np
import optax

from grapes_optax._importance import Control, Normalization, Options, scale
from grapes_optax._layers import Member, leaves_where, path_names, path_string, resolve_layers
from grapes_optax._modulation import is_propagated


def _check_form(member: Member, propagated: bool) -> None:
    if propagated:
        raise ValueError(
            f"{path_string(member.path)} has propagated GRAPES already: with scale_by_grapes its"
            " factor would act twice. Use one of the two forms."
        )


def _check(update: Any, member: Member) -> None:
    path = member.path[1:] if member.path[:1] == ("params",) else member.path
    _check_form(member, is_propagated(path_string(path)))
    if np.shape(update) != np.shape(member.array):
        raise ValueError(
            f"The update of {path_string(member.path)} has shape {np.shape(update)}, the parameter"
            f" {np.shape(member.array)}: updates and params must be trees of the same arrays."
        )


def scale_by_grapes(
    dimension_numbers: Any = None,
    *,
    gain: jax.typing.ArrayLike = 2.0,
    bounds: tuple[float, float] | None = (1.0, 2.0),
    normalization: Normalization = "max",
    control: Control | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies the updates of every node by its GRAPES factor (the local form).

    .. math::
      u_{ij} \leftarrow f_j \, u_{ij}, \qquad
      f_j = \mathrm{clip}(g \, s_j / \mathrm{normalizer}(s), \, \mathrm{low}, \, \mathrm{high}),
      \qquad s_j = \sum_i |W_{ij}|

    with the sum and the normalizer over one layer. The bias of a node gets the factor
    of its kernel. The factor is read from the parameters at every step: there is no
    state. Which leaves are modulated, and how, :func:`summary` shows.

    Do not use it on layers that have the propagated form (:func:`modulate_error`,
    ``grapes_optax.linen.propagated``, ``grapes_optax.nnx.propagated``): the factor would
    act twice.

    The output layer is not modulated in the paper. A parameter tree does not tell
    which layer that is: exclude it with ``dimension_numbers=by_path(where=...)``.

    Order matters. Before ``optax.sgd`` or momentum the factor acts on the gradient, as
    in the paper. Optimizers that divide by a running size of the gradient (RMSprop,
    Adam) cancel most of a factor that precedes them; after them it acts fully.

    Args:
      dimension_numbers: which axes of which leaf are fan-in and which are nodes: one
        :class:`DimensionNumbers` for the whole tree, a tree of them that fits the
        parameters or is a prefix of them (``None`` for what is not modulated), or a
        function from parameters to such a tree. Any object with the attributes
        ``reduction_axis`` and ``output_axis`` will do. ``None`` recognises leaves by
        name, see :func:`by_path`.
      gain: g, the factor of a node as strong as the normalizer, before clipping.
      bounds: ``(low, high)``, or ``None`` not to clip.
      normalization: ``"max"`` divides by the strongest node of the layer, ``"mean"``
        by the average one. ``gain=1.0, bounds=None, normalization="mean"`` gives
        factors that average 1: GRAPES without its effect on the learning rate.
      control: ``"mean"`` gives every node its layer's mean factor, ``"roll"`` its
        neighbour's: what these two do as well is not due to node importance.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs` with an empty state. Updates
      keep their dtype. ``update`` needs ``params``; a bias whose kernel is not among
      them (``optax.masked``, ``optax.partition``) passes through as it is.

    Raises:
      ValueError: if an option is unknown or out of range; in ``update``, before
        anything is computed, if ``params`` is missing or the description does not
        fit it.
      TypeError: in ``update``, if the description holds anything else.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from grapes_optax import scale_by_grapes
      >>> params = {"kernel": jnp.array([[1.0, -2.0, 0.0], [2.0, 2.0, 1.0]]),
      ...           "bias": jnp.zeros(3)}
      >>> grads = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
      >>> tx = optax.chain(scale_by_grapes(), optax.sgd(1.0))
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> print(updates["kernel"])
      [[-1.5 -2.  -1. ]
       [-1.5 -2.  -1. ]]
      >>> print(updates["bias"])
      [-1.5 -2.  -1. ]

    References:
      Dellaferrera et al., `Introducing principles of synaptic integration in the
      optimization of deep neural networks
      <https://doi.org/10.1038/s41467-022-29491-2>`_, 2022
    """
    options = Options(gain, bounds, normalization, control).checked()

    def init_fn(params):
        marked = leaves_where(params, lambda node: hasattr(node, "grapes_propagated"))
        if marked:
            for layer in resolve_layers(params, dimension_numbers):
                for member in layer.kernels:
                    _check_form(member, member.path in marked)
        return optax.EmptyState()

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError(
                "scale_by_grapes reads the parameters: call update(updates, state, params)."
            )
        factors = {
            member.path: (member, factor)
            for layer in resolve_layers(params, dimension_numbers)
            for member, factor in layer.factors(options)
        }

        def modulate(keys, update):
            path = path_names(keys)
            if path not in factors:
                return update
            member, factor = factors[path]
            _check(update, member)
            return scale(update, factor)

        return jax.tree_util.tree_map_with_path(modulate, updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
