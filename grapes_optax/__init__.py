"""GRAPES for JAX: node importance as a stateless Optax gradient transformation."""

from grapes_optax._feedback import Alignment, alignment
from grapes_optax._importance import (
    DimensionNumbers,
    LeftAlone,
    WeightDimNumOrFn,
    importance_factor,
    node_importance,
)
from grapes_optax._layers import sharded
from grapes_optax._modulation import modulate_error
from grapes_optax._names import by_path
from grapes_optax._optimizers import grapes_rmsprop, grapes_sgd
from grapes_optax._program import infer_dimension_numbers
from grapes_optax._summary import factors, summary
from grapes_optax._transform import scale_by_grapes, scale_by_outgoing_importance

__version__ = "0.1.0"

__all__ = [
    "Alignment",
    "DimensionNumbers",
    "LeftAlone",
    "WeightDimNumOrFn",
    "alignment",
    "by_path",
    "factors",
    "grapes_rmsprop",
    "grapes_sgd",
    "importance_factor",
    "infer_dimension_numbers",
    "modulate_error",
    "node_importance",
    "scale_by_grapes",
    "scale_by_outgoing_importance",
    "sharded",
    "summary",
]
