"""The same weight in PyTorch: other bytes in its CPU op, the same numbers."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import acceptance
import cases
import jax_int4mm as i4
import oracle

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install '.[torch]'")


def to_torch(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)


def from_torch(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(torch.uint16).numpy().view(oracle.BFLOAT16)


def multiply(x: np.ndarray, weight: cases.Weight) -> np.ndarray:
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.from_numpy(weight.q.astype(np.int32)), 8)
    return from_torch(
        torch.ops.aten._weight_int4pack_mm_for_cpu(
            to_torch(x), packed, weight.group_size, to_torch(weight.scales_and_zeros)
        )
    )


@pytest.mark.parametrize("m", [1, 4, 33])
@pytest.mark.parametrize("group_size", cases.GROUP_SIZES)
def test_the_product_differs_by_the_rounding_of_the_weight(m: int, group_size: int, rng: np.random.Generator) -> None:
    cpu = jax.devices("cpu")[0]
    weight = cases.random_weight(rng, 64, 512, group_size)
    x = cases.random_x(rng, (m, weight.k))
    theirs = multiply(x, weight)
    # PyTorch's CPU op does not round the weight to bfloat16, as its CUDA op and most of ours do.
    acceptance.check([theirs], [x], weight.unrounded, cpu)

    with jax.default_device(cpu):
        ours = np.asarray(i4.int4pack_mm(x, weight.packed, weight.scales_and_zeros, group_size))
    magnitudes = np.abs(x.astype(np.float64))
    rounding_of_w = magnitudes @ (oracle.ulp(weight.unrounded, oracle.BFLOAT16) / 2).T
    sums = 2.0**-20 * (magnitudes @ np.abs(weight.unrounded).T)
    rounding_of_y = oracle.ulp(theirs.astype(np.float64), oracle.BFLOAT16)
    difference = np.abs(ours.astype(np.float64) - theirs.astype(np.float64))
    assert np.all(difference <= rounding_of_w + sums + rounding_of_y)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch has no CUDA here: its packed format is CUDA's alone")
@pytest.mark.parametrize("inner_k_tiles", cases.INNER_K_TILES)
def test_the_packed_bytes_are_those_of_pytorchs_cuda_op(inner_k_tiles: int, rng: np.random.Generator) -> None:
    weight = cases.random_weight(rng, 136, 1024, 128, inner_k_tiles)
    as_bytes = torch.from_numpy(weight.q[:, ::2] << 4 | weight.q[:, 1::2]).cuda()
    theirs = torch.ops.aten._convert_weight_to_int4pack(as_bytes, inner_k_tiles).cpu().numpy()
    np.testing.assert_array_equal(i4.pack_int4(weight.q, inner_k_tiles), theirs)

    x = cases.random_x(rng, (33, weight.k))
    y = torch.ops.aten._weight_int4pack_mm(
        to_torch(x).cuda(), torch.from_numpy(theirs).cuda(), 128, to_torch(weight.scales_and_zeros).cuda()
    )
    acceptance.check([from_torch(y.cpu())], [x], weight.rounded, jax.devices("cpu")[0])
