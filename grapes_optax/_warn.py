"""Warnings that point at the line of the user."""

import inspect
import warnings

# What stands between the user's line and ours.
_LIBRARIES = frozenset(
    ["chex", "contextlib", "equinox", "flax", "functools", "grapes_optax", "haiku", "jax", "optax"]
)


def warn(message: str) -> None:
    """Warns at the innermost frame that is no library's."""
    frame, level = inspect.currentframe(), 1
    while frame and frame.f_globals.get("__name__", "").partition(".")[0] in _LIBRARIES:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
