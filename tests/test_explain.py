"""explain asks the plan that lowering asks, and says in a sentence what it answers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cases
import jax_int4mm as i4
from jax_int4mm.layout import packed_shape
from jax_int4mm.ops import _ffi
from kernels import Kernel
from shapes import SHAPES


@pytest.fixture
def w4() -> i4.Int4Weight:
    """[200, 30], stored as 256 x 32."""
    return i4.quantize(np.ones((200, 30), np.float32))


@pytest.mark.parametrize("m", cases.M)
def test_it_describes_every_m(chosen: Kernel, m: int, w4: i4.Int4Weight) -> None:
    explanation = i4.explain((m, 200), w4)
    assert explanation == i4.explain((m, 200), w4, chosen.device)
    assert explanation == i4.explain([m, 200], w4, chosen.device, explanation.implementation)
    assert explanation.implementation in (*_ffi.cpu_implementations(), "ampere", "decode", "hopper")
    assert explanation.tile
    assert explanation.weights in ("rounded", "exact")
    assert explanation.workspace_bytes >= 0
    assert len(explanation.reason.split()) > 5


def test_leading_dimensions_are_rows(w4: i4.Int4Weight) -> None:
    assert i4.explain((4, 25, 200), w4) == i4.explain((100, 200), w4)
    assert i4.explain((200,), w4) == i4.explain((1, 200), w4)


def test_it_needs_shapes_alone(w4: i4.Int4Weight) -> None:
    shapes = jax.eval_shape(lambda: w4)
    assert i4.explain((3, 200), shapes, "cpu") == i4.explain((3, 200), w4, "cpu")


@pytest.mark.parametrize("name", ["cuda", "gpu", "CUDA"])
def test_a_gpu_is_described_on_any_machine(name: str, w4: i4.Int4Weight) -> None:
    for m, kernel in ((1, "decode"), (16, "decode"), (17, "hopper"), (4096, "hopper")):
        explanation = i4.explain((m, 200), w4, name)
        assert explanation.implementation == kernel
        assert explanation == i4.explain((m, 200), w4, name, f"{kernel}/{explanation.tile}")


@pytest.mark.parametrize("m", [1, 16, 64, 4096])
@pytest.mark.parametrize(("n", "k"), SHAPES.values(), ids=[f"{n}x{k}" for n, k in SHAPES.values()])
def test_a_gpu_has_a_plan_for_every_layer_that_benchmarks_time(n: int, k: int, m: int) -> None:
    packed = jax.ShapeDtypeStruct(packed_shape(n, k, 8), jnp.int32)
    scales_and_zeros = jax.ShapeDtypeStruct((k // 128, n, 2), jnp.bfloat16)
    explanation = i4.explain((m, k), i4.Int4Weight(packed, scales_and_zeros, group_size=128, k=k, n=n), "cuda")
    assert explanation.implementation != "reference"
    assert explanation.tile


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_an_m_not_known_when_traced_takes_a_kernel_without_workspace(platform: str) -> None:
    plan = _ffi.plan(platform, _ffi.Problem(_ffi.UNKNOWN_M, 4096, 4096, 128, 8, "bfloat16"), None)
    assert plan["workspace_bytes"] == 0
    assert "not known" in plan["reason"]


def test_the_number_of_sms_matters() -> None:
    def plan(sm_count: int) -> str:
        return _ffi.plan("cuda", _ffi.Problem(256, 4096, 4096, 128, 8, "bfloat16"), None, (90, sm_count))["reason"]

    assert "on 132 SMs" in plan(132)
    assert "on 20 SMs" in plan(20)


@pytest.mark.parametrize(("compute_capability", "kernel"), [(80, "ampere"), (90, "hopper"), (100, "ampere")])
def test_the_architecture_matters(compute_capability: int, kernel: str) -> None:
    plan = _ffi.plan("cuda", _ffi.Problem(256, 4096, 4096, 128, 8, "bfloat16"), None, (compute_capability, 132))
    assert plan["implementation"] == kernel


@pytest.mark.parametrize("platform", ["tpu", "rocm"])
def test_other_platforms_take_the_reference(platform: str, w4: i4.Int4Weight) -> None:
    explanation = i4.explain((16, 200), w4, platform)
    assert (explanation.implementation, explanation.tile, explanation.workspace_bytes) == ("reference", "", 0)
    assert f'"{platform}"' in explanation.reason


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_a_dense_weight_for_the_call_is_counted(platform: str, w4: i4.Int4Weight) -> None:
    explanation = i4.explain((16, 200), w4, platform, "dequantize")
    assert (explanation.implementation, explanation.weights) == ("dequantize", "rounded")
    assert explanation.workspace_bytes == 256 * 32 * 2


def test_the_environment_names_the_default(monkeypatch: pytest.MonkeyPatch, w4: i4.Int4Weight) -> None:
    monkeypatch.setenv("JAX_INT4MM_IMPLEMENTATION", "reference")
    assert i4.explain((16, 200), w4, "cpu").implementation == "reference"
    assert i4.explain((16, 200), w4, "cpu", "scalar").implementation == "scalar"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x_shape": (3, 256)}, r"explain: x_shape is \[3, 256\]; against \[200, 30\] it must be \[\.\.\., 200\]"),
        ({"x_shape": ()}, r"explain: x_shape is \[\]"),
        ({"implementation": "nonesuch"}, 'implementation "nonesuch".*implementation=None'),
        ({"implementation": "ampere"}, 'implementation "ampere".*this CPU'),
        ({"device": "tpu", "implementation": "scalar"}, 'implementation "scalar" has no kernel on platform "tpu"'),
        ({"device": "cuda", "implementation": "scalar"}, 'implementation "scalar".*"decode", "hopper" and "ampere"'),
    ],
)
def test_explain_refuses(arguments: dict[str, object], message: str, w4: i4.Int4Weight) -> None:
    with pytest.raises(ValueError, match=message):
        i4.explain(**{"x_shape": (3, 200), "w4": w4, "device": "cpu"} | arguments)


def test_float16_is_planned_as_float16(w4: i4.Int4Weight) -> None:
    assert i4.explain((3, 200), w4.astype(jnp.float16), "cpu").implementation in _ffi.cpu_implementations()
