"""int4 weight-only matrix multiplication as a JAX primitive, bit-compatible with PyTorch's packed weights."""

import importlib.metadata

from jax_int4mm.explain import Explanation, explain
from jax_int4mm.layout import pack_int4, pack_int4_bytes, unpack_int4
from jax_int4mm.ops.dequantize import dequantize
from jax_int4mm.ops.int4pack_mm import int4pack_mm
from jax_int4mm.quantizers import quantize, quantize_tensor
from jax_int4mm.tensor import Int4Tensor, int4_dot_general, int4_einsum
from jax_int4mm.weight import Int4Weight, concatenate, matmul

__version__ = importlib.metadata.version("jax_int4mm")

__all__ = [
    "Explanation",
    "Int4Tensor",
    "Int4Weight",
    "__version__",
    "concatenate",
    "dequantize",
    "explain",
    "int4_dot_general",
    "int4_einsum",
    "int4pack_mm",
    "matmul",
    "pack_int4",
    "pack_int4_bytes",
    "quantize",
    "quantize_tensor",
    "unpack_int4",
]
