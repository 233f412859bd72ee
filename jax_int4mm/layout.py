"""The packed int4 format: PyTorch's CUDA layout of ``_weight_int4pack_mm``, in pure ``jnp``.

``docs/format.md`` is the specification and ``ffi/core/layout.h`` the C++ twin. A weight q [n, k] of integers 0..15 is
stored as int32 ``[n/8, k/(16*inner_k_tiles), 32, inner_k_tiles/2]``: word ``j`` of lane ``4*(n%8) + (k>>1)%4`` of a
tile holds eight nibbles of row n, spread over 32 values of k, even k in its low half and odd k in its high half.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

TILE_N = 8
LANES = 32
NIBBLES_PER_WORD = 8
INNER_K_TILES = (2, 4, 8)
GROUP_SIZES = (32, 64, 128, 256)


def tile_k(inner_k_tiles: int) -> int:
    """Values of k in one packed tile."""
    return 16 * inner_k_tiles


def packed_shape(n: int, k: int, inner_k_tiles: int) -> tuple[int, int, int, int]:
    """Shape of the packed int32 array of an [n, k] weight."""
    return n // TILE_N, k // tile_k(inner_k_tiles), LANES, inner_k_tiles // 2


def unpacked_shape(packed: tuple[int, ...]) -> tuple[int, int, int]:
    """The (n, k, inner_k_tiles) of a packed array's shape [n/8, k/(16*inner_k_tiles), 32, inner_k_tiles/2]."""
    inner_k_tiles = 2 * packed[3]
    return packed[0] * TILE_N, packed[1] * tile_k(inner_k_tiles), inner_k_tiles


def as_array(op: str, name: str, value: ArrayLike) -> jax.Array | np.ndarray:
    """``value`` if it is a jax or numpy array, else a TypeError that names ``op`` and ``name``."""
    if isinstance(value, (jax.Array, np.ndarray)):
        return value
    raise TypeError(f"{op}: {name} is a {type(value).__name__}; it must be a jax or numpy array.")


def check_inner_k_tiles(op: str, inner_k_tiles: int) -> None:
    """Raise ValueError unless ``inner_k_tiles`` is one that the format has."""
    if inner_k_tiles not in INNER_K_TILES:
        raise ValueError(f"{op}: inner_k_tiles is {inner_k_tiles!r}; it must be 2, 4 or 8. 8 is the usual choice.")


