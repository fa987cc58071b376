"""Pictures are drawn without a screen; Flax and Optax promote ranks and types."""

import jax
import matplotlib
import pytest

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def promotion():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
