"""Flax linen: the learning rules for functions that call modules with ``apply``."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from grapes_optax._backward import Call, Forward, Framework, Seen, all_but
from grapes_optax._backward import init_feedback as init_feedback
from grapes_optax._importance import DimensionNumbers
from grapes_optax._spiking import Carry, check_units, spike, step
from grapes_optax._tree import Path

__all__ = [
    "SNU",
    "SoftSNU",
    "direct_feedback_alignment",
    "feedback_alignment",
    "init_feedback",
    "propagated",
]


def _dense_general(module: Any, ndim: int) -> DimensionNumbers:
    batch = len(module.batch_dims)
    nodes = 1 if isinstance(module.features, int) else len(module.features)
    return DimensionNumbers(tuple(range(batch, ndim - nodes)), tuple(range(ndim - nodes, ndim)))


def _conv_transpose(module: Any, ndim: int) -> DimensionNumbers:
    return all_but(-2 if module.transpose_kernel else -1)(module, ndim)


_LAYERS = {
    nn.Dense: all_but(-1),
    nn.DenseGeneral: _dense_general,
    nn.Conv: all_but(-1),
    nn.ConvLocal: DimensionNumbers(-2, -1),
    nn.ConvTranspose: _conv_transpose,
}


def _params(module: Any) -> dict[str, Any]:
    return nn.meta.unbox(dict(module.variables.get("params", {})))


def _cell(parent: Any) -> dict[Path, jax.Array]:
    """Kernels of the layers of a recurrent cell."""
    if not isinstance(parent, nn.RNNCellBase):
        return {}
    return {
        (*parent.path, name, "kernel"): leaves["kernel"]
        for name, leaves in _params(parent).items()
        if isinstance(leaves, Mapping) and "kernel" in leaves
    }


def _see(call: Call, forward: Forward, args: Any, kwargs: Any) -> Any:
    def intercept(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if module.is_initializing() or context.method_name == "setup" or not call.in_flight():
            return next_fun(*args, **kwargs)
        params = _params(module)
        layer = call.kernel(module, type(module), module.path, params)
        if layer is None or context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        name, numbers = layer

        def replaced(kernel: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
            """The module with another kernel, for no interceptor to see."""
            variables = jax.lax.stop_gradient(nn.meta.unbox(dict(module.variables)))
            variables["params"] = variables["params"] | {name: kernel}
            alone = module.clone(parent=None, name=None)
            with call.aside():
                return alone.apply(variables, *args, **kwargs)

        path, cell = (*module.path, name), _cell(module.parent)
        leading = {nn.DenseGeneral: True, nn.ConvLocal: False}.get(call.base(type(module)))
        kernel, mask = params[name], getattr(module, "mask", None)
        kernel = kernel if mask is None else kernel * mask
        seen = Seen(path, numbers, kernel, next_fun, replaced, cell, leading=leading)
        return call.layer(seen, args, kwargs)

    with nn.intercept_methods(intercept):
        return forward(*args, **kwargs)


_FRAMEWORK = Framework(_see, _LAYERS)
propagated = _FRAMEWORK.propagated
feedback_alignment = _FRAMEWORK.feedback_alignment
direct_feedback_alignment = _FRAMEWORK.direct_feedback_alignment


# Spiking neural units.


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
      >>> from grapes_optax.linen import SNU
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

    def __post_init__(self) -> None:
        """Checks the units and their decay."""
        check_units(self.features, self.decay)
        super().__post_init__()

    @nn.compact
    def __call__(self, carry: Carry, inputs: jax.Array) -> tuple[Carry, jax.Array]:
        """One step of time."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = functools.partial(nn.Dense, self.features, use_bias=False, **types)
        z = dense(kernel_init=self.kernel_init, name="i")(inputs)
        if self.recurrent:
            z = z + dense(kernel_init=self.recurrent_kernel_init, name="h")(carry[1])
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        return step(carry, z, bias, self.decay, self.activation, self.output)

    @nn.nowrap
    def initialize_carry(self, rng: jax.Array, input_shape: tuple[int, ...]) -> Carry:
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
      >>> from grapes_optax.linen import SoftSNU
      >>> layer, x = nn.RNN(SoftSNU(8, recurrent=False)), jnp.ones((2, 20, 4))
      >>> params = layer.init(jax.random.key(0), x)
      >>> layer.apply(params, x).shape
      (2, 20, 8)

    References:
      Woźniak et al., `Deep learning incorporating biologically inspired neural dynamics and
      in-memory computing <https://doi.org/10.1038/s42256-020-0187-0>`_, 2020
    """

    output: Callable[[jax.Array], jax.Array] = nn.sigmoid
