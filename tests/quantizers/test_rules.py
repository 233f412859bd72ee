from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_int4mm as i4
from jax_int4mm.quantizers import Recipe, Rules, quantize_tree

HUGGING_FACE_NAMES = {
    "model.layers.0.self_attn.q_proj.weight": True,
    "model.layers.3.mlp.gate_proj.weight": True,
    "model.layers.3.mlp.experts.7.down_proj.weight": True,
    "model.layers.3.block_sparse_moe.experts.0.w1.weight": True,
    "lm_head.weight": False,
    "model.embed_tokens.weight": False,
    "transformer.wte.weight": False,
    "audio_tower.embed_positions.weight": False,
    "model.layers.3.mlp.gate.weight": False,
    "model.layers.3.block_sparse_moe.gate.weight": False,
    "model.layers.3.mlp.router.weight": False,
}


def chosen(rules: Rules, name: str, shape: tuple[int, ...] = (64, 64), dtype: object = jnp.bfloat16) -> Recipe | None:
    return rules.recipe(name, shape, dtype)


@pytest.mark.parametrize(("name", "quantised"), HUGGING_FACE_NAMES.items())
def test_what_is_quantised_without_rules(name: str, quantised: bool) -> None:
    assert chosen(Rules(), name) == (Recipe() if quantised else None)


@pytest.mark.parametrize(
    ("switch", "names"),
    [
        ("lm_head", {"lm_head.weight"}),
        ("embeddings", {"model.embed_tokens.weight", "transformer.wte.weight", "audio_tower.embed_positions.weight"}),
        ("routers", {"model.layers.3.mlp.gate.weight", "model.layers.3.mlp.router.weight"}),
    ],
)
def test_each_exception_has_a_switch(switch: str, names: set[str]) -> None:
    rules = Rules(**{switch: True})
    others = {name for name, quantised in HUGGING_FACE_NAMES.items() if not quantised} - names
    assert all(chosen(rules, name) == Recipe() for name in names)
    assert all(chosen(rules, name) is None for name in others - {"model.layers.3.block_sparse_moe.gate.weight"})


def test_the_first_rule_that_matches_decides() -> None:
    fine, coarse = Recipe("hqq", 32), Recipe("mse", 256, symmetric=True)
    rules = Rules(
        Recipe("rtn", 64),
        [
            (r"down_proj", fine),
            (re.compile("layers.0"), None),
            (lambda name: name.startswith("lm_head"), coarse),
            (r"down_proj|up_proj", coarse),
        ],
    )
    assert chosen(rules, "layers.0.down_proj.weight") is fine
    assert chosen(rules, "layers.0.up_proj.weight") is None
    assert chosen(rules, "layers.1.up_proj.weight") is coarse
    assert chosen(rules, "lm_head.weight") is coarse
    assert chosen(rules, "layers.1.o_proj.weight") == Recipe("rtn", 64)
    assert chosen(Rules(None, [("down", fine)]), "up") is None


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [
        ("norm.weight", (64,), jnp.float32),
        ("layers.norm", (4, 64), jnp.float32),
        ("layers/up/bias", (4, 64), jnp.bfloat16),
        ("table.weight", (64, 64), jnp.int32),
        ("empty.weight", (0, 64), jnp.float32),
    ],
)
def test_what_is_no_matrix_is_never_quantised(name: str, shape: tuple[int, ...], dtype: object) -> None:
    assert chosen(Rules(rules=[("", Recipe())]), name, shape, dtype) is None


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"method": "awq"}, r"method is 'awq'; it must be one of 'rtn', 'mse', 'hqq'"),
        ({"method": "gptq"}, r"method is 'gptq'; .* GPTQ needs inputs of each weight: call quantize"),
        ({"group_size": 48}, r"group_size is 48; it must be one of 32, 64, 128, 256"),
        ({"method": "hqq", "symmetric": True}, r'"hqq" chooses zeros, which a symmetric weight does not have'),
    ],
)
def test_recipes_that_are_none(arguments: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Recipe(**arguments)


def test_a_malformed_expression() -> None:
    with pytest.raises(ValueError, match=r"Rules: '\(' is not a regular expression"):
        Rules(rules=[("(", None)])


def test_a_model_is_quantised_leaf_by_leaf(rng: np.random.Generator) -> None:
    def matrix(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(0, 1, shape), jnp.bfloat16)

    params = {
        "embedding": matrix(32, 64),
        "layers": {"up": {"kernel": matrix(3, 64, 96), "bias": matrix(3, 96)}, "norm": matrix(3, 64)},
        "done": i4.quantize(matrix(64, 32), 64),
        "head": [matrix(64, 32), 7, None],
    }
    rules = Rules(Recipe("mse", 64), [("^head", Recipe("rtn", 32, symmetric=True))])
    found, report = quantize_tree(params, rules, inner_k_tiles=2)
    assert [layer.name for layer in report.layers] == ["head/0", "layers/up/kernel"]
    assert report.layers[1].shape == (3, 64, 96)
    assert report.layers[1].bits_per_weight == 4 + 32 / 64
    assert report.bytes_before == sum(leaf.nbytes for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array))
    assert report.bytes_after == sum(leaf.nbytes for leaf in jax.tree.leaves(found) if isinstance(leaf, jax.Array))
    lines = str(report).splitlines()
    assert lines[1].split() == ["head/0", "64", "x", "32", "rtn", "g32", "symmetric", "5.00"]
    assert lines[-1].startswith(f"2 layers; {report.bytes_before:,} bytes before")
    assert found["embedding"] is params["embedding"]
    assert found["done"] is params["done"]
    assert found["layers"]["up"]["bias"] is params["layers"]["up"]["bias"]
    assert found["layers"]["norm"] is params["layers"]["norm"]
    assert found["head"][1:] == [7, None]
    for leaf, expected in (
        (found["layers"]["up"]["kernel"], i4.quantize(params["layers"]["up"]["kernel"], 64, "mse", inner_k_tiles=2)),
        (found["head"][0], i4.quantize(params["head"][0], 32, symmetric=True, inner_k_tiles=2)),
    ):
        assert jax.tree.structure(leaf) == jax.tree.structure(expected)
        assert all(map(np.array_equal, jax.tree.leaves(leaf), jax.tree.leaves(expected)))


def test_an_error_names_the_leaf() -> None:
    with pytest.raises(ValueError, match=r"^layers/0/up: quantize: the largest \|w\| is nan"):
        quantize_tree({"layers": [{"up": jnp.full((32, 8), jnp.nan)}]})
