"""Quantises a matrix to 4 bits and multiplies by it."""

import jax
import jax.numpy as jnp

import jax_int4mm as i4

x_key, w_key = jax.random.split(jax.random.key(0))
x = jax.random.normal(x_key, (4, 1024), jnp.bfloat16)
w = jax.random.normal(w_key, (1024, 512), jnp.bfloat16)  # the matrix you would write x @ w with

w4 = i4.quantize(w, group_size=64)  # 16 levels between the minimum and maximum of every 64 values along k
y = jax.jit(lambda x, w4: x @ w4)(x, w4)  # a pytree and an operator: any jitted function takes it

dequantized = jnp.dot(x, w4.dequantize(), preferred_element_type=jnp.float32)
print(w4)
print(f"bytes: {w.nbytes:,} as bf16, {w4.nbytes:,} as int4 with a bf16 scale and zero per group")
print(f"x @ w4 against x @ w4.dequantize(): largest difference {jnp.abs(y - dequantized).max():.3f}, bf16 rounding")
print(f"x @ w4 against x @ w: relative error {jnp.linalg.norm(y - x @ w) / jnp.linalg.norm(x @ w):.3f}, of 4 bits")
print(i4.explain(x.shape, w4))
