"""The local form: every layer's factor times the updates of its leaves."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from grapes_optax._importance import (
    Axes,
    Control,
    Normalization,
    Options,
    WeightDimNumOrFn,
    equal_steps,
    layer_factor,
    scale,
    scale_nodes,
)
from grapes_optax._layers import resolve_layers
from grapes_optax._tree import holes, path_names, path_string, tree_leaves, tree_shapes


def _check_fit(updates: optax.Updates, params: optax.Params) -> None:
    """Refuses updates and parameters that are not trees of the same arrays."""
    given, wanted, missing = tree_shapes(updates), tree_shapes(params), holes(updates)
    for path in given | wanted:
        left_out = path not in given and any(path[:n] in missing for n in range(len(path) + 1))
        if given.get(path) != wanted.get(path) and not left_out:
            shapes = (tree.get(path, "missing") for tree in (given, wanted))
            raise ValueError(
                "updates and params must be trees of the same arrays: {} has the shape {} among the"
                " updates, and {} among the parameters.".format(path_string(path), *shapes)
            )


def scale_by_grapes(
    weight_dimension_numbers: WeightDimNumOrFn = None,
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

    Choose one form for a layer: with the propagated form as well (:func:`modulate_error`,
    ``grapes_optax.linen.propagated`` and its kin), its factor acts twice.

    The output layer is not modulated in the paper. A parameter tree does not tell
    which layer that is: :func:`infer_dimension_numbers` finds it in the program, or exclude
    it with ``weight_dimension_numbers=by_path(where=...)``.

    Order matters. Before ``optax.sgd`` or momentum the factor acts on the gradient, as
    in the paper. Optimizers that divide by a running size of the gradient (RMSprop,
    Adam) cancel most of a factor that precedes them; after them it acts fully.

    Args:
      weight_dimension_numbers: which axes of which leaf are fan-in and which are nodes: one
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
      control: ``"mean"`` gives every node its layer's mean factor, ``"norm"`` the one that
        makes the layer's update as long as that of GRAPES, ``"roll"`` its neighbour's factor,
        ``"reverse"`` the strongest node that of the weakest and so on: what these do as well
        is not due to node importance.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs` with an empty state. Updates
      keep their dtype (arrays of NumPy become those of JAX). ``update`` needs ``params``;
      a bias whose kernel is not among them (``optax.masked``, ``optax.partition``) passes
      through as it is, which ``init`` tells by a ``UserWarning``.

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
    options = Options(gain, bounds, normalization, control).checked(updates=True)

    def init_fn(params):
        resolve_layers(params, weight_dimension_numbers)  # what is wrong is said here
        return optax.EmptyState()

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError(
                "scale_by_grapes reads the parameters: call update(updates, state, params)."
            )
        _check_fit(updates, params)
        arrays = {leaf.path: leaf.array for leaf in tree_leaves(updates)}
        factors = {}
        for layer in resolve_layers(params, weight_dimension_numbers, quiet=True).layers:
            members = [(m, factor) for m, factor in layer.factors(options) if m.path in arrays]
            found = [factor for _, factor in members]
            if control == "norm" and members:
                of_layer = [(jnp.asarray(arrays[m.path]), m.axes, factor) for m, factor in members]
                found = equal_steps(of_layer)
            for (member, _), factor in zip(members, found, strict=True):
                factors[member.path] = factor, member.axes

        def modulate(keys, update):
            path = path_names(keys)
            return scale_nodes(update, *factors[path]) if path in factors else update

        return jax.tree_util.tree_map_with_path(modulate, updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def scale_by_outgoing_importance(
    layers: Sequence[str],
    *,
    gain: jax.typing.ArrayLike = 2.0,
    bounds: tuple[float, float] | None = None,
    normalization: Normalization = "max",
    control: Control | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Multiplies updates by the *outgoing* importance of node and input.

    .. math::
      u^l_{ij} \leftarrow c^l_i \, c^{l+1}_j \, u^l_{ij}, \qquad
      c^l_i = g \sum_k |W^l_{ik}| / \max_{i'} \sum_k |W^l_{i'k}|

    The form that the authors of GRAPES use with direct feedback alignment: c is 1 for
    the output layer, and the first and the output layer are not modulated. With ordinary
    GRAPES direct feedback alignment takes :func:`scale_by_grapes` instead.

    Args:
      layers: paths of the dense kernels, (inputs, nodes), from the input to the output;
        ``"Dense_0/kernel"`` for instance.
      gain: g.
      bounds: ``(low, high)``, or ``None`` (the authors' choice) not to clip.
      normalization: as in :func:`scale_by_grapes`.
      control: as in :func:`importance_factor`, of the factors of each layer.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs` with an empty state; biases and
      other leaves pass through.

    Raises:
      ValueError: for fewer than two layers or an option out of range; in ``update``, if
        ``params`` is missing, has no such kernel, or its kernels do not follow each other.

    Examples:
      >>> import jax.numpy as jnp
      >>> from grapes_optax import scale_by_outgoing_importance
      >>> params = {name: jnp.array([[1.0, 0.0], [1.0, 1.0]]) for name in "abcd"}
      >>> tx = scale_by_outgoing_importance(["a", "b", "c", "d"])
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> print(updates["b"])
      [[1. 0.]
       [2. 4.]]
      >>> print(updates["a"])
      [[1. 0.]
       [1. 1.]]

    References:
      Dellaferrera et al., `Introducing principles of synaptic integration in the
      optimization of deep neural networks
      <https://doi.org/10.1038/s41467-022-29491-2>`_, 2022
    """
    options = Options(gain, bounds, normalization, control).checked()
    if not isinstance(layers, Sequence) or not all(isinstance(path, str) for path in layers):
        raise TypeError(f"layers must be a sequence of paths, got {layers!r}.")
    if isinstance(layers, str) or len(layers) < 2:
        raise ValueError(
            "layers must be the paths of two kernels or more, from input to output; got"
            f" {layers!r}."
        )
    for path in layers:
        if layers.count(path) > 1:
            raise ValueError(f"layers names {path} twice.")

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError(
                "scale_by_outgoing_importance reads the parameters: call update(updates, state,"
                " params)."
            )
        _check_fit(updates, params)
        kernels = {path_string(leaf.path): leaf.array for leaf in tree_leaves(params)}
        for path in layers:
            if np.ndim(kernels.get(path, 0)) != 2:
                raise ValueError(
                    f"layers: {path} is no dense kernel among the parameters: there are"
                    f" {', '.join(path for path in kernels if np.ndim(kernels[path]) == 2)}."
                )
        for one, next_ in itertools.pairwise(layers):
            nodes, inputs = kernels[one].shape[1], kernels[next_].shape[0]
            if nodes != inputs:
                raise ValueError(
                    f"layers: the {nodes} nodes of {one} are not the {inputs} inputs of {next_}."
                )
        chain = [kernels[path] for path in layers]
        outgoing = Axes(reduction=(1,), output=(0,), stack=())
        factors = [layer_factor([kernel], [outgoing], options) for kernel in chain[:-1]]
        wide = max((factor.dtype for factor in factors), key=lambda dtype: dtype.itemsize)
        factors = [factor.astype(wide) for factor in factors]
        factors.append(jnp.ones(chain[-1].shape[0], factors[0].dtype))
        products = {
            path: factors[i + 1][:, None] * factors[i + 2][None]
            for i, path in enumerate(layers[1:-1])
        }

        def modulate(keys, update):
            path = path_string(path_names(keys))
            return scale(update, products[path]) if path in products else update

        return jax.tree_util.tree_map_with_path(modulate, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)
