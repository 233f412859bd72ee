"""Reading model checkpoints from disk. Only safetensors and JSON are parsed; nothing is ever unpickled."""

from jax_int4mm.checkpoints.checkpoint import Checkpoint, load
from jax_int4mm.checkpoints.safetensors_files import CheckpointError, MissingTensorError

__all__ = ["Checkpoint", "CheckpointError", "MissingTensorError", "load"]
