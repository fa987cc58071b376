"""GRAPES for JAX: node importance as a stateless Optax gradient transformation."""

from grapes_optax._feedback import Alignment as Alignment
from grapes_optax._feedback import alignment as alignment
from grapes_optax._importance import DimensionNumbers as DimensionNumbers
from grapes_optax._importance import LeftAlone as LeftAlone
from grapes_optax._importance import importance_factor as importance_factor
from grapes_optax._importance import node_importance as node_importance
from grapes_optax._modulation import modulate_error as modulate_error
from grapes_optax._names import by_path as by_path
from grapes_optax._optimizers import grapes_rmsprop as grapes_rmsprop
from grapes_optax._optimizers import grapes_sgd as grapes_sgd
from grapes_optax._program import infer_dimension_numbers as infer_dimension_numbers
from grapes_optax._summary import summary as summary
from grapes_optax._transform import scale_by_grapes as scale_by_grapes
from grapes_optax._transform import (
    scale_by_outgoing_importance as scale_by_outgoing_importance,
)
