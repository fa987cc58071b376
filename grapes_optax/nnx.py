"""Flax nnx: the learning rules for functions of models."""

from grapes_optax._nnx import *  # noqa: F403
