"""Products with int4 kernels of several dimensions, against jnp.einsum and dot_general of the dequantised kernel."""

from __future__ import annotations

import functools
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_int4mm as i4
from jax_int4mm.ops import _ffi
from jax_int4mm.tensor import einsum_axes

SIZES = {"B": 2, "T": 3, "S": 5, "D": 64, "N": 4, "H": 32, "K": 2, "F": 96, "E": 3, "C": 2, "b": 2, "t": 3, "d": 64}
SIZES |= {"f": 40, "G": 2, "h": 32, "k": 3}

EQUATIONS = [
    "BTD,NDH->BTNH",  # Gemma: the query projection,
    "BSD,CKDH->CBSKH",  # keys and values,
    "BTNH,NHD->BTD",  # the output,
    "btf,fd->btd",
    "...F,NHF->...NH",  # and the gate.
    "BTD,DNH->BTNH",
    "TED,EDF->TEF",  # Experts: a matrix for each.
    "ETD,EFD->TEF",
    "EBTD,DEF->BETF",
    "D,DF->F",
    "BTD,DF",
    "BTSD,FD->BFT",  # S is summed before.
    "BKGH,KDGH->BKD",
]


def random(rng: np.random.Generator, labels: str, dtype: str, scale: float = 1.0) -> jax.Array:
    labels = labels.replace("...", "BT")
    return jnp.asarray(rng.normal(0, scale, [SIZES[label] for label in labels]), dtype)


def float64(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def tensor_of(w: jax.Array, equation: str, operand: int = 1, **options: Any) -> i4.Int4Tensor:
    return i4.quantize_tensor(w, *einsum_axes(equation, w.ndim, operand), group_size=32, **options)


def assert_close(found: Any, expected: np.ndarray, bound: float = 0.01) -> None:
    assert found.shape == expected.shape
    assert np.abs(float64(found) - expected).max() <= bound * np.abs(expected).max()


@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_einsum(equation: str, dtype: str, rng: np.random.Generator) -> None:
    x_labels, w_labels = equation.partition("->")[0].split(",")
    x, w = random(rng, x_labels, dtype), random(rng, w_labels, dtype)
    w4 = tensor_of(w, equation)
    dense = w4.dequantize()
    assert dense.shape == w4.shape == w.shape
    assert np.abs(float64(dense) - float64(w)).max() < 0.35
    expected = np.einsum(equation, float64(x), float64(dense))
    assert_close(i4.int4_einsum(equation, x, w4), expected)
    assert_close(jax.jit(functools.partial(i4.int4_einsum, equation))(x, w4), expected)
    found = i4.int4_einsum(equation, x, w4, preferred_element_type=jnp.float32, implementation="reference")
    assert found.dtype == jnp.float32
    assert_close(found, expected)
    # The kernel first.
    flipped = f"{w_labels},{x_labels}->{equation.partition('->')[2] or 'BFT'}"
    assert_close(i4.int4_einsum(flipped, tensor_of(w, flipped, 0), x), expected)


def test_einsum_of_every_order_of_axes(rng: np.random.Generator) -> None:
    equations = [
        f"{''.join(x)},{''.join(w)}->{''.join(y)}"
        for x in itertools.permutations("EDGT")
        for w in itertools.permutations("EDGF")
        for y in itertools.permutations("ETF")
    ]
    for equation in rng.choice(equations, 25, replace=False):
        inputs, _, _ = str(equation).partition("->")
        x, w = (random(rng, labels, "bfloat16") for labels in inputs.split(","))
        w4 = tensor_of(w, str(equation))
        assert_close(i4.int4_einsum(str(equation), x, w4), np.einsum(equation, float64(x), float64(w4.dequantize())))


def test_a_matrix_is_a_kernel_too(rng: np.random.Generator) -> None:
    x, w = random(rng, "BTD", "bfloat16"), random(rng, "DF", "bfloat16")
    w4 = i4.quantize(w, 32)
    np.testing.assert_array_equal(i4.int4_einsum("...d,df->...f", x, w4), x @ w4)
    stacked = i4.quantize(random(rng, "EDF", "bfloat16"), 32)
    x = random(rng, "TED", "bfloat16")
    expected = np.einsum("ted,edf->tef", float64(x), float64(stacked.dequantize()))
    assert_close(i4.int4_einsum("ted,edf->tef", x, stacked), expected)


def test_dense_operands_are_left_to_jax(rng: np.random.Generator) -> None:
    x, w = random(rng, "BTD", "float32"), random(rng, "DF", "float32")
    np.testing.assert_array_equal(i4.int4_einsum("btd,df->btf", x, w), jnp.einsum("btd,df->btf", x, w))
    numbers = (((2,), (0,)), ((), ()))
    np.testing.assert_array_equal(i4.int4_dot_general(x, w, numbers), jax.lax.dot_general(x, w, numbers))


@pytest.mark.parametrize(
    ("x_labels", "w_labels", "contracted", "batch"),
    [("BTD", "DF", "D", ""), ("TDE", "EFD", "D", "E"), ("BTNH", "NHD", "HN", ""), ("ETGD", "DEFG", "D", "GE")],
)
@pytest.mark.parametrize("kernel_first", [False, True])
def test_dot_general(
    x_labels: str, w_labels: str, contracted: str, batch: str, kernel_first: bool, rng: np.random.Generator
) -> None:
    x, w = random(rng, x_labels, "bfloat16"), random(rng, w_labels, "bfloat16")
    w4 = i4.quantize_tensor(w, [w_labels.index(a) for a in contracted], [w_labels.index(a) for a in batch], 32)
    of_x, of_w = (
        tuple(tuple(labels.index(a) for a in kind) for kind in (contracted, batch)) for labels in (x_labels, w_labels)
    )
    operands, sides = ((w4, x), (of_w, of_x)) if kernel_first else ((x, w4), (of_x, of_w))
    numbers = tuple(zip(*sides, strict=True))
    dense = [operand.dequantize() if operand is w4 else operand for operand in operands]
    expected = jax.lax.dot_general(*(jnp.asarray(a, jnp.float32) for a in dense), numbers, precision="highest")
    assert_close(i4.int4_dot_general(*operands, numbers), float64(expected))


def test_transformations(rng: np.random.Generator) -> None:
    equation = "BTD,NDH->BTNH"
    x, w = random(rng, "BTD", "bfloat16"), jnp.asarray(rng.normal(size=(3, 4, 64, 32)), jnp.bfloat16)
    layers = [tensor_of(one, equation) for one in w]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    assert stacked.shape == (3, 4, 64, 32)
    assert stacked.ndim == 4
    np.testing.assert_array_equal(stacked.dequantize()[1], layers[1].dequantize())
    _, found = jax.lax.scan(lambda carry, layer: (carry, i4.int4_einsum(equation, x, layer)), 0, stacked)
    for one, layer in zip(found, layers, strict=True):
        np.testing.assert_array_equal(one, i4.int4_einsum(equation, x, layer))
    np.testing.assert_array_equal(jax.vmap(lambda layer: i4.int4_einsum(equation, x, layer))(stacked), found)
    with pytest.raises(ValueError, match=r"the kernel is stacked, \[3, 4, 64, 32\]; scan or vmap"):
        i4.int4_einsum("LBTD,LNDH->LBTNH", jnp.stack([x] * 3), stacked)

    cotangent = random(rng, "BTNH", "bfloat16")
    _, backward = jax.vjp(lambda x: i4.int4_einsum(equation, x, layers[0]), x)
    expected = np.einsum("BTNH,NDH->BTD", float64(cotangent), float64(layers[0].dequantize()))
    assert_close(backward(cotangent)[0], expected, 0.02)

    shape = jax.eval_shape(functools.partial(i4.int4_einsum, equation), x, layers[0])
    assert (shape.shape, shape.dtype) == ((2, 3, 4, 32), jnp.bfloat16)
    checks = [jax.export.DisabledSafetyCheck.custom_call(_ffi.TARGET)]
    exported = jax.export.export(jax.jit(functools.partial(i4.int4_einsum, equation)), disabled_checks=checks)(
        x, layers[0]
    )
    again = jax.export.deserialize(exported.serialize())
    np.testing.assert_array_equal(again.call(x, layers[0]), i4.int4_einsum(equation, x, layers[0]))
    assert layers[0].astype("float16").dtype == jnp.float16
    assert layers[0].nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(layers[0]))
    assert "contracted=[1]" in repr(layers[0])


