"""Reading model checkpoints from disk. Only safetensors, GGUF and JSON are parsed; nothing is ever unpickled."""

from jax_int4mm.checkpoints.checkpoint import Checkpoint, load
from jax_int4mm.checkpoints.entry import Entry
from jax_int4mm.checkpoints.errors import CheckpointError, MissingTensorError, RequantizedWarning

__all__ = ["Checkpoint", "CheckpointError", "Entry", "MissingTensorError", "RequantizedWarning", "load"]
