"""Flax linen: the learning rules for functions that call modules with ``apply``."""

from typing import Any

import flax.linen as nn
import jax

from grapes_optax._backward import Call, Forward, Framework, Seen, all_but
from grapes_optax._backward import init_feedback as init_feedback
from grapes_optax._importance import DimensionNumbers
from grapes_optax._tree import Path

__all__ = ["direct_feedback_alignment", "feedback_alignment", "init_feedback", "propagated"]


def _dense_general(module: Any, ndim: int) -> DimensionNumbers:
    batch = len(module.batch_dims)
    nodes = 1 if isinstance(module.features, int) else len(module.features)
    return DimensionNumbers(tuple(range(batch, ndim - nodes)), tuple(range(ndim - nodes, ndim)))


_LAYERS = {
    nn.Dense: all_but(-1),
    nn.DenseGeneral: _dense_general,
    nn.Conv: all_but(-1),
    nn.ConvLocal: DimensionNumbers(-2, -1),
    nn.ConvTranspose: lambda module, ndim: all_but(-2 if module.transpose_kernel else -1)(
        module, ndim
    ),
}


def _params(module: Any) -> dict[str, Any]:
    return nn.meta.unbox(dict(module.variables.get("params", {})))


def _cell(parent: Any) -> dict[Path, jax.Array]:
    """Kernels of the layers of a recurrent cell."""
    if not isinstance(parent, nn.RNNCellBase):
        return {}
    layers = {name: leaves for name, leaves in _params(parent).items() if "kernel" in leaves}
    return {(*parent.path, name, "kernel"): leaves["kernel"] for name, leaves in layers.items()}


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
        seen = Seen(path, numbers, params[name], next_fun, replaced, cell)
        return call.layer(seen, args, kwargs)

    with nn.intercept_methods(intercept):
        return forward(*args, **kwargs)


_FRAMEWORK = Framework(_see, _LAYERS)
propagated = _FRAMEWORK.propagated
feedback_alignment = _FRAMEWORK.feedback_alignment
direct_feedback_alignment = _FRAMEWORK.direct_feedback_alignment
