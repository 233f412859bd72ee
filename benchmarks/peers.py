"""What a benchmark times: the op, and what it is compared with, on weights of their own."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import sys
from collections.abc import Mapping

# Read when PyTorch loads OpenMP, whose threads by default spin after a call and hold the cores that the next contender
# needs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import jax
import jax.numpy as jnp
import numpy as np

import jax_int4mm as i4
import read_floor
import read_floor_cpu
from jax_int4mm.layout import packed_shape
from timing import Calls, CpuCalls, JaxCalls, TorchCalls, copies

INNER_K_TILES = 8
# Relative errors against the product. Ours state how they round the weight; the others may round it twice.
OUR_ERROR = 1e-3
PEER_ERROR = 1e-2

PEERS = {
    "floor": "a pure read of the bytes of packed and scales_and_zeros",
    "jnp.int4": "a jnp.int4 array, dequantised and dotted inside jit, as XLA compiles it",
    "torch": "PyTorch's int4 op",
    "bf16": "x @ w through jax.jit and, where PyTorch is installed, through it",
    "f32": "the same in float32",
    "gemlite": "gemlite's Triton kernels",
}


@dataclasses.dataclass(frozen=True)
class Contender:
    """Something to be timed: kernel -> calls; where there are several kernels the fastest counts.

    `m` and `group_size` are None where the time does not depend on them.
    """

    implementation: str
    kernels: Mapping[str, Calls]
    m: int | None
    group_size: int | None


def why_missing(peer: str) -> str | None:
    """Why a peer cannot run here, in words that follow "left out, since", or None."""
    gpu = jax.default_backend() == "gpu"
    if peer == "floor":
        return read_floor.why_missing() if gpu else read_floor_cpu.why_missing()
    if peer == "gemlite" and not gpu:
        return "it needs a GPU"
    if peer in ("torch", "gemlite"):
        for module in ("torch", peer):
            if importlib.util.find_spec(module) is None:
                return f"{module} is not installed"
        import torch

        if gpu and not torch.cuda.is_available():
            return "this PyTorch sees no GPU"
    return None


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def random_weight(key: jax.Array, n: int, k: int, group_size: int) -> i4.Int4Weight:
    """An int4 weight of random nibbles, which any words are, and random scales and zeros."""
    q_key, s_key, z_key = jax.random.split(key, 3)
    words = jax.random.bits(q_key, packed_shape(n, k, INNER_K_TILES), jnp.uint32)
    scale = jax.random.uniform(s_key, (k // group_size, n), minval=0.5, maxval=1.5) / 64
    zero = jax.random.normal(z_key, (k // group_size, n)) / 16
    scales_and_zeros = jnp.stack([scale, zero], -1).astype(jnp.bfloat16)
    packed = jax.lax.bitcast_convert_type(words, jnp.int32)
    return i4.Int4Weight(packed, scales_and_zeros, group_size=group_size, k=k, n=n)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def random_matrix(key: jax.Array, rows: int, columns: int, dtype: str = "bfloat16") -> jax.Array:
    """A normal [rows, columns] matrix."""
    return jax.random.normal(key, (rows, columns), dtype)


def activations(m: int, k: int, count: int, dtype: str = "bfloat16") -> list[jax.Array]:
    """An x [m, k] for each of `count` products; one and the same where single calls are timed."""
    if jax.default_backend() == "cpu":
        return [random_matrix(jax.random.key(m), m, k, dtype)] * count
    return [random_matrix(key, m, k, dtype) for key in jax.random.split(jax.random.key(m), count)]


@jax.jit
def exact_product(x: jax.Array, w4: i4.Int4Weight) -> jax.Array:
    """x @ w4 with the weight as it is before it is rounded, in f32."""
    q = i4.unpack_int4(w4.packed).astype(jnp.float32).reshape(w4.n, -1, w4.group_size)
    scale, zero = jnp.moveaxis(w4.scales_and_zeros.astype(jnp.float32), -1, 0)
    w = (q - 8) * scale.T[:, :, None] + zero.T[:, :, None]
    y = jnp.dot(x.astype(jnp.float32), w.reshape(w4.n, w4.k).T, precision=jax.lax.Precision.HIGHEST)
    return y.astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Int4Layer:
    """Weights of one shape and group size, made when they are first asked for."""

    n: int
    k: int
    group_size: int

    @functools.cached_property
    def weights(self) -> list[i4.Int4Weight]:
        """Enough of them to exceed what caches hold."""
        keys = jax.random.split(jax.random.key(self.n + self.k), copies(self.n * self.k // 2))
        return [random_weight(key, self.n, self.k, self.group_size) for key in keys]

    @functools.cached_property
    def unpacked(self) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
        """The same weights as q - 8 in jnp.int4 [n, k], scales and zeros [k/group_size, n]."""

        @jax.jit
        def unpack(w4: i4.Int4Weight) -> tuple[jax.Array, jax.Array, jax.Array]:
            q = (i4.unpack_int4(w4.packed).astype(jnp.int8) - 8).astype(jnp.int4)
            return q, w4.scales_and_zeros[..., 0], w4.scales_and_zeros[..., 1]

        return [unpack(w4) for w4 in self.weights]

    def check(self, name: str, x: jax.Array, y: np.ndarray, tolerance: float, exact: bool = False) -> None:
        """Stop unless y agrees with the product of x and the first weight, rounded as the reference does or `exact`."""
        product = exact_product if exact else functools.partial(i4.matmul, implementation="reference")
        expected = np.asarray(product(x, self.weights[0]), np.float32)
        error = np.linalg.norm(y - expected) / np.linalg.norm(expected)
        if not error < tolerance:
            sys.exit(f"wrong result: {name} at x {x.shape}, w {self.weights[0]}: relative error {error:.2e}")


@dataclasses.dataclass(frozen=True)
class DenseLayer:
    """Weights [k, n] of one shape, made when they are first asked for."""

    n: int
    k: int
    dtype: str = "bfloat16"

    @property
    def nbytes(self) -> int:
        """Of one weight."""
        return self.n * self.k * jnp.dtype(self.dtype).itemsize

    @property
    def name(self) -> str:
        """Of the row in the table."""
        return {"bfloat16": "bf16", "float32": "f32"}[self.dtype]

    @functools.cached_property
    def weights(self) -> list[jax.Array]:
        """Enough of them to exceed what caches hold."""
        keys = jax.random.split(jax.random.key(self.n + self.k), copies(self.nbytes))
        return [random_matrix(key, self.k, self.n, self.dtype) for key in keys]


def int4pack_mm(layer: Int4Layer, m: int, name: str) -> Contender:
    """The op by the name of an implementation, or "auto"."""
    implementation = None if name == "auto" else name
    calls = JaxCalls(
        functools.partial(i4.matmul, implementation=implementation),
        activations(m, layer.k, len(layer.weights)),
        layer.weights,
    )
    plan = i4.explain((m, layer.k), layer.weights[0], implementation=implementation)
    layer.check(name, calls.xs[0], calls.first_result(), OUR_ERROR, exact=plan.weights == "exact")
    return Contender(name, {f"{plan.implementation}/{plan.tile}": calls}, m, layer.group_size)


def pure_read(layer: Int4Layer, m: int | None) -> Contender:
    """A read of as many bytes as packed and scales_and_zeros have; on a CPU of these themselves."""
    if jax.default_backend() == "cpu":
        arrays = [tuple(np.asarray(leaf) for leaf in jax.tree.leaves(w4)) for w4 in layer.weights]
        calls = CpuCalls([functools.partial(read_floor_cpu.read, of_one) for of_one in arrays])
        return Contender("read floor", {"OpenMP": calls}, m, layer.group_size)
    words = sum(leaf.nbytes for leaf in jax.tree.leaves(layer.weights[0])) // 4
    keys = jax.random.split(jax.random.key(0), len(layer.weights))
    buffers = [jax.random.bits(key, (words,), jnp.uint32) for key in keys]

    def kernel(ctas_per_sm: int) -> JaxCalls:
        return JaxCalls(lambda _, data: read_floor.read(data, ctas_per_sm), [None] * len(buffers), buffers)

    kernels = {f"{ctas} CTAs/SM": kernel(ctas) for ctas in read_floor.CTAS_PER_SM}
    return Contender("read floor", kernels, m, layer.group_size)


def dequantize_then_dot(layer: Int4Layer, m: int) -> Contender:
    """What one would write without the op: a jnp.int4 weight, made bf16 and multiplied inside jit."""

    def product(x: jax.Array, weight: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q, scales, zeros = weight
        grouped = q.astype(x.dtype).reshape(layer.n, -1, layer.group_size)
        w = grouped * scales.T[:, :, None] + zeros.T[:, :, None]
        return x @ w.reshape(layer.n, layer.k).T

    calls = JaxCalls(product, activations(m, layer.k, len(layer.unpacked)), layer.unpacked)
    layer.check("jnp.int4", calls.xs[0], calls.first_result(), PEER_ERROR)
    return Contender("jnp.int4", {"XLA": calls}, m, layer.group_size)


def dense_dot(layer: DenseLayer, m: int) -> Contender:
    """`x @ w` through jax.jit."""
    calls = JaxCalls(jnp.matmul, activations(m, layer.k, len(layer.weights), layer.dtype), layer.weights)
    return Contender(layer.name, {"jax.jit": calls}, m, None)


def torch_dense(layer: DenseLayer, m: int) -> Contender:
    """The same through PyTorch, weights as [n, k]."""
    import torch

    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    dtype = getattr(torch, layer.dtype)
    x = torch.randn(m, layer.k, dtype=dtype, device=device)
    weights = [torch.randn(layer.n, layer.k, dtype=dtype, device=device) for _ in range(copies(layer.nbytes))]
    calls = TorchCalls([functools.partial(torch.mm, x, w.t()) for w in weights])
    return Contender(layer.name, {"cuBLAS" if device == "cuda" else "torch": calls}, m, None)


def torch_int4(layer: Int4Layer, m: int) -> Contender:
    """PyTorch's `_weight_int4pack_mm`, or `_weight_int4pack_mm_for_cpu`, whose packed form is its own."""
    if jax.default_backend() == "cpu":
        return torch_int4_cpu(layer, m)
    import torch

    def weight() -> tuple:
        q = torch.randint(0, 256, (layer.n, layer.k // 2), dtype=torch.uint8, device="cuda")
        shape = (layer.k // layer.group_size, layer.n, 2)
        scales = torch.randn(shape, dtype=torch.bfloat16, device="cuda") * 0.01
        return torch.ops.aten._convert_weight_to_int4pack(q, INNER_K_TILES), scales

    x = torch.randn(m, layer.k, dtype=torch.bfloat16, device="cuda")
    weights = [weight() for _ in range(copies(layer.n * layer.k // 2))]
    op = torch.ops.aten._weight_int4pack_mm
    calls = TorchCalls([functools.partial(op, x, packed, layer.group_size, s) for packed, s in weights])
    return Contender("tinygemm", {"torch": calls}, m, layer.group_size)


def torch_int4_cpu(layer: Int4Layer, m: int) -> Contender:
    """PyTorch's CPU op on copies of our first weight; its time does not depend on the values."""
    import torch

    w4 = layer.weights[0]
    q = torch.from_numpy(np.array(i4.unpack_int4(w4.packed), np.int32))
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, INNER_K_TILES)
    scales = torch.from_numpy(np.array(w4.scales_and_zeros, np.float32)).bfloat16()
    (x,) = activations(m, layer.k, 1)
    torch_x = torch.from_numpy(np.array(x, np.float32)).bfloat16()
    op = torch.ops.aten._weight_int4pack_mm_for_cpu
    calls = TorchCalls(
        [functools.partial(op, torch_x, packed.clone(), layer.group_size, scales.clone()) for _ in layer.weights]
    )
    layer.check("torch int4", x, calls.first_result(), PEER_ERROR)
    return Contender("torch int4", {"torch": calls}, m, layer.group_size)


def gemlite(layer: Int4Layer, m: int) -> Contender:
    """gemlite on bf16 activations. Optional; it was not available where the results in this repository were made."""
    import torch
    from gemlite.core import DType, GemLiteLinear

    shape = (layer.n, layer.k // layer.group_size)

    def linear() -> GemLiteLinear:
        weight = GemLiteLinear(
            W_nbits=4,
            group_size=layer.group_size,
            in_features=layer.k,
            out_features=layer.n,
            input_dtype=DType.BF16,
            output_dtype=DType.BF16,
        )
        q = torch.randint(0, 16, (layer.n, layer.k), dtype=torch.uint8, device="cuda")
        scales = torch.randn(shape, dtype=torch.bfloat16, device="cuda") * 0.01
        zeros = torch.full(shape, 8, dtype=torch.bfloat16, device="cuda")
        weight.pack(q, scales, zeros)
        return weight

    x = torch.randn(m, layer.k, dtype=torch.bfloat16, device="cuda")
    linears = [linear() for _ in range(copies(layer.n * layer.k // 2))]
    calls = TorchCalls([functools.partial(weight.forward, x) for weight in linears])
    return Contender("gemlite", {"triton": calls}, m, layer.group_size)
