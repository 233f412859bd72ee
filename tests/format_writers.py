"""One layer in each format's tensors, written word by word from the format's description; nothing is vectorised."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import numpy as np

from oracle import pack
from stored_layers import MODULE, Layer

Tensors = dict[str, np.ndarray]


def word(nibbles: Iterable[int]) -> int:
    """Up to eight values of 4 bits in 32, the first in the lowest."""
    return sum(int(nibble) << 4 * place for place, nibble in enumerate(nibbles))


def words_of_rows(values: np.ndarray) -> np.ndarray:
    """uint32 [rows, ceil(columns/8)]."""
    rows, columns = values.shape
    words = np.zeros((rows, -(-columns // 8)), np.uint32)
    for row, column in np.ndindex(*words.shape):
        words[row, column] = word(values[row, 8 * column : 8 * column + 8])
    return words


def gptq(
    layer: Layer, zero_point: np.ndarray, *, less_one: bool = True, g_idx: bool = True, module: str = MODULE
) -> Tensors:
    """qweight packed along k, qzeros along n; v1 subtracts 1 from all zero points of a word at once."""
    qzeros = words_of_rows(zero_point.T)
    if less_one:
        for place in np.ndindex(*qzeros.shape):
            qzeros[place] = (int(qzeros[place]) - 0x11111111) % 2**32
    tensors = {
        f"{module}.qweight": words_of_rows(layer.q).T.view(np.int32),
        f"{module}.qzeros": qzeros.view(np.int32),
        f"{module}.scales": layer.scale.T,
    }
    return tensors | ({f"{module}.g_idx": layer.group.astype(np.int32)} if g_idx else {})


def awq(layer: Layer, zero_point: np.ndarray | None, module: str = MODULE) -> Tensors:
    """qweight and qzeros packed along n, of each eight first the even ones and then the odd ones."""
    tensors = {f"{module}.qweight": _awq_words(layer.q.T), f"{module}.scales": layer.scale.T}
    return tensors | ({} if zero_point is None else {f"{module}.qzeros": _awq_words(zero_point.T)})


def _awq_words(values: np.ndarray) -> np.ndarray:
    rows, columns = values.shape
    words = np.zeros((rows, columns // 8), np.uint32)
    for row, column in np.ndindex(*words.shape):
        words[row, column] = word(values[row, 8 * column + place] for place in (0, 2, 4, 6, 1, 3, 5, 7))
    return words.view(np.int32)


def compressed_tensors(layer: Layer, zero_point: np.ndarray | None = None, module: str = MODULE) -> Tensors:
    """weight_packed along k, weight_zero_point along n; signed values are stored plus 8, which is q in 0..15."""
    tensors = {
        f"{module}.weight_packed": words_of_rows(layer.q).view(np.int32),
        f"{module}.weight_scale": layer.scale,
        f"{module}.weight_shape": np.array(layer.q.shape, np.int64),
    }
    if zero_point is not None:
        tensors[f"{module}.weight_zero_point"] = words_of_rows(zero_point.T).T.view(np.int32)
    return tensors


def hqq(
    rows: np.ndarray, scale: np.ndarray, zero: np.ndarray, shape: tuple[int, int], axis: int, module: str = MODULE
) -> Tensors:
    """W_q of the weight reshaped to [groups, group_size] (axis 1) or [group_size, groups] (axis 0).

    A byte holds a value of the upper half of the rows in its high nibble, of the lower half in its low one.
    """
    half = len(rows) // 2
    packed = np.zeros((half, rows.shape[1]), np.uint8)
    for row, column in np.ndindex(*packed.shape):
        packed[row, column] = int(rows[row, column]) << 4 | int(rows[half + row, column])
    yes, no = np.array(1, np.uint8), np.array(0, np.uint8)
    return {
        f"{module}.W_q": packed,
        f"{module}.scale": scale,
        f"{module}.zero": zero,
        f"{module}.shape": np.array(shape, np.int64),
        f"{module}.nbits": np.array(4, np.int32),
        f"{module}.axis": np.array(axis, np.int32),
        f"{module}.group_size": np.array(rows.shape[axis], np.int32),
        f"{module}.packing": np.frombuffer(b"4bit_u8", np.uint8),
        f"{module}.compute_dtype": np.frombuffer(b"torch.bfloat16", np.uint8),
        f"{module}.unpack_view_dtype": np.frombuffer(b"torch.uint8", np.uint8),
        **{
            f"{module}.{name}": yes
            for name in ("channel_wise", "encoded_state_dict", "optimize", "stores_quant_config")
        },
        **{f"{module}.{name}": no for name in ("offload_meta", "quant_scale", "quant_zero", "round_zero")},
        f"{module}.view_as_float": no,
    }


def hqq_of_layer(layer: Layer, zero: np.ndarray) -> Tensors:
    """HQQ along axis 1, of groups within the rows of the weight."""
    rows = layer.q.reshape(layer.scale.size, -1)
    column = (layer.scale.size, 1)
    return hqq(rows, layer.scale.reshape(column), zero.reshape(column), layer.q.shape, axis=1)


def mlx(layer: Layer, biases: np.ndarray, module: str = MODULE) -> Tensors:
    """Weight packed along k."""
    return {
        f"{module}.weight": words_of_rows(layer.q),
        f"{module}.scales": layer.scale,
        f"{module}.biases": biases,
    }


def torchao_metadata(kind: str, data: dict[str, object], parts: Sequence[str], module: str = MODULE) -> dict[str, str]:
    """What a file of torchao's says of one weight."""
    described = {"_type": kind, "_data": data, "_tensor_data_names": list(parts)}
    return {f"{module}.weight": json.dumps(described), "tensor_names": json.dumps([f"{module}.weight"])}


