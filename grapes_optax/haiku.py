"""Haiku: the learning rules for functions that call transformed functions with ``apply``."""

from grapes_optax._frameworks import extra as _extra

with _extra("haiku"):
    from grapes_optax._haiku import *  # noqa: F403
