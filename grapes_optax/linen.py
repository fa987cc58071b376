"""Flax linen: the learning rules for functions that call modules with ``apply``."""

from grapes_optax._frameworks import extra as _extra

with _extra("flax"):
    from grapes_optax._linen import *  # noqa: F403
