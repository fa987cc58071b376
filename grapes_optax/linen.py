"""Flax linen: the learning rules for functions that call modules with ``apply``."""

from grapes_optax._linen import *  # noqa: F403