X, W = jnp.zeros((2, 3, 64), jnp.bfloat16), jnp.ones((64, 96), jnp.bfloat16)


@pytest.mark.parametrize(
    ("equation", "sentence"),
    [
        ("BTD,DF,F->BTF", "has 3 operands; it must have two"),
        ("BTD->BT", "has 1 operands"),
        ("BTT,TF->BF", "repeats an index within 'BTT'"),
        ("BTD,D...->BTD", "the kernel has an ellipsis"),
        ("...D,DF->F", "sums over an ellipsis"),
        ("BTD,DF->BTFG", "has an index that no operand has"),
        ("BTD,DF->BTD", "sums the kernel over an index that x does not have"),
        ("BTD,EF->BTDEF", "sums over no index of the kernel"),
        ("BTF,DF->BTD", r"sums over axes \[1\] of the kernel .* quantize_tensor\(w, contracted=\(1,\), batch=\(\)\)"),
        ("TD,DF->TF", r"x has shape \[2, 3, 64\]; .* gives it 2 dimensions"),
        ("...BTDE,EF->...BTDF", "with fewer dimensions than"),
        ("BDT,DF->BTF", r"axis 1 of x \[2, 3, 64\] meets axis 0 of the kernel \[64, 96\]"),
    ],
)
def test_equations_that_are_refused(equation: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        i4.int4_einsum(equation, X, i4.quantize(W, 32))


def test_operands_that_are_refused() -> None:
    w4 = i4.quantize(W, 32)
    with pytest.raises(TypeError, match="both operands are int4"):
        i4.int4_einsum("DF,DG->FG", w4, w4)
    with pytest.raises(TypeError, match="both operands are int4"):
        i4.int4_dot_general(w4, w4, (((0,), (0,)), ((), ())))
    with pytest.raises(TypeError, match="x has dtype float32 and the weight bfloat16"):
        i4.int4_einsum("BTD,DF->BTF", X.astype(jnp.float32), w4)
    with pytest.raises(ValueError, match=re.escape("gives the kernel 2 dimensions, and it has 3")):
        einsum_axes("BTD,DF->BTF", 3)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"contracted": 2}, r"contracted is \[2\]; w has axes 0 to 1"),
        ({"contracted": ()}, "at least one axis is contracted"),
        ({"contracted": 0, "batch": -2}, "none is named twice"),
        ({"contracted": 0, "method": "gptq"}, "needs the inputs of a matrix"),
        ({"contracted": 0, "group_size": 48}, "group_size"),
    ],
)
def test_tensors_that_are_not_quantised(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        i4.quantize_tensor(W, **arguments)
