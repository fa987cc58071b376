"""Equinox: the learning rules for functions of modules."""

from grapes_optax._frameworks import extra as _extra

with _extra("equinox"):
    from grapes_optax._equinox import *  # noqa: F403
