"""Fan-in, nodes, stacks, groups and gates, read from the program that uses the parameters.

An abstract interpretation of the jaxpr. A value is data, or the weights of a leaf, or a
pre-activation; the axes of the latter two are followed through all that moves them. What
the program leaves open is reported and left alone: nothing is guessed.
"""

import difflib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from grapes_optax._importance import DimensionNumbers
from grapes_optax._layers import resolve_layers
from grapes_optax._program.flat import Program
from grapes_optax._program.layers import described
from grapes_optax._program.rules import read
from grapes_optax._tree import Leaf, path_names, path_string
from grapes_optax._warn import warn


def _branches(leaf: Leaf) -> list[str]:
    """The path of a leaf, and those of the branches that hold it, from the closest on."""
    return ["/".join(leaf.path[:n]) for n in range(len(leaf.path), -1, -1)]


def _hints(name: str, given: Mapping[str, Any], leaves: Sequence[Leaf]) -> dict[int, Any]:
    """What the user says of each leaf, or else of the closest branch."""
    known = sorted({path for leaf in leaves for path in _branches(leaf)})
    for path in given.keys() - set(known):
        near = difflib.get_close_matches(path, known, 1)
        meant = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name} names {path!r}, where params have no leaf.{meant}")
    closest = [[path for path in _branches(leaf) if path in given] for leaf in leaves]
    return {leaf: given[paths[0]] for leaf, paths in enumerate(closest) if paths}


def _traced(apply_fn: Callable[..., Any], params: optax.Params, inputs: Any, count: int) -> Program:
    leaves, structure = jax.tree.flatten(inputs)
    is_array = [hasattr(leaf, "shape") for leaf in leaves]

    def results(params, arrays):
        arrays = iter(arrays)  # What is no array stays as it is: the function may branch on it.
        given = [next(arrays) if i else leaf for i, leaf in zip(is_array, leaves, strict=True)]
        returned = apply_fn(params, *jax.tree.unflatten(structure, given))
        return [leaf for leaf in jax.tree.leaves(returned) if hasattr(leaf, "shape")]

    return Program(
        jax.make_jaxpr(results)(params, list(itertools.compress(leaves, is_array))), count
    )


def infer_dimension_numbers(
    apply_fn: Callable[..., Any],
    params: optax.Params,
    *inputs: Any,
    gates: Mapping[str, int] | None = None,
    stack: Mapping[str, int | Sequence[int]] | None = None,
    where: Callable[[str], bool] | None = None,
) -> Any:
    """Describes the leaves of a parameter tree by what a program does with them.

    The program is traced once, outside of training, and says for any framework and any
    pure function which axes of a kernel are contracted (fan-in), which stay (nodes) and
    which are mapped or scanned over (stack), which kernels are summed into one
    pre-activation, which parameters are added to it (biases), and into how many gates
    the sum of several kernels is cut. Embeddings, norms and what is only added or
    multiplied are left alone, and so is, with a warning, what the program does not
    settle.

    Two things are not in the program: that the nodes of a *single* kernel are the gates
    of a cell (Haiku's LSTM), and that an axis of a kernel is an ensemble mapped over by
    ``jax.vmap`` while the input is not. The user says these with `gates` and `stack`.

    Args:
      apply_fn: the forward pass, a pure function of the parameters and the inputs, such
        as ``model.apply``. (One that takes gradients uses the kernels in two ways.)
      params: the parameters, arrays or ``jax.ShapeDtypeStruct``.
      *inputs: inputs of the function, the same; other values, flags for instance,
        are handed on as they are.
      gates: number of gates of the kernels at a path, or of all in a branch (its names
        joined by ``/``), instead of that read from the program.
      stack: axis or axes, of each kernel and bias at a path or in a branch, that hold
        independent layers and not nodes.
      where: as in :func:`by_path`.

    Returns:
      A tree of the structure of `params` that holds a :class:`DimensionNumbers` for each
      leaf to modulate and ``None`` for the others, to be passed to
      :func:`scale_by_grapes`. One ``UserWarning`` names the leaves that may be kernels
      and are not settled, with the reason.

    Raises:
      ValueError: if `gates` or `stack` name a path without a kernel, an axis that does
        not exist or is fan-in, or a number of gates that does not divide the nodes.
      TypeError: if a leaf of `params` is not an array (of Equinox: partition the model,
        and combine it in `apply_fn`).

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from grapes_optax import infer_dimension_numbers
      >>> def cell(params, x, h):
      ...     z = x @ params["w"] + params["u"] @ h + params["b"]
      ...     return jnp.tanh(z)
      >>> params = {"w": jnp.ones((5, 7)), "u": jnp.ones((7, 7)), "b": jnp.zeros(7)}
      >>> description = infer_dimension_numbers(cell, params, jnp.ones(5), jnp.ones(7))
      >>> description["u"]
      DimensionNumbers(reduction_axis=(1,), output_axis=(0,), group='u', gates=1)
      >>> description["w"]
      DimensionNumbers(reduction_axis=(0,), output_axis=(1,), group='u', gates=1)
      >>> description["b"]
      DimensionNumbers(reduction_axis=(), output_axis=(0,), group='u', gates=1)

    References:
      Dellaferrera et al., `Introducing principles of synaptic integration in the
      optimization of deep neural networks
      <https://doi.org/10.1038/s41467-022-29491-2>`_, 2022
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(params)
    leaves = [Leaf(path_names(keys), array, "") for keys, array in flat]
    for leaf in leaves:
        if not hasattr(leaf.array, "shape"):
            raise TypeError(
                f"params hold {leaf.array!r} at {path_string(leaf.path)}: pass arrays alone, and"
                " let apply_fn combine them with the rest (eqx.partition, eqx.combine)."
            )
    gates, stack = gates or {}, stack or {}
    hints = _hints("gates", gates, leaves), _hints("stack", stack, leaves)
    reader = read(_traced(apply_fn, params, inputs, len(leaves)), leaves)
    layers = described(reader, *hints)
    settled = {leaf: numbers for layer in layers for leaf, numbers in layer.items()}
    kernels = [leaf for leaf, numbers in settled.items() if numbers.reduction_axis]
    for name, given, heeded in ("gates", gates, kernels), ("stack", stack, settled):
        paths = {path for leaf in heeded for path in _branches(leaves[leaf])}
        for path in given.keys() - paths:
            raise ValueError(f"{name} names {path!r}, where the program settles no layer.")

    result: list[DimensionNumbers | None] = [None] * len(leaves)
    wanted = [where is None or where(path_string(leaf.path)) for leaf in leaves]
    for layer in layers:
        members = [leaf for leaf in layer if wanted[leaf]]
        first = next((leaf for leaf in members if leaf in kernels), None)
        if first is not None:
            for leaf in members:
                result[leaf] = layer[leaf]._replace(group=path_string(leaves[first].path))
    unsettled = [
        f"{path_string(leaf.path)} {np.shape(leaf.array)}: {reader.reasons[number]}"
        for number, leaf in enumerate(leaves)
        if number in reader.reasons and wanted[number]
    ]
    if unsettled:
        listed = "; ".join(unsettled[:8] + ["..."] * (len(unsettled) > 8))
        warn(f"GRAPES leaves alone what the program does not settle: {listed}.")
    description = jax.tree.unflatten(structure, result)
    if any(result):
        resolve_layers(params, description)
    return description
