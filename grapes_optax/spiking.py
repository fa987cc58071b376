"""The dynamics of spiking neural units, and rate-coded inputs for them."""

from grapes_optax._spiking import *  # noqa: F403
