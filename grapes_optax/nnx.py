"""Flax nnx: the learning rules for functions of models."""

from grapes_optax._frameworks import extra as _extra

with _extra("flax"):
    from grapes_optax._nnx import *  # noqa: F403