def check_packed(op: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Raise unless shape and dtype are those of a packed array [n/8, k/(16*inner_k_tiles), 32, inner_k_tiles/2]."""
    if dtype != jnp.int32:
        raise TypeError(
            f"{op}: packed has dtype {dtype}; it must be int32 as pack_int4 makes it. "
            "Pack unpacked integers with pack_int4(q), PyTorch's uint8 input with pack_int4_bytes(b)."
        )
    if len(shape) != 4 or shape[2] != LANES or 2 * shape[3] not in INNER_K_TILES or 0 in shape:
        raise ValueError(
            f"{op}: packed has shape {list(shape)}; it must be [n/8, k/(16*inner_k_tiles), 32, inner_k_tiles/2] "
            "with inner_k_tiles 2, 4 or 8. Make it with pack_int4(q) from q [n, k]."
        )


def pack_int4(q: ArrayLike, inner_k_tiles: int = 8) -> jax.Array:
    """Pack integers 0..15 into the tensor-core layout of PyTorch's ``_convert_weight_to_int4pack``.

    Args:
      q: [n, k] integers 0..15 of any integer dtype (``jnp.uint4`` too); n a multiple of 8, k of ``16 * inner_k_tiles``.
        A jax or numpy array. Other values raise when q is concrete; under a trace only the low four bits count.
      inner_k_tiles: 2, 4 or 8.

    Returns:
      int32 ``[n/8, k/(16*inner_k_tiles), 32, inner_k_tiles/2]``, bit for bit what PyTorch's CUDA op gives.

    Raises:
      TypeError: q is not of an integer dtype.
      ValueError: q's rank, n, k, a value, or inner_k_tiles breaks a rule above.
    """
    q = as_array("pack_int4", "q", q)
    if not jnp.issubdtype(q.dtype, jnp.integer):
        raise TypeError(
            f"pack_int4: q has dtype {q.dtype}; it must hold integers 0..15 (uint8, int32 or jnp.uint4). "
            "Quantise a float weight with quantize(w) instead."
        )
    if q.ndim != 2:
        raise ValueError(
            f"pack_int4: q has shape {list(q.shape)}; it must be [n, k]. Use jax.vmap for stacked weights."
        )
    n, k = q.shape
    _check_packable("pack_int4", n, k, inner_k_tiles)
    if not isinstance(q, jax.core.Tracer) and q.dtype != jnp.uint4 and not _all_nibbles(q):
        raise ValueError("pack_int4: q has values outside 0..15; signed values -8..7 become 0..15 by adding 8.")
    return _pack(q, inner_k_tiles=inner_k_tiles)


def pack_int4_bytes(b: ArrayLike, inner_k_tiles: int = 8) -> jax.Array:
    """Pack PyTorch's byte form, the input of ``torch.ops.aten._convert_weight_to_int4pack``.

    Args:
      b: [n, k/2] uint8, two values a byte with the even k in the HIGH nibble (other producers use the low one).
      inner_k_tiles: 2, 4 or 8.

    Returns:
      As :func:`pack_int4`.

    Raises:
      TypeError: b is not uint8.
      ValueError: as :func:`pack_int4`.
    """
    b = as_array("pack_int4_bytes", "b", b)
    if b.dtype != jnp.uint8:
        raise TypeError(f"pack_int4_bytes: b has dtype {b.dtype}; it must be uint8, two values of k a byte.")
    if b.ndim != 2:
        raise ValueError(f"pack_int4_bytes: b has shape {list(b.shape)}; it must be [n, k/2].")
    _check_packable("pack_int4_bytes", b.shape[0], 2 * b.shape[1], inner_k_tiles)
    return _pack(_split_bytes(b), inner_k_tiles=inner_k_tiles)


def unpack_int4(packed: ArrayLike) -> jax.Array:
    """The inverse of :func:`pack_int4`.

    Args:
      packed: int32 ``[n/8, k/(16*inner_k_tiles), 32, inner_k_tiles/2]``, a jax or numpy array.

    Returns:
      uint8 [n, k], values 0..15.

    Raises:
      TypeError: packed is not int32.
      ValueError: packed has another shape.
    """
    packed = as_array("unpack_int4", "packed", packed)
    check_packed("unpack_int4", packed.shape, packed.dtype)
    return _unpack(packed)


def _check_packable(op: str, n: int, k: int, inner_k_tiles: int) -> None:
    check_inner_k_tiles(op, inner_k_tiles)
    if n == 0 or k == 0 or n % TILE_N or k % tile_k(inner_k_tiles):
        raise ValueError(
            f"{op}: the weight is n = {n}, k = {k}; n must be a positive multiple of {TILE_N} and k of "
            f"16 * inner_k_tiles = {tile_k(inner_k_tiles)}. Pad it with 8 and give the padding scale and zero 0, as "
            "quantize does."
        )


def _all_nibbles(q: jax.Array | np.ndarray) -> bool:
    return bool((q.min() >= 0) & (q.max() <= 15))


# Word bits of the eight nibbles in the order ((k>>4)&1, (k>>3)&1, k&1): even k low, odd k high; k, k+8, k+16, k+24.
# With all dimensions of the nibbles below, which rank promotion need not add.
_NIBBLE_SHIFTS = np.array([0, 16, 4, 20, 8, 24, 12, 28], dtype=np.uint32).reshape(1, 1, 1, 1, 2, 2, 1, 2)


@functools.partial(jax.jit, static_argnames="inner_k_tiles")
def _pack(q: jax.Array, inner_k_tiles: int) -> jax.Array:
    n, k = q.shape
    tiles_n, tiles_k, lanes, words = packed_shape(n, k, inner_k_tiles)
    # k = tile*T + word*32 + k4*16 + k3*8 + pair*2 + k0, and the lane is 4*(n%8) + pair.
    nibbles = q.astype(jnp.uint32).reshape(tiles_n, TILE_N, tiles_k, words, 2, 2, 4, 2) & 0xF
    word = jnp.sum(nibbles << _NIBBLE_SHIFTS, axis=(4, 5, 7), dtype=jnp.uint32)  # [tiles_n, 8, tiles_k, words, 4]
    word = word.transpose(0, 2, 1, 4, 3).reshape(tiles_n, tiles_k, lanes, words)
    return jax.lax.bitcast_convert_type(word, jnp.int32)


@jax.jit
def _unpack(packed: jax.Array) -> jax.Array:
    n, k, _ = unpacked_shape(packed.shape)
    tiles_n, tiles_k, _, words = packed.shape
    word = jax.lax.bitcast_convert_type(packed, jnp.uint32).reshape(tiles_n, tiles_k, TILE_N, 4, words)
    word = word.transpose(0, 2, 1, 4, 3)[:, :, :, :, None, None, :, None]
    nibbles = (word >> _NIBBLE_SHIFTS) & 0xF
    return nibbles.astype(jnp.uint8).reshape(n, k)


@jax.jit
def _split_bytes(b: jax.Array) -> jax.Array:
    return jnp.stack([b >> 4, b & 0xF], axis=-1).reshape(b.shape[0], -1)