def int4_tensor(layer: Layer, zero_point: np.ndarray, *, signed: bool = True) -> tuple[Tensors, dict[str, str]]:
    """Two values of k a byte, the even one low, in two's complement where signed."""
    n, k = layer.q.shape
    octets = np.zeros((n, k // 2), np.uint8)
    for row, column in np.ndindex(*octets.shape):
        pair = [int(value) for value in layer.q[row, 2 * column : 2 * column + 2]]
        low, high = [(value - 8) % 16 for value in pair] if signed else pair
        octets[row, column] = low | high << 4
    tensors = {"qdata": octets.view(np.int8), "scale": layer.scale.T, "zero_point": zero_point.T}
    size = -(-k // layer.scale.shape[1])
    metadata = torchao_metadata("Int4Tensor", {"block_size": [1, size], "shape": [n, k]}, tuple(tensors))
    return {f"{MODULE}._weight_{part}": tensor for part, tensor in tensors.items()}, metadata


def unpacked_int8(
    q: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, target: str = "int4"
) -> tuple[Tensors, dict[str, str]]:
    """A value a byte, signed."""
    tensors = {"qdata": q.astype(np.int8), "scale": scale, "zero_point": zero_point}
    data = {
        "target_dtype": {"_type": "torch.dtype", "_data": target},
        "block_size": [1, q.shape[1] // scale.shape[1]],
        "dtype": {"_type": "torch.dtype", "_data": "bfloat16"},
        "activation_quantization": None,
    }
    metadata = torchao_metadata("IntxUnpackedToInt8Tensor", data, tuple(tensors))
    return {f"{MODULE}._weight_{part}": tensor for part, tensor in tensors.items()}, metadata


def tile_packed(
    rng: np.random.Generator, layer: Layer, group_size: int, multiple: tuple[int, int] = (8, 1024)
) -> tuple[Tensors, dict[str, str]]:
    """The packed format with n and k padded to multiples; there is no saying what the padding holds."""
    n, k = layer.q.shape
    padded_n, padded_k = (-(-size // to) * to for size, to in zip((n, k), multiple, strict=True))
    q = rng.integers(0, 16, (padded_n, padded_k), np.uint8)
    q[:n, :k] = layer.q
    pairs = rng.normal(0, 1, (padded_k // group_size, padded_n, 2)).astype(layer.scale.dtype)
    pairs[: layer.scale.shape[1], :n, 0] = layer.scale.T
    pairs[: layer.scale.shape[1], :n, 1] = layer.zero.T.astype(layer.scale.dtype)
    tensors = {"qdata": pack(q, 8), "scale_and_zero": pairs}
    data: dict[str, object] = {"block_size": [1, group_size], "shape": [n, k]}
    metadata = torchao_metadata("Int4TilePackedTo4dTensor", data, tuple(tensors))
    return {f"{MODULE}._weight_{part}": tensor for part, tensor in tensors.items()}, metadata
