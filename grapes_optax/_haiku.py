"""Haiku: the learning rules for functions that call transformed functions with ``apply``."""

from typing import Any

import haiku as hk
import jax

from grapes_optax._backward import Call, Forward, Framework, Seen, all_but
from grapes_optax._backward import init_feedback as init_feedback

__all__ = ["direct_feedback_alignment", "feedback_alignment", "init_feedback", "propagated"]

_LAYERS = {
    hk.Linear: all_but(-1),
    hk.ConvND: all_but(-1),
    hk.ConvNDTranspose: all_but(-2),
    hk.DepthwiseConv1D: all_but(-1),
    hk.DepthwiseConv2D: all_but(-1),
    hk.DepthwiseConv3D: all_but(-1),
}


def _see(call: Call, forward: Forward, args: Any, kwargs: Any) -> Any:
    outermost: set[str] = set()  # names of all parameters, as the caller knows them
    called: list[str] = []

    def prefix() -> str:
        """Of the names within a lifted function, the body of a layer_stack for instance."""
        names = {
            f"{module}/{name}" for module, leaves in hk.get_params().items() for name in leaves
        }
        outermost.update(() if called else names)
        lifted = (f"{name}/" for name in reversed(called))
        fitting = (p for p in lifted if all(p + name in outermost for name in names))
        return "" if names == outermost else next(fitting, "")

    def parameters(module: Any) -> dict[str, Any]:
        with call.aside():  # this method passes the interceptor too
            return module.params_dict()

    def intercept(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if context.method_name == "__init__" or hk.running_init() or not call.in_flight():
            return next_fun(*args, **kwargs)
        owner, outer = f"{module.module_name}/", prefix()
        leaves = {
            name.removeprefix(owner): leaf
            for name, leaf in parameters(module).items()
            if name.startswith(owner) and "/" not in name.removeprefix(owner)
        }
        called.append(outer + module.module_name)
        path = (called[-1],)
        layer = call.kernel(module, type(module), path, leaves)
        parent = call.holders[-1] if call.holders else None
        call.holders.append(module)
        try:
            if layer is None or context.method_name != "__call__":
                return next_fun(*args, **kwargs)
            name, numbers = layer
            cell: dict[Any, Any] = {}
            carry = 0
            if isinstance(parent, hk.RNNCore):
                cell = {
                    tuple(f"{outer}{name}".rsplit("/", 1)): leaf
                    for name, leaf in parameters(parent).items()
                }
            if isinstance(parent, hk.LSTM):  # one kernel for the input and the carry
                numbers, carry = numbers._replace(gates=4), parent.hidden_size

            def replaced(kernel: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
                if changed:
                    raise ValueError(
                        f"{path[0]}/{name}: a custom getter changes the kernel, and would change"
                        " its feedback weights too. Exclude it with `where`."
                    )

                def getter(next_getter: Any, value: Any, context: Any) -> jax.Array:
                    leaf = next_getter(value)
                    return kernel if context.name == name else jax.lax.stop_gradient(leaf)

                with hk.custom_getter(getter):
                    return context.orig_method(*args, **kwargs)

            first = getattr(module, "data_format", "")[1:2] == "C"
            trailing = module.num_spatial_dims if first else 0
            # As the module gets it, through the custom getters around it.
            kernel = hk.get_parameter(name, leaves[name].shape, leaves[name].dtype)
            changed = kernel is not leaves[name]
            seen = Seen((*path, name), numbers, kernel, next_fun, replaced, cell, carry, trailing)
            return call.layer(seen, args, kwargs)
        finally:
            call.holders.pop()

    with hk.intercept_methods(intercept):
        return forward(*args, **kwargs)


_FRAMEWORK = Framework(_see, _LAYERS)
propagated = _FRAMEWORK.propagated
feedback_alignment = _FRAMEWORK.feedback_alignment
direct_feedback_alignment = _FRAMEWORK.direct_feedback_alignment
