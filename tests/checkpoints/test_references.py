"""Checkpoints that other libraries wrote, against the weights that these libraries read from them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import cases
import jax_int4mm as i4
from jax_int4mm import checkpoints
from oracle import BFLOAT16, FLOAT16
from stored_layers import Layer, check, read_off

DATA = Path(__file__).parent.parent / "data" / "checkpoints"
K_PROJ, DOWN_PROJ, EMBEDDING = "model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj", "model.embed_tokens"


@dataclasses.dataclass(frozen=True)
class Found:
    """What is read of a module: q, scale and zero of each value from the Int4Weight, and the file's own tensors."""

    q: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    tensors: dict[str, np.ndarray]

    @property
    def steps(self) -> np.ndarray:
        """q less the integer zero point."""
        return self.q.astype(np.float32) - np.rint(8 - self.zero / self.scale).astype(np.float32)

    def of_file(self, part: str) -> np.ndarray:
        """A float32 tensor [n, groups] of the file, for each value."""
        groups = self.tensors[part].astype(np.float32).reshape(len(self.q), -1)
        return groups.repeat(self.q.shape[1] // groups.shape[1], axis=1)


def gptqmodel(found: Found) -> np.ndarray:
    return found.scale.astype(BFLOAT16).astype(np.float32) * found.steps


def hqq(found: Found) -> np.ndarray:
    difference = (found.q - found.of_file("zero")).astype(BFLOAT16).astype(np.float32)
    return difference * found.of_file("scale")


# How each library computes the weight, in float32, before it rounds it to the dtype of its reference.
LIBRARIES: dict[str, Callable[[Found], np.ndarray]] = {
    "gptq_sym_g128": gptqmodel,
    "gptq_asym_g64": gptqmodel,
    "gptq_sym_g32_desc_act": gptqmodel,
    "awq_gemm_g128": lambda found: found.steps * found.scale,
    "compressed_tensors_sym_g128": lambda found: found.steps * found.scale,
    "compressed_tensors_asym_g128": lambda found: found.steps * found.scale,
    "hqq_g64_bfloat16": hqq,
    "torchao_tile_packed_g128": lambda found: (found.q - np.float32(8)) * found.scale + found.zero,
    "torchao_int4tensor_g128": lambda found: (found.q - np.float32(8)) * found.scale + found.zero,
    "mlx_affine_g64": lambda found: found.q * found.scale + found.of_file("biases"),
}
MODULES = [
    (name, module)
    for name in LIBRARIES
    for module in (K_PROJ, DOWN_PROJ, *([EMBEDDING] if name == "mlx_affine_g64" else []))
]


def reference(name: str, module: str) -> np.ndarray:
    """The rows of a weight that are kept, in the dtype in which the library computed them."""
    with np.load(DATA / name / "reference.npz") as arrays:
        bits = arrays.get(f"{module}.weight.bfloat16_bits")
        return arrays[f"{module}.weight"] if bits is None else bits.view(BFLOAT16)


def read_module(name: str, module: str) -> Found:
    w4 = checkpoints.load(DATA / name)[f"{module}.weight"]
    assert isinstance(w4, i4.Int4Weight)
    layer = read_off(w4)
    tensors = safetensors.numpy.load_file(DATA / name / "model.safetensors")
    prefix = f"{module}."
    return Found(
        layer.q,
        layer.scale.astype(np.float32),
        layer.zero.astype(np.float32),
        {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)},
    )


@pytest.mark.parametrize(("name", "module"), MODULES)
def test_integers_scales_and_zeros_give_the_librarys_weight_in_its_arithmetic(name: str, module: str):
    found = read_module(name, module)
    expected = reference(name, module)
    every = len(found.q) // len(expected)
    computed = LIBRARIES[name](found).astype(expected.dtype)[::every]
    np.testing.assert_array_equal(computed, expected)


def exact_layer(name: str, found: Found) -> Layer:
    """What the file says, in float64."""
    dtype = FLOAT16 if name.startswith(("gptq", "awq")) else BFLOAT16
    scale = found.scale.astype(dtype)
    exact_scale = found.scale.astype(np.float64)
    if name.startswith("hqq"):
        zero = (8 - found.of_file("zero").astype(np.float64)) * exact_scale
    elif name.startswith("mlx"):
        zero = found.of_file("biases").astype(np.float64) + 8 * exact_scale
    elif name.startswith("torchao"):
        zero = found.zero.astype(np.float64)
    else:
        zero = (found.q - found.steps.astype(np.float64) - 8) * -exact_scale
    return Layer(found.q, scale, zero, np.arange(found.q.shape[1]))


@pytest.mark.parametrize("dtype", [None, BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize("name", LIBRARIES)
def test_scale_and_zero_are_rounded_once_to_the_dtype_that_is_asked_for(name: str, dtype: np.dtype | None):
    layer = exact_layer(name, read_module(name, K_PROJ))
    check(checkpoints.load(DATA / name, dtype=dtype)[f"{K_PROJ}.weight"], layer, dtype)


@pytest.mark.parametrize(("name", "module"), [(name, module) for name, module in MODULES if "tile_packed" in name])
def test_tile_packed_weights_dequantise_to_what_torchs_kernel_multiplies_by(name: str, module: str):
    w4 = checkpoints.load(DATA / name)[f"{module}.weight"]
    expected = reference(name, module)
    np.testing.assert_array_equal(np.asarray(w4.dequantize()).T[:: w4.n // len(expected)], expected)


def test_a_weight_ordered_by_activations_multiplies_x_as_its_dense_matrix_does(rng: np.random.Generator):
    checkpoint = checkpoints.load(DATA / "gptq_sym_g32_desc_act")
    w4 = checkpoint[f"{K_PROJ}.weight"]
    assert w4.perm is not None
    assert w4.group_size == 32
    x = cases.random_x(rng, (7, w4.k), w4.dtype)
    expected = x.astype(np.float64) @ np.asarray(w4.dequantize(), np.float64)
    found = np.asarray(jnp.asarray(x) @ w4, np.float64)
    spread = np.abs(x.astype(np.float64)) @ np.abs(np.asarray(w4.dequantize(), np.float64))
    assert np.all(np.abs(found - expected) <= 2.0**-10 * spread)


FORMATS = {"compressed": "compressed-tensors"}


@pytest.mark.parametrize("name", LIBRARIES)
def test_parameters_have_their_hugging_face_names_and_shapes(name: str):
    checkpoint = checkpoints.load(DATA / name)
    assert checkpoint.format == FORMATS.get(name.split("_")[0], name.split("_")[0])
    expected = {f"{K_PROJ}.weight": (128, 256), f"{DOWN_PROJ}.weight": (256, 512)}
    if checkpoint.format == "mlx":
        expected[f"{EMBEDDING}.weight"] = (512, 256)
    norm = "model.layers.0.input_layernorm.weight"
    assert {key: entry.shape for key, entry in checkpoint.entries.items()} == {**expected, norm: (256,)}
    assert {key for key, entry in checkpoint.entries.items() if entry.element_type == "int4"} == set(expected)
    assert all(entry.requantized is None for entry in checkpoint.entries.values())
    assert checkpoint[norm].shape == (256,)
    group_sizes = {str(checkpoint.entries[key].group_size) for key in expected}
    assert group_sizes == set(re.findall(r"_g(\d+)", name))
