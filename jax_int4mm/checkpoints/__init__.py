"""Reading and writing model checkpoints. Only safetensors, GGUF and JSON are parsed; nothing is ever unpickled."""

from jax_int4mm.checkpoints.checkpoint import Checkpoint, load
from jax_int4mm.checkpoints.entry import Entry
from jax_int4mm.checkpoints.errors import CheckpointError, MissingTensorError, RequantizedWarning
from jax_int4mm.checkpoints.writing import save

__all__ = ["Checkpoint", "CheckpointError", "Entry", "MissingTensorError", "RequantizedWarning", "load", "save"]
