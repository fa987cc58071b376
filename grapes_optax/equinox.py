"""Equinox: the learning rules for functions of modules."""

from grapes_optax._equinox import *  # noqa: F403
